"""What the Store takes and answers: frozen records, no SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

from contract.privacy_records import PricedRelease, Unit

RunMode = Literal["simulation", "deployment", "unknown"]
RunStatus = Literal["running", "finished", "failed", "stopped"]
EndStatus = Literal["finished", "failed", "stopped"]
RoundStatus = Literal["open", "committed", "aborted"]
ParticipationStatus = Literal["invited", "trained", "failed", "late", "refused"]
Outcome = Literal["trained", "failed", "late", "refused"]
Settled = Literal["COMMITTED", "VOID"]
HeadSource = Literal["own", "peer"]


@dataclass(frozen=True, slots=True)
class RunRow:
    """One fine-tuning run. `committed_rounds` is the number of its newest adapter version, 0 before round 1.

    `flower_run_id` is the Flower run that drives it, or drove it last; until `lease_until` no other may take it over.
    """

    run_id: str
    flower_run_id: str
    mode: RunMode
    status: RunStatus
    reason: str | None
    config: Mapping[str, Any]
    model_fingerprint: str
    committed_rounds: int
    created_at: datetime
    ended_at: datetime | None
    lease_until: datetime | None


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One attempt at one round. The counters are what is known so far, final once the status is not "open".

    `seconds` and `phase_seconds` come with the commit; `progress_at` is when a counter or the phase last moved.
    `threshold` is how many clients its secure sum needs to its end, None where the orchestrator sees each update.
    """

    run_id: str
    number: int
    attempt: int
    status: RoundStatus
    reason: str | None
    threshold: int | None
    phase: str
    replies: int
    steps: int
    tokens: int
    received_bytes: int
    sent_bytes: int
    trained_tokens: int
    seconds: float | None
    phase_seconds: Mapping[str, float]
    opened_at: datetime
    progress_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class ClientRow:
    node_id: str
    name: str | None
    first_seen_at: datetime


@dataclass(frozen=True, slots=True)
class ParticipationRow:
    """What one client did in one attempt at a round; `reason` is there unless it was invited or trained."""

    run_id: str
    number: int
    attempt: int
    node_id: str
    name: str | None
    status: ParticipationStatus
    reason: str | None
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class AdapterVersionRow:
    """The adapter after round `number`; 0 is the one that the run began with."""

    run_id: str
    number: int
    client_sha256: str
    trunk_sha256: str
    trained_tokens: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One number; `node_id` is None for a value over all clients, `attempt` 0 for one outside any attempt."""

    run_id: str
    number: int
    attempt: int
    node_id: str | None
    name: str
    value: float
    recorded_at: datetime


@dataclass(frozen=True, slots=True)
class EventRow:
    event_id: int
    run_id: str | None
    kind: str
    message: str
    detail: Mapping[str, Any]
    at: datetime


@dataclass(frozen=True, slots=True)
class IdentityRow:
    """Who may speak for a client; `public_key` is one line, `roster_version` that of the last change.

    `certificate_key_sha256` is of the public key in the TLS certificate that the client shows, None for any.
    """

    client_id: str
    public_key: str
    enrolled_at: datetime
    enrolled_by: str
    certificate_key_sha256: str | None
    revoked_at: datetime | None
    revoke_reason: str | None
    roster_version: int


@dataclass(frozen=True, slots=True)
class RosterRow:
    """The roster at one version: who is enrolled and not revoked, by client id. Version 0: nobody ever was."""

    version: int
    members: Sequence[IdentityRow]


@dataclass(frozen=True, slots=True)
class NodeBindingRow:
    """`signature` is that of the node's first contact in the run, in hex."""

    node_id: str
    run_id: str
    client_id: str
    bound_at: datetime
    signature: str


@dataclass(frozen=True, slots=True)
class RoundCommit:
    """Everything that one round's commit writes, all of it or nothing.

    `survivors` are the clients whose updates are in the average; `metrics` are over all of them. With `settle_privacy`
    what the attempt reserved in the ledger is committed too, and the heads of its chains are signed.
    """

    run_id: str
    number: int
    attempt: int
    client_sha256: str
    trunk_sha256: str
    trained_tokens: int
    survivors: Sequence[str]
    seconds: float
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    settle_privacy: bool = False


@dataclass(frozen=True, slots=True)
class Charge:
    """What one unit pays for one channel in one attempt at a round; `accountant` names the program that priced it.

    (unit, run, round, attempt, release.channel) is what a charge is known by: it is reserved once, for ever.
    """

    unit: Unit
    run: str
    round: int
    attempt: int
    release: PricedRelease
    accountant: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A unit that may not afford what was proposed, and why; nothing was charged to it."""

    unit: Unit
    reason: str


@dataclass(frozen=True, slots=True)
class Account:
    """How often a unit spent one release (its canonical text) in a run, counted from the rows; in which round last."""

    unit: Unit
    run: str
    release: str
    count: int
    last_round: int


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One row of a unit's chain, as SQL holds it; `storage.ledger_rows` says what each column must be.

    `kind` is "charge" or "budget". A charge's `state` is RESERVED, COMMITTED or VOID, a budget's is SET.
    `at` is the moment in UTC, in ISO 8601 with microseconds: text, so that what was hashed is what is stored.
    """

    unit_id: str
    seq: int
    kind: str
    client: str
    dataset: str
    level: str
    run: str
    round: int
    attempt: int
    channel: str
    mechanism: str
    parameters: str
    sampling: str
    adjacency: str
    release: str
    accountant: str
    state: str
    operator: str
    reason: str
    at: str
    previous: str
    hash: str


@dataclass(frozen=True, slots=True)
class SignedHead:
    """A promise about a chain: row `seq` of `unit_id` hashes to `hash`, signed after (run, round, attempt) was settled.

    `signer` is a public key as contract.identity.public_key_text writes it, `signature` hexadecimal. After a change of
    the budget `run` is empty and `round` is the change's ordinal.
    """

    unit_id: str
    seq: int
    hash: str
    run: str
    round: int
    attempt: int
    signer: str
    signature: str


class HeadSigner(Protocol):
    """An Ed25519 key that signs heads."""

    @property
    def public_key_text(self) -> str:
        """The public key as contract.identity.public_key_text writes it."""

    def sign(self, message: bytes) -> bytes:
        """The signature, 64 bytes."""
