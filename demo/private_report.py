"""What the measurement of demo.private found: its records and its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from contract.config import ConfigValue

SAME_NATS = 0.002
"""A smaller difference of the held-out loss, in nats per token, counts as none."""


@dataclass(frozen=True, slots=True)
class Privacy:
    """The price of a run and its noise.

    `epsilon` is that against who holds the adapter, of all rounds. `survivors_floor` is how many honest clients carry
    the whole noise at the least, at client level. `noise_to_signal` is as `trunkline budget plan` has it: of a
    round's average at client level, of a step at one client at example level; `noise_to_signal_of_run` is what is left
    of it when everything has been averaged.
    """

    epsilon: float
    noise_multiplier: float
    clip: float
    survivors_floor: int | None
    noise_to_signal: float
    noise_to_signal_of_run: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One mode with `clients` clients of at least `rows_each` rows; `losses` has one for each seed of the noise.

    Losses are in nats per token of everybody's held-out text after the last round.
    """

    mode: str
    clients: int
    rows_each: int
    trained_values: int
    privacy: Privacy | None
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured, and with what."""

    base_loss: float
    heldout_tokens: int
    median_update_norms: Mapping[int, float]
    outcomes: tuple[Outcome, ...]
    settings: Mapping[str, ConfigValue]
    modes: Mapping[str, Mapping[str, ConfigValue]]
    seeds: tuple[int, ...]
    versions: Mapping[str, str]
    seconds: float


def verdict(base: float, losses: Sequence[float]) -> str:
    """What the losses with every seed say beside the base model's, in words."""
    if max(losses) < base - SAME_NATS:
        return "better than the base model"
    if min(losses) > base + SAME_NATS:
        return "worse than doing nothing"
    return "no better than the base model"


def table(report: Report) -> list[dict[str, object]]:
    """A row for each outcome; `spread` is from the lowest to the highest loss over the seeds."""
    return [_row(report.base_loss, outcome) for outcome in report.outcomes]


def _row(base: float, outcome: Outcome) -> dict[str, object]:
    privacy = outcome.privacy
    spread = f"{min(outcome.losses):.4f} to {max(outcome.losses):.4f}" if len(outcome.losses) > 1 else None
    return {
        "mode": outcome.mode,
        "clients": outcome.clients,
        "epsilon": None if privacy is None else privacy.epsilon,
        "d": outcome.trained_values,
        "z": None if privacy is None else privacy.noise_multiplier,
        "clip": None if privacy is None else privacy.clip,
        "survivors floor": None if privacy is None else privacy.survivors_floor,
        "noise to signal": None if privacy is None else privacy.noise_to_signal,
        "loss": f"{outcome.loss:.4f}",
        "spread": spread,
        "change": f"{outcome.loss - base:+.4f}",
        "verdict": verdict(base, outcome.losses),
    }
