"""The picture of what demo.private measured: held-out loss by mode and number of clients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contract.errors import ConfigError, StorageError
from demo.private_report import SAME_NATS, Outcome, Report

PICTURE = "dp-utility.png"

_STYLES = (("o", "#777777"), ("s", "#1b6ca8"), ("^", "#c8553d"), ("D", "#2a9d5c"))
"""Marker and colour of each mode, in their order."""
_APART = 0.17
"""Between the marks of two modes; numbers of clients are 1 apart."""
_ROOM = 1.2
"""How far the picture reaches above the base model's loss, over how far it reaches below."""


def write_picture(report: Report, directory: Path) -> Path:
    """Draw `report` as PICTURE in `directory`; answers the file's path.

    Raises ConfigError where matplotlib is not installed, StorageError where the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the picture needs matplotlib: install trunkline[audit]") from error
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    _draw(figure.add_subplot(), report)
    path = directory / PICTURE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _draw(axes: Any, report: Report) -> None:
    counts = sorted({outcome.clients for outcome in report.outcomes})
    modes = list(dict.fromkeys(outcome.mode for outcome in report.outcomes))
    reach = max(report.base_loss - min(min(outcome.losses) for outcome in report.outcomes), SAME_NATS)
    ceiling = report.base_loss + _ROOM * reach
    axes.axhline(report.base_loss, color="black", linewidth=1, linestyle="--", label="base model", zorder=1)
    for mode, (marker, color) in zip(modes, _STYLES, strict=False):
        shift = (modes.index(mode) - (len(modes) - 1) / 2) * _APART
        mine = [outcome for outcome in report.outcomes if outcome.mode == mode]
        places = [counts.index(outcome.clients) + shift for outcome in mine]
        _draw_mode(axes, mine, places, ceiling, marker, color)
    axes.set_ylim(report.base_loss - 1.1 * reach, ceiling + 0.25 * reach)
    axes.set_xlim(-0.5, len(counts) - 0.5)
    axes.set_xticks(range(len(counts)), [f"{count} clients" for count in counts])
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_title("The demo's model after fine-tuning (marks: mean; bars: lowest to highest over seeds)", fontsize=10)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def _draw_mode(
    axes: Any, outcomes: Sequence[Outcome], places: Sequence[float], ceiling: float, marker: str, color: str
) -> None:
    """One mode's marks; one above `ceiling` is an arrow there, with its loss beside it."""
    label: str | None = outcomes[0].mode
    for outcome, place in zip(outcomes, places, strict=True):
        inside = outcome.loss <= ceiling
        height = outcome.loss if inside else ceiling
        axes.plot(place, height, marker=marker, color=color, linestyle="none", markersize=7, label=label, zorder=3)
        label = None
        if inside:
            axes.vlines(place, min(outcome.losses), min(max(outcome.losses), ceiling), color=color, linewidth=2)
        else:
            axes.annotate(
                f"{outcome.loss:.2f} \u2191", (place, height), (0, 9), textcoords="offset points", ha="center",
                color=color, fontsize=9,
            )  # fmt: skip
