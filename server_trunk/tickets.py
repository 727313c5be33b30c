"""Which sessions a trunk admits that takes sessions by ticket alone, and what the sessions of one ticket had so far.

No torch and no gRPC. Nothing is kept of who does not prove to be a ticket's holder. Not safe to use from several
threads; the servicer's event loop owns it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from contract import trunk_pb2 as pb
from contract.durable_file import create_file
from contract.errors import CapacityError, ConfigError, StorageError, TicketError
from contract.identity import public_key_text
from contract.private_file import read_private_file
from contract.records import RoundKey
from contract.ticket import (
    LEEWAY_S,
    RENEWAL_KEY_BYTES,
    Ticket,
    parse_ticket,
    renewed,
    require_in_time,
    require_proof,
)
from server_trunk.challenges import Challenges

RENEWAL_KEY_FILE = "renewal.key"
MOST_TICKETS = 1 << 16
"""Tickets of open rounds that are counted; one takes about 500 bytes here."""


@dataclass(slots=True)
class TicketUse:
    """What the sessions of one ticket had together, and may have. Bytes are those of frames, both ways.

    `renewal` is what its holder gets for the later ones.
    """

    max_steps: int
    max_bytes: int
    renewal: bytes
    sessions: int = 0
    steps: int = 0
    size_bytes: int = 0

    def spend(self, steps: int, size_bytes: int) -> None:
        """Count what a session of it did. Raises TicketError where that is more than the ticket allows."""
        self.steps += steps
        self.size_bytes += size_bytes
        for what, spent, most in (("steps", self.steps, self.max_steps), ("bytes", self.size_bytes, self.max_bytes)):
            if spent > most:  # by how much would tell the orchestrator of the client's work, which hides it in a sum
                raise TicketError(f"the ticket allows {most} {what}, and its sessions have come to more")


@dataclass(slots=True)
class _RunUses:
    """The tickets of the newest attempt at a round of one run that was seen, in use until `until_s` at most."""

    newest: tuple[int, int]
    until_s: float
    uses: dict[str, TicketUse] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a session of a round asks for, as far as a ticket says something of it."""

    client_id: str
    round_key: RoundKey
    adapter_sha256: str
    trainable: str


@dataclass(frozen=True, slots=True)
class Admission:
    """A ticket whose holder asks for a session, with the challenge that its proof is for."""

    ticket: Ticket
    challenge: bytes


