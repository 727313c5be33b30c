"""What a run works with, all of it given, so that a test can give another clock, grid or trunk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from contract.config import RunConfig
from contract.records import RoundKey, RoundProgress
from orchestrator.adapters import ClientPart
from orchestrator.audience import Audience
from orchestrator.exchange import Clock, Exchange
from orchestrator.tickets import TicketOffice
from orchestrator.trunk import TrunkAverage
from storage.artifacts import ArtifactStore
from storage.store import Store


class RunTrunk(Protocol):
    """What a run asks of the trunk; `orchestrator.trunk.Trunk` is the one on the wire."""

    def put_adapter(self, data: bytes) -> str: ...

    def get_adapter(self, sha256: str) -> bytes: ...

    def progress(self, key: RoundKey) -> RoundProgress: ...

    def commit_round(self, key: RoundKey, base_sha256: str, survivors: Sequence[str]) -> TrunkAverage: ...


@dataclass(frozen=True, slots=True)
class Desk:
    """One run's settings, its ways to clients, trunk, SQL, artifacts, time and chance, and who is told of it.

    `tickets` is None where the trunk needs none. `entropy(n)` gives n random bytes that nobody else can guess.
    """

    run_id: str
    config: RunConfig
    exchange: Exchange
    trunk: RunTrunk
    store: Store
    artifacts: ArtifactStore
    clock: Clock
    tickets: TicketOffice | None = None
    audience: Audience = field(default_factory=Audience)
    entropy: Callable[[int], bytes] = os.urandom


@dataclass(frozen=True, slots=True)
class Version:
    """A committed adapter: its number, its client part's values, and the ids of both parts."""

    number: int
    client: ClientPart
    client_sha256: str
    trunk_sha256: str
