"""One shape for every benchmark: robust statistics, targets, a table or one JSON object."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

BOOTSTRAP_DRAWS = 2000
MAX_SELF_RATIO_ERROR = 0.03
"""A yardstick that strays more than this from itself cannot judge anything."""

MOST_COLUMNS = 12

Cell = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of several readings with the smallest and the largest beside it."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, readings: Sequence[float]) -> Spread:
        return cls(statistics.median(readings), min(readings), max(readings))


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of paired ratios, its 95 % bootstrap interval, and the yardstick's ratio to itself."""

    median: float
    low: float
    high: float
    self_ratio: float

    @property
    def inconclusive(self) -> bool:
        return abs(self.self_ratio - 1.0) > MAX_SELF_RATIO_ERROR

    @classmethod
    def of_pairs(
        cls, ours: Sequence[float], yardstick: Sequence[float], yardstick_again: Sequence[float], seed: int = 0
    ) -> Ratio:
        """Ratios of interleaved readings; `yardstick_again` is a second reading of the yardstick in each pair.

        The interval is the percentile bootstrap of the median (Efron 1979) over pairs.
        """
        ratios = [a / (0.5 * (b + c)) for a, b, c in zip(ours, yardstick, yardstick_again, strict=True)]
        own = [b / c for b, c in zip(yardstick, yardstick_again, strict=True)]
        draw = random.Random(seed)
        medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(BOOTSTRAP_DRAWS))
        low, high = medians[int(0.025 * BOOTSTRAP_DRAWS)], medians[int(0.975 * BOOTSTRAP_DRAWS)]
        return cls(statistics.median(ratios), low, high, statistics.median(own))

    def inverse(self) -> Ratio:
        """The yardstick over ours: how many times as fast ours is."""
        return Ratio(1 / self.median, 1 / self.high, 1 / self.low, self.self_ratio)


@dataclass(frozen=True, slots=True)
class Target:
    """A limit that a figure is held to. `ok` is what the rule of the benchmark says, not only value against limit."""

    name: str
    value: float
    limit: float
    better: Literal["lower", "higher"]
    ok: bool | Literal["inconclusive"]

    @classmethod
    def of_ratio(cls, name: str, ratio: Ratio, limit: float) -> Target:
        """A ratio that must be low passes on the worse end of its interval."""
        ok: bool | Literal["inconclusive"] = "inconclusive" if ratio.inconclusive else ratio.high <= limit
        return cls(name, ratio.high, limit, "lower", ok)

    @classmethod
    def of_speedup(cls, name: str, ratio: Ratio, limit: float) -> Target:
        """A ratio that must be high passes on the worse end of its interval."""
        ok: bool | Literal["inconclusive"] = "inconclusive" if ratio.inconclusive else ratio.low >= limit
        return cls(name, ratio.low, limit, "higher", ok)

    @classmethod
    def at_most(cls, name: str, value: float, limit: float) -> Target:
        return cls(name, value, limit, "lower", value <= limit)


@dataclass(slots=True)
class Report:
    """What one benchmark found."""

    benchmark: str
    workload: str
    results: list[dict[str, Cell]] = field(default_factory=list)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    def finish(self, as_json: bool) -> int:
        """Print the report and return the exit status: 0 when every target is met, else 1."""
        if as_json:
            sys.stdout.write(json.dumps(self._object()) + "\n")
        else:
            self._table(Console())
        return 0 if all(target.ok is True for target in self.targets) else 1

    def _object(self) -> dict[str, object]:
        return {
            "benchmark": self.benchmark,
            "workload": self.workload,
            "machine": machine(),
            "versions": versions(),
            "results": self.results,
            "ratios": {name: asdict(ratio) for name, ratio in self.ratios.items()},
            "targets": [asdict(target) for target in self.targets],
        }

    def _table(self, console: Console) -> None:
        console.print(f"[bold]{self.benchmark}[/]: {self.workload}")
        if self.results:
            console.print(_drawn(self.results))
        for name, ratio in self.ratios.items():
            console.print(
                f"{name}: median {ratio.median:.3f}, 95 % interval {ratio.low:.3f} to {ratio.high:.3f}, "
                f"yardstick against itself {ratio.self_ratio:.3f}"
            )
        for target in self.targets:
            sign = "<=" if target.better == "lower" else ">="
            word = target.ok if isinstance(target.ok, str) else ("ok" if target.ok else "MISSED")
            console.print(f"target {target.name}: {target.value:.4g} {sign} {target.limit:g}: {word}")


def machine() -> dict[str, Cell]:
    """What the figures depend on. `torch_threads` is PyTorch's own choice here, which a benchmark may have changed."""
    import torch

    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_model() -> str:
    """As Linux names it; elsewhere as Python does, which may be no more than the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "transformers", "peft", "flwr", "grpcio", "numpy")
    }


def _drawn(rows: Sequence[dict[str, Cell]]) -> Table:
    """A row a line; a row a column where there are too many columns for a line."""
    if len(rows[0]) <= MOST_COLUMNS:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*map(_shown, row.values()))
        return table
    table = Table("", *(str(number) for number in range(1, len(rows) + 1)))
    for name in rows[0]:
        table.add_row(name, *(_shown(row[name]) for row in rows))
    return table


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
