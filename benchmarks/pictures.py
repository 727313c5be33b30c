"""Draws docs/throughput.png and docs/slow-links.png from the results that are kept in benchmarks/results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.processes import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"
PICTURES = REPOSITORY / "docs"
SECONDS = (2, 5, 10, 20, 50, 100)
OURS, NAIVE, BOUND = "#1b6ca8", "#c05b2e", "#6b6b6b"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.parse_args(argv)
    draw_throughput(read("throughput"), PICTURES / "throughput.png")
    draw_slow_links(read("wan"), PICTURES / "slow-links.png")
    return 0


def read(benchmark: str) -> dict[str, Any]:
    """The kept result of a benchmark, as its --json printed it."""
    found: dict[str, Any] = json.loads((RESULTS / f"{benchmark}.json").read_text(encoding="utf-8"))
    return found


def draw_throughput(found: dict[str, Any], path: Path) -> None:
    """Total tokens a second over un-split training's, by the number of clients; a panel for each batch."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, (batch, prefix) in zip(panels, (("4x128", ""), ("1x64", "small_")), strict=True):
        counts = sorted({row["clients"] for row in found["results"] if row["batch"] == batch})
        _ratios(panel, found["ratios"], [f"{prefix}ratio_n{count}" for count in counts], OURS, "this trunk")
        _ratios(panel, found["ratios"], [f"naive_{prefix}ratio_n{count}" for count in counts], NAIVE, "a naive trunk")
        panel.axhline(1.0, color=BOUND, linewidth=1, linestyle="--", label="un-split, one process, all cores")
        panel.set_xticks(range(len(counts)), [str(count) for count in counts])
        panel.set(xlabel="clients", title=f"batch of {batch.replace('x', ' x ')} tokens")
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylim(0, 1.05 * max(ratio["high"] for ratio in found["ratios"].values()))
    panels[0].set_ylabel("total tokens/s over un-split's")
    panels[0].legend(loc="lower left", frameon=False)
    _saved(figure, path)


def _ratios(panel: Axes, ratios: dict[str, Any], names: Sequence[str], colour: str, label: str) -> None:
    kept = [(place, ratios[name]) for place, name in enumerate(names) if name in ratios]
    medians = [ratio["median"] for _, ratio in kept]
    below = [ratio["median"] - ratio["low"] for _, ratio in kept]
    above = [ratio["high"] - ratio["median"] for _, ratio in kept]
    places = [place for place, _ in kept]
    panel.errorbar(places, medians, (below, above), color=colour, marker="o", markersize=4, capsize=3, label=label)


def draw_slow_links(found: dict[str, Any], path: Path) -> None:
    """Seconds of an optimiser step by the link's rate, both axes logarithmic; a panel for each round trip."""
    trips = sorted({row["rtt_ms"] for row in found["results"]})
    figure, panels = plt.subplots(1, len(trips), figsize=(9, 3.6), sharey=True, squeeze=False, layout="constrained")
    for panel, trip in zip(panels[0], trips, strict=True):
        rows = sorted((row for row in found["results"] if row["rtt_ms"] == trip), key=lambda row: row["mbit"])
        rates = [row["mbit"] for row in rows]
        for key, colour, label in (
            ("naive_s", NAIVE, "naive: blocking, float32"),
            ("step_s", OURS, "pipelined, codec auto"),
            ("bound_s", BOUND, "the larger of computing and bytes, plus one fill"),
        ):
            style = "--" if key == "bound_s" else "-"
            panel.plot(rates, [row[key] for row in rows], style, color=colour, marker="o", markersize=4, label=label)
        panel.set(xscale="log", yscale="log", xlabel="Mbit/s each way", title=f"round trip of {trip} ms")
        panel.set_xticks(rates, [str(rate) for rate in rates])
        panel.set_yticks(SECONDS, [str(seconds) for seconds in SECONDS])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("seconds a step")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    _saved(figure, path)


def _saved(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    sys.exit(main())
