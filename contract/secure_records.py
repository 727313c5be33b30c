"""What orchestrator and client say to each other of secure sums, beside the training: bytes by name.

Both sides carry it as a Flower config record called `secure`. An empty field is absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from contract.errors import FrameError

MAX_FIELD_BYTES = 64 << 20
MAX_TEXT_LETTERS = 1000
_TEXTS = ("run", "name", "dataset", "refusal", "failure")


@dataclass(frozen=True, slots=True)
class SecureOrder:
    """To a client. `session` and `next_session` are ids; the other fields are messages of the protocol's stages.

    `head` is the signed head of the ledger's chain for this client's unit, as JSON.
    """

    run: str
    greet: bytes = b""
    session: bytes = b""
    inbox: bytes = b""
    confirm: bytes = b""
    unmask: bytes = b""
    join: bytes = b""
    next_session: bytes = b""
    share: bytes = b""
    head: bytes = b""


@dataclass(frozen=True, slots=True)
class SecureReply:
    """From a client: what it answers to the same stage.

    `name` and `dataset` say whose privacy budget its part is charged to. `refusal` tells why it takes no part in the
    next sum, `failure` why it has no vector for the present one.
    """

    identity: bytes = b""
    greeting: bytes = b""
    name: str = ""
    dataset: str = ""
    advert: bytes = b""
    shares: bytes = b""
    confirmation: bytes = b""
    answer: bytes = b""
    refusal: str = ""
    failure: str = ""


def to_record(said: SecureOrder | SecureReply) -> dict[str, str | bytes]:
    """The fields that are there."""
    return {name: value for name, value in asdict(said).items() if value}


def order_from(record: Mapping[str, object]) -> SecureOrder:
    """Raises FrameError, naming the field, for one that is unknown, of another type or too large."""
    _check(record, SecureOrder)
    return SecureOrder(**record)  # type: ignore[arg-type]


def reply_from(record: Mapping[str, object]) -> SecureReply:
    """Raises FrameError, naming the field, for one that is unknown, of another type or too large."""
    _check(record, SecureReply)
    told = {name: _one_line(value) if isinstance(value, str) else value for name, value in record.items()}
    return SecureReply(**told)  # type: ignore[arg-type]


def _one_line(text: str) -> str:
    """A client's own words, short enough for a log and for SQL."""
    return " ".join(text[: 4 * MAX_TEXT_LETTERS].split())[:MAX_TEXT_LETTERS]


def _check(record: Mapping[str, object], kind: type[SecureOrder] | type[SecureReply]) -> None:
    wanted = {field.name: str if field.name in _TEXTS else bytes for field in fields(kind)}
    for name, value in record.items():
        if name not in wanted or not isinstance(value, wanted[name]):
            raise FrameError(f"the record 'secure' holds {name} of type {type(value).__name__}, which is not known")
        if len(value) > MAX_FIELD_BYTES:
            raise FrameError(f"secure.{name} has {len(value)} bytes; at most {MAX_FIELD_BYTES} are taken")
    if kind is SecureOrder and not record.get("run"):
        raise FrameError("the record 'secure' names no run")
