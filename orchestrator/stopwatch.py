"""How long each phase of a round took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from orchestrator.audience import Audience
from orchestrator.exchange import Clock


@dataclass(slots=True)
class Stopwatch:
    """Seconds by phase. `audience` is told of each phase's beginning and end."""

    clock: Clock
    audience: Audience = field(default_factory=Audience)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def lap(self, phase: str) -> Iterator[None]:
        """Time the block as `phase`."""
        started = self.clock.monotonic()
        self.audience.phase_began(phase)
        try:
            yield
            self.seconds[phase] = self.clock.monotonic() - started
        finally:
            self.audience.phase_ended(phase, self.clock.monotonic() - started)

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())
