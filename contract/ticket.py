"""Tickets: what the sessions of one client in one attempt at a round may do at a trunk, and who may open them.

A ticket is two lines of JSON: the body, written in one way only (sorted names, no spaces), and the orchestrator's
signature over exactly the body's bytes. It is good for 15 minutes at most, and only with a proof that its holder made.

    {"adapter_sha256":...,"attempt":1,...,"format":"trunkline-ticket-1","holder":"ed25519:...","signer":"ed25519:..."}
    {"signature":"..."}

A renewal is the same body, good to the round's end, with a MAC of the trunk that gave it in place of the signature:

    {...,"format":"trunkline-renewal-1",...}
    {"mac":"..."}

A proof is the holder's signature over the hash of what it presents and a challenge that the trunk made.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any, get_args

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from contract.errors import ConfigError, TicketError
from contract.identity import KEY_BYTES, decode_public_key, public_key_text
from contract.records import Trainable

MAX_TICKET_BYTES = 4096
ID_BYTES = 16
RENEWAL_KEY_BYTES = 32
MAX_LIFE_S = 15 * 60
"""How long a ticket admits sessions; a renewal does to the round's end."""
MAX_ROUND_S = 24 * 3600
"""No round lasts longer."""
LEEWAY_S = 30
"""By how much the clocks of orchestrator and trunk may differ."""
MAX_COUNT = 2**53  # what every JSON reader keeps exactly

_FORMATS = {False: "trunkline-ticket-1", True: "trunkline-renewal-1"}
_SEALS = {False: "signature", True: "mac"}
# So that no signature and no MAC over anything else is one over these.
_SIGNED_AS, _RENEWED_AS, _PROVED_AS = b"trunkline ticket\x00", b"trunkline renewal\x00", b"trunkline session\x00"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Ticket:
    """What one client may do at a trunk in one attempt at a round. Moments are whole seconds since 1970, in UTC.

    `holder` and `signer` are public keys of 32 bytes: of who may present it, and of who issued it. Where
    `certificate_key_sha256` is not empty the caller's TLS certificate must be for that key. `adapter_sha256` is the
    trunk's half that each session starts from. Steps and bytes (both ways) are counted over all of its sessions.
    `renewal` says that a trunk gave it, to the round's end. Raises ConfigError, naming the field, where it is none.
    """

    ticket_id: str
    run: str
    round: int
    attempt: int
    client_id: str
    holder: bytes
    certificate_key_sha256: str
    head_layers: int
    tail_layers: int
    model_fingerprint: str
    adapter_sha256: str
    trainable: Trainable
    max_sessions: int
    max_steps: int
    max_bytes: int
    issued_at: int
    expires_at: int
    round_ends_at: int
    signer: bytes
    renewal: bool = False

    def __post_init__(self) -> None:
        for field in ("run", "client_id"):
            if not _NAME.fullmatch(_text(getattr(self, field), field)):
                raise ConfigError(f"{field} is {getattr(self, field)[:99]!r}; it must be 1 to 128 letters, digits, ._-")
        for field in ("holder", "signer"):
            if len(getattr(self, field)) != KEY_BYTES:
                raise ConfigError(f"{field} is of {len(getattr(self, field))} bytes; a public key has {KEY_BYTES}")
        for field in ("certificate_key_sha256", "model_fingerprint", "adapter_sha256"):
            may_lack = field == "certificate_key_sha256" and getattr(self, field) == ""
            if not may_lack and not _SHA256.fullmatch(_text(getattr(self, field), field)):
                raise ConfigError(f"{field} is {getattr(self, field)[:80]!r}; it must be 64 hexadecimal digits")
        if not re.fullmatch(rf"[0-9a-f]{{{2 * ID_BYTES}}}", _text(self.ticket_id, "ticket_id")):
            raise ConfigError(f"ticket_id is {self.ticket_id[:80]!r}; it must be {2 * ID_BYTES} hexadecimal digits")
        if self.trainable not in get_args(Trainable):
            raise ConfigError(f"trainable is {self.trainable!r}; it must be one of {', '.join(get_args(Trainable))}")
        for field in _COUNTS:
            value, least = getattr(self, field), 1 if field == "max_sessions" else 0
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_COUNT:
                raise ConfigError(f"{field} is {value!r}; it must be a whole number from {least} on")
        life_s = MAX_ROUND_S if self.renewal else MAX_LIFE_S
        if not self.issued_at <= self.expires_at <= self.issued_at + life_s:
            raise ConfigError(f"expires_at is {self.expires_at - self.issued_at} s after issued_at, not 0 to {life_s}")
        if not self.expires_at <= self.round_ends_at <= self.issued_at + MAX_ROUND_S:
            raise ConfigError(f"round_ends_at is {self.round_ends_at}; it must be expires_at or later, within a day")
        if self.renewal and self.expires_at != self.round_ends_at:
            raise ConfigError("expires_at of a renewal is not round_ends_at")


