"""What the Store takes and answers: frozen records, no SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

RunMode = Literal["simulation", "deployment", "unknown"]
RunStatus = Literal["running", "finished", "failed", "stopped"]
EndStatus = Literal["finished", "failed", "stopped"]
RoundStatus = Literal["open", "committed", "aborted"]
ParticipationStatus = Literal["invited", "trained", "failed", "late", "refused"]
Outcome = Literal["trained", "failed", "late", "refused"]


@dataclass(frozen=True, slots=True)
class RunRow:
    """One fine-tuning run. `committed_rounds` is the number of its newest adapter version, 0 before round 1."""

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
    """Who may speak for a client; `public_key` is one line, `roster_version` that of the last change."""

    client_id: str
    public_key: str
    enrolled_at: datetime
    enrolled_by: str
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

    `survivors` are the clients whose updates are in the average; `metrics` are over all of them.
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
