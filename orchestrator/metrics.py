"""What clients tell of a round, put together over all of them, and what it says about the adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from contract.config import RunConfig
from storage.records import MetricRow

_WEIGHTED = (("train_loss", "trained_tokens"), ("eval_loss", "eval_tokens"))
_SUMMED = ("trained_tokens", "eval_tokens", "steps", "sent_bytes", "received_bytes")
_LARGEST = ("seconds",)
JUDGEMENT = ("eval_loss", "eval_tokens")
"""A client judges the adapter that it was given, before it trains: these belong to the version before the round."""


def over_clients(told: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Losses weighted by their tokens, counts summed, the slowest client's seconds. Absent numbers are left out."""
    clients = list(told)
    found: dict[str, float] = {}
    for name, weight in _WEIGHTED:
        both = [(one[name], one[weight]) for one in clients if name in one and one.get(weight, 0) > 0]
        if both:
            found[name] = sum(value * tokens for value, tokens in both) / sum(tokens for _, tokens in both)
    for names, put_together in ((_SUMMED, sum), (_LARGEST, max)):
        for name in names:
            values = [one[name] for one in clients if name in one]
            if values:
                found[name] = put_together(values)
    return found


def judgement(told: Mapping[str, float]) -> dict[str, float]:
    """The part of `told` that judges the adapter which the client was given."""
    return {name: told[name] for name in JUDGEMENT if name in told}


def judged_losses(metrics: Iterable[MetricRow]) -> dict[int, float]:
    """Held-out loss over all clients by adapter version; versions that nobody judged are absent."""
    return {
        row.number: row.value for row in metrics if row.attempt == 0 and row.node_id is None and row.name == "eval_loss"
    }


def best_version(losses: Mapping[int, float]) -> int | None:
    """The version with the lowest held-out loss, the earliest of equals; None when none was judged."""
    return min(losses, key=lambda number: (losses[number], number), default=None)


def judges(config: RunConfig) -> bool:
    """Whether clients judge adapters and tell of it."""
    return config.eval_fraction > 0 and config.metrics == "sum"


def has_stalled(losses: Mapping[int, float], patience: int) -> bool:
    """Whether the last `patience` judged versions brought no lower loss; never when `patience` is 0."""
    best = best_version(losses)
    return bool(patience) and best is not None and sum(number > best for number in losses) >= patience