_COUNTS = (
    *("round", "attempt", "head_layers", "tail_layers", "max_sessions", "max_steps", "max_bytes"),
    *("issued_at", "expires_at", "round_ends_at"),
)
_KEYS = ("holder", "signer")
_FIELDS = {"format", *Ticket.__dataclass_fields__} - {"renewal"}


def signed_ticket(ticket: Ticket, key: Ed25519PrivateKey) -> bytes:
    """What a client is sent. Raises ConfigError for another key than that of the ticket's signer, and for a renewal."""
    if ticket.renewal or key.public_key().public_bytes_raw() != ticket.signer:
        raise ConfigError("the ticket's signer is another one than the key's owner")
    body = _canonical(_body_of(ticket))
    return _sealed(body, "signature", key.sign(_SIGNED_AS + body))


def renewed(ticket: Ticket, renewal_key: bytes) -> bytes:
    """What a trunk gives for `ticket`, which it admitted: the same to the round's end, at this trunk alone."""
    body = _canonical(_body_of(replace(ticket, expires_at=ticket.round_ends_at, renewal=True)))
    return _sealed(body, "mac", _mac(renewal_key, body).finalize())


def parse_ticket(data: bytes, signers: Collection[bytes], renewal_key: bytes) -> Ticket:
    """The ticket in `data`, signed by one of `signers`, or renewed by the owner of `renewal_key`.

    Its times are not looked at, nor who presents it. Raises TicketError, naming the field, for anything else.
    """
    if len(data) > MAX_TICKET_BYTES:
        raise TicketError(f"the ticket is of {len(data)} bytes; none is over {MAX_TICKET_BYTES}")
    body, renewal, seal = _parts(data)
    if renewal:
        _require_mac(body, seal, renewal_key)
        ticket = _parsed(body, renewal=True)
    else:
        # What is signed is read first, to learn whose signature it must be; nothing is done with it before that holds.
        ticket = _parsed(body, renewal=False)
    if ticket.signer not in signers:
        raise TicketError(f"the ticket's signer is {public_key_text(ticket.signer)}, which this trunk does not know")
    if not renewal:
        try:
            Ed25519PublicKey.from_public_bytes(ticket.signer).verify(seal, _SIGNED_AS + body)
        except (InvalidSignature, ValueError):
            raise TicketError("the ticket's signature does not hold: it was changed") from None
    return ticket


def require_in_time(ticket: Ticket, now_s: float) -> None:
    """Raise TicketError unless the ticket admits sessions at `now_s`, seconds since 1970, give or take LEEWAY_S."""
    if now_s < ticket.issued_at - LEEWAY_S:
        raise TicketError(
            f"the ticket was issued {ticket.issued_at - now_s:.0f} s from now, by this trunk's clock: set those of "
            "orchestrator and trunk"
        )
    if now_s > ticket.expires_at + LEEWAY_S:
        what = "renewal" if ticket.renewal else "ticket"
        raise TicketError(f"the {what} expired {now_s - ticket.expires_at:.0f} s ago, by this trunk's clock")