class TicketBook:
    """The tickets that this trunk takes: of `signers`, and its own renewals of those."""

    def __init__(
        self,
        signers: Sequence[bytes],
        renewal_key: bytes,
        clock: Callable[[], float] = time.time,
        challenges: Challenges | None = None,
    ) -> None:
        """`signers` are public keys of 32 bytes; `clock` is the wall's, in seconds since 1970."""
        self._signers = tuple(signers)
        self._renewal_key = renewal_key
        self._clock = clock
        self._challenges = challenges or Challenges()
        self._runs: dict[tuple[bytes, str], _RunUses] = {}  # by signer and run

    @property
    def signers(self) -> str:
        """Whose tickets count, as a description names them: public lines, parted by commas."""
        return ",".join(public_key_text(signer) for signer in self._signers)

    def challenge(self) -> bytes:
        """A new challenge, for one session."""
        return self._challenges.new()

    def checked(self, hello: pb.Hello, asked: Asked | None, certificate_key_sha256: str) -> Admission:
        """The admission that `hello` may ask for; nothing is counted yet. `asked` is None for a session of its own.

        `certificate_key_sha256` is of the certificate that the caller showed, "" for none. Raises TicketError.
        """
        if asked is None:
            raise TicketError("this trunk takes sessions of a round, with a ticket, and no sessions of their own")
        if not hello.ticket:
            raise TicketError(
                "hello.ticket is missing: this trunk takes sessions by ticket alone, from an orchestrator whose "
                "key it knows"
            )
        self._challenges.require_fresh(hello.challenge)
        ticket = parse_ticket(hello.ticket, self._signers, self._renewal_key)
        require_in_time(ticket, self._clock())
        require_proof(ticket, hello.ticket, hello.challenge, hello.proof)
        _require_same(ticket, asked, hello.model)
        if ticket.certificate_key_sha256 not in ("", certificate_key_sha256):
            shown = certificate_key_sha256[:12] or "none"
            raise TicketError(
                f"the ticket is for the TLS key {ticket.certificate_key_sha256[:12]}..., and the caller showed {shown}"
            )
        return Admission(ticket, hello.challenge)

    def enter(self, admission: Admission) -> TicketUse:
        """Count one more session of a ticket, whose challenge is then used; what its sessions had so far.

        Raises TicketError where it has had all of its sessions, where its run has gone on to a later round or attempt,
        or where another session used the challenge; CapacityError where too many tickets are in use.
        """
        ticket = admission.ticket
        whose, place = (ticket.signer, ticket.run), (ticket.round, ticket.attempt)
        self._challenges.require_fresh(admission.challenge)
        self._forget(self._clock())
        run = self._runs.get(whose, _RunUses(place, ticket.round_ends_at))
        if place < run.newest:
            raise TicketError(
                f"the ticket is for round {place[0]}, attempt {place[1]}; its run has gone on to round "
                f"{run.newest[0]}, attempt {run.newest[1]}"
            )
        if place > run.newest:
            run = _RunUses(place, ticket.round_ends_at)
        use = run.uses.get(ticket.ticket_id)
        if use is None:
            in_use = sum(len(one.uses) for one in self._runs.values())
            if in_use >= MOST_TICKETS:
                raise CapacityError(f"{in_use} tickets are in use, which is this trunk's limit")
            use = TicketUse(ticket.max_steps, ticket.max_bytes, renewed(ticket, self._renewal_key))
        if use.sessions >= ticket.max_sessions:
            raise TicketError(f"the ticket allows {ticket.max_sessions} sessions, and has had them")
        self._challenges.use(admission.challenge)
        use.sessions += 1
        run.uses[ticket.ticket_id] = use
        run.until_s = max(run.until_s, ticket.round_ends_at)
        self._runs[whose] = run
        return use

    def _forget(self, now_s: float) -> None:
        """Forget runs all of whose tickets are admitted no more."""
        for whose in [key for key, run in self._runs.items() if run.until_s + LEEWAY_S < now_s]:
            del self._runs[whose]


def open_renewal_key(state_dir: Path) -> bytes:
    """The key by which this trunk knows its renewals again after a restart; made where there is none yet.

    Raises ConfigError for one that cannot be used or that others can read, StorageError where none can be made.
    """
    path = state_dir / RENEWAL_KEY_FILE
    if not path.exists():
        try:
            create_file(path, secrets.token_bytes(RENEWAL_KEY_BYTES), 0o600)
        except FileExistsError:  # another process made it meanwhile: then it is as good as ours
            pass
        except OSError as error:
            raise StorageError(f"cannot make the key file {path}: {error.strerror}") from error
    key = read_private_file(path)
    if len(key) != RENEWAL_KEY_BYTES:
        raise ConfigError(f"{path} is of {len(key)} bytes, not {RENEWAL_KEY_BYTES}; without it a new one is made")
    return key


def _require_same(ticket: Ticket, asked: Asked, model: pb.ModelAgreement) -> None:
    """Raise TicketError that names what the session asks for other than its ticket says."""
    wanted: dict[str, object] = {
        "run": asked.round_key.run,
        "round": asked.round_key.round,
        "attempt": asked.round_key.attempt,
        "client_id": asked.client_id,
        "head_layers": model.head_layers,
        "tail_layers": model.tail_layers,
        "model_fingerprint": model.fingerprint,
        "adapter_sha256": asked.adapter_sha256,
        "trainable": asked.trainable,
    }
    for name, value in wanted.items():
        if (said := getattr(ticket, name)) != value:
            raise TicketError(f"the ticket's {name} is {said}, and the session's {value}")
