"""What a round says of itself in one line, for logs and for reasons in SQL."""

from __future__ import annotations

from collections.abc import Mapping

REASONS_SHOWN = 3
_LOSS_LABELS = {"train_loss": "training loss", "eval_loss": "held-out loss before it"}


def told_losses(told: Mapping[str, float]) -> list[str]:
    """The losses among a round's values over all clients, named."""
    return [f"{label} {told[name]:.4f}" for name, label in _LOSS_LABELS.items() if name in told]


def told_failures(failures: Mapping[str, str]) -> str:
    """Why clients fell out, by node id: the first few."""
    reasons = [f"client {node_id}: {reason}" for node_id, reason in list(failures.items())[:REASONS_SHOWN]]
    more = len(failures) - len(reasons)
    return "; ".join(reasons) + (f"; and {more} more" if more > 0 else "")