def prove(key: Ed25519PrivateKey, presented: bytes, challenge: bytes) -> bytes:
    """The proof, 64 bytes, that who presents a ticket or renewal is its holder; `challenge` is the trunk's."""
    return key.sign(_proof_message(presented, challenge))


def require_proof(ticket: Ticket, presented: bytes, challenge: bytes, proof: bytes) -> None:
    """Raise TicketError unless the ticket's holder made `proof` for what it presents, and for this challenge."""
    try:
        Ed25519PublicKey.from_public_bytes(ticket.holder).verify(proof, _proof_message(presented, challenge))
    except (InvalidSignature, ValueError):
        raise TicketError("the proof does not hold: it is not the holder's, or not for this ticket") from None


def _proof_message(presented: bytes, challenge: bytes) -> bytes:
    return _PROVED_AS + sha256(presented).digest() + challenge


def _mac(renewal_key: bytes, body: bytes) -> HMAC:
    mac = HMAC(renewal_key, SHA256())
    mac.update(_RENEWED_AS + body)
    return mac


def _require_mac(body: bytes, seal: bytes, renewal_key: bytes) -> None:
    try:
        _mac(renewal_key, body).verify(seal)
    except InvalidSignature:
        raise TicketError("the renewal is not one of this trunk's, or was changed") from None


def _body_of(ticket: Ticket) -> dict[str, Any]:
    body = asdict(ticket) | {key: public_key_text(getattr(ticket, key)) for key in _KEYS}
    del body["renewal"]
    return body | {"format": _FORMATS[ticket.renewal]}


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def _sealed(body: bytes, name: str, seal: bytes) -> bytes:
    return body + b"\n" + _canonical({name: base64.b64encode(seal).decode("ascii")}) + b"\n"


def _parts(data: bytes) -> tuple[bytes, bool, bytes]:
    """(body, whether it is a renewal, seal) of what is spelt as `_sealed` spells it."""
    body, _, rest = data.partition(b"\n")
    try:
        found = json.loads(rest)
        (name,) = found
        seal = base64.b64decode(found[name], validate=True)
    except (ValueError, RecursionError, TypeError, KeyError, binascii.Error) as error:
        raise TicketError("the ticket's second line is neither a signature nor a mac") from error
    if name not in _SEALS.values() or _sealed(body, name, seal) != data:
        raise TicketError("the ticket's second line is neither a signature nor a mac alone")
    return body, name == _SEALS[True], seal


def _parsed(body: bytes, *, renewal: bool) -> Ticket:
    try:
        found = json.loads(body, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise TicketError(f"the ticket is no JSON: {error}") from error
    try:
        ticket = _ticket_of(found, renewal=renewal)
    except ConfigError as error:
        raise TicketError(f"the ticket's {error}") from error
    if _canonical(_body_of(ticket)) != body:
        raise TicketError("the ticket is not spelt as one is: sorted names, no spaces")
    return ticket


def _ticket_of(found: object, *, renewal: bool) -> Ticket:
    """Raises ConfigError, naming the field."""
    if not isinstance(found, dict) or found.get("format") != _FORMATS[renewal]:
        raise ConfigError(f"format is not {_FORMATS[renewal]}")
    if found.keys() != _FIELDS:
        odd = ", ".join(sorted(found.keys() ^ _FIELDS))
        raise ConfigError(f"fields are missing, or have no place in it: {odd[:200]!a}")
    del found["format"]
    keys = {key: decode_public_key(_text(found[key], key), key) for key in _KEYS}
    return Ticket(**{**found, **keys, "renewal": renewal})


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field, value in pairs:
        if field in found:
            raise ValueError(f"{field[:80]!a} is there twice")
        found[field] = value
    return found


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{field} is no text")
    return value
