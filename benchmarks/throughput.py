"""Tokens a second of N clients on one trunk together, against un-split PEFT in one process with all cores.

All clients begin together and a reading is the wall time until the last has been answered, the trunk's last optimiser
step included. The un-split process and the trunk have all cores; a lone client has them too, of several each has one
thread. A pair is read as un-split, split, naive, un-split, so that a drift of the machine's speed shows in the
un-split's ratio to itself. `ratio_nN` is the tokens a second of N clients over un-split's; `naive_ratio_nN`, which has
no target, is the same for a trunk as one would first write it (benchmarks.naive_trunk), read in a few pairs only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from benchmarks.processes import Order, Side, Worker, naive_trunk_server, read_together, training_workers, trunk_server
from benchmarks.report import Cell, Ratio, Report, Spread, Target

COUNTS = {"30m": (1, 2, 4, 8, 16), "1b": (1, 2, 4, 8, 16, 32), "7b": (1, 2, 4, 8, 16, 32)}
NAIVE_PAIRS = 5
FEWEST_STEPS = 2
"""Of each client in a reading: with one only, the clients' ends would be most of what is read."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of the benchmark, what its figures' names begin with, and what is asked of one client and of several."""

    rows: int
    tokens: int
    prefix: str
    limit_alone: float
    limit: float


BATCHES: Mapping[str, Batch] = {
    "4x128": Batch(4, 128, "", 0.95, 0.95),
    "1x64": Batch(1, 64, "small_", 0.85, 1.0),
}


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is read: steps before, seconds of a reading, and pairs by number of clients.

    With one client readings are twice as long: of several, the others work while one's end is waited for.
    """

    warm_up_steps: int
    reading_s: float
    pairs: Mapping[int, int]

    def reading_of(self, clients: int) -> float:
        return self.reading_s * (2 if clients == 1 else 1)

    def pairs_of(self, clients: int) -> int:
        return self.pairs.get(clients, min(self.pairs.values()))


FULL = Effort(2, 2.0, {1: 15, 2: 9, 4: 7, 8: 5, 16: 5})
QUICK = Effort(1, 0.4, {1: 2})


@dataclass(frozen=True, slots=True)
class Bench:
    """What runs: one un-split process, the clients, and the two trunks by side."""

    unsplit: Worker
    clients: Sequence[Worker]
    addresses: Mapping[Side, str]
    servers: Mapping[Side, psutil.Process]
    threads: int

    def read(self, side: Side, clients: int, order: Order) -> tuple[float, float]:
        """(wall, CPU seconds) of `order` by one un-split process, or by each of `clients` clients of that side."""
        if side == "unsplit":
            return read_together([self.unsplit], replace(order, side=side, threads=self.threads))
        threads = self.threads if clients == 1 else 1
        order = replace(order, side=side, address=self.addresses[side], threads=threads)
        return read_together(self.clients[:clients], order, [self.servers[side]])


@dataclass(slots=True)
class Readings:
    """Wall and CPU seconds a step by side, all N clients' steps counted, and how many steps one client took."""

    wall_s: dict[str, list[float]] = field(default_factory=dict)
    cpu_s: dict[str, list[float]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, seconds: tuple[float, float], clients: int, steps: int) -> None:
        self.wall_s.setdefault(name, []).append(seconds[0] / (clients * steps))
        self.cpu_s.setdefault(name, []).append(seconds[1] / (clients * steps))
        self.steps[name] = steps


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    effort = QUICK if options.quick else FULL
    counts = options.clients or ((1, 2) if options.quick else COUNTS[options.shape])
    found = Report("throughput", _described(options, effort))
    with tempfile.TemporaryDirectory() as name, _bench(options, max(counts), Path(name)) as bench:
        for batch in (BATCHES[one] for one in options.batch or BATCHES):
            for clients in counts:
                readings = measure(bench, batch, clients, effort)
                add(found, readings, batch, clients, "" if options.shape == "30m" else f"_{options.shape}")
    return found.finish(options.json)


def measure(bench: Bench, batch: Batch, clients: int, effort: Effort) -> Readings:
    plain = Order("unsplit", effort.warm_up_steps, bench.threads, batch.rows, batch.tokens, settle=True)
    readings = Readings()
    for side in ("unsplit", *bench.addresses):
        bench.read(side, clients, plain)
    alone_s = bench.read("unsplit", 1, plain)[0] / effort.warm_up_steps
    reading_s = effort.reading_of(clients)
    alone = replace(plain, steps=max(1, round(reading_s / alone_s)))
    each = replace(plain, steps=max(FEWEST_STEPS, round(reading_s / alone_s / clients)))
    for pair in range(effort.pairs_of(clients)):
        readings.add("unsplit", bench.read("unsplit", 1, alone), 1, alone.steps)
        for side in [one for one in bench.addresses if one == "split" or pair < NAIVE_PAIRS]:
            readings.add(side, bench.read(side, clients, each), clients, each.steps)
        readings.add("unsplit again", bench.read("unsplit", 1, alone), 1, alone.steps)
    return readings


def add(found: Report, readings: Readings, batch: Batch, clients: int, suffix: str) -> None:
    """Rows, ratios and the target of one cell to `found`."""
    tokens = batch.rows * batch.tokens
    for name, walls in readings.wall_s.items():
        rate = Spread.of([tokens / wall_s for wall_s in walls])
        row: dict[str, Cell] = {"batch": f"{batch.rows}x{batch.tokens}", "clients": clients, "side": name}
        row |= {"tokens_per_s": rate.median, "min": rate.min, "max": rate.max}
        row |= {"cpu_s_per_step": Spread.of(readings.cpu_s[name]).median}
        found.results.append(row | {"pairs": len(walls), "steps_each": readings.steps[name]})
    for side, prefix in (("split", ""), ("naive", "naive_")):
        if side in readings.wall_s:
            name = f"{prefix}{batch.prefix}ratio_n{clients}{suffix}"
            walls = readings.wall_s[side]
            before, after = (readings.wall_s[one][: len(walls)] for one in ("unsplit", "unsplit again"))
            found.ratios[name] = Ratio.of_pairs(walls, before, after).inverse()
    name = f"{batch.prefix}ratio_n{clients}{suffix}"
    limit = batch.limit_alone if clients == 1 else batch.limit
    found.targets.append(Target.of_speedup(name, found.ratios[name], limit))


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--quick", action="store_true", help="few, short readings: a sanity check, not a figure")
    parser.add_argument("--clients", type=int, nargs="+", help="how many clients, in place of all the numbers")
    parser.add_argument("--batch", choices=tuple(BATCHES), nargs="+", help="rows x tokens, in place of both")
    parser.add_argument("--shape", choices=tuple(COUNTS), default="30m", help="the model's; 1b and 7b need a GPU")
    parser.add_argument("--no-naive", action="store_true", help="leave the naive trunk out, which holds a model too")
    options = parser.parse_args(argv)
    if options.clients and min(options.clients) < 1:
        parser.error(f"--clients {min(options.clients)}: a reading needs a client")
    options.device = "cpu"
    if options.shape != "30m":
        from torch import cuda

        if not cuda.is_available():
            parser.error(f"--shape {options.shape} needs a GPU, and PyTorch sees no CUDA device")
        options.device = "cuda"
    return options


def _described(options: argparse.Namespace, effort: Effort) -> str:
    from benchmarks.workload import SHAPES

    pairs = ", ".join(f"{pairs} at N = {clients}" for clients, pairs in effort.pairs.items())
    pairs += f", of naive at most {NAIVE_PAIRS}"
    return (
        f"{SHAPES[options.shape]} (or the batch that a row names), on {options.device}; cut (1, 1); "
        f"threads: {os.cpu_count()} un-split and a lone client, 1 each of several, the trunk's own choice; "
        f"readings of about {effort.reading_s:g} s ({effort.reading_of(1):g} s with one client), at least "
        f"{FEWEST_STEPS} steps a client; pairs: {pairs}"
    )


@contextmanager
def _bench(options: argparse.Namespace, clients: int, directory: Path) -> Iterator[Bench]:
    from benchmarks.workload import SHAPES

    shape, device = SHAPES[options.shape], options.device
    model_dir = directory / "model"
    shape.write_model(model_dir, device)
    with ExitStack() as stack:
        flags = ("--dtype", shape.dtype, "--device", device, "--max-sessions", str(clients))
        trunks: dict[Side, tuple[str, psutil.Process]] = {
            "split": stack.enter_context(trunk_server(model_dir, 0, directory, *flags))
        }
        if not options.no_naive:
            naive = naive_trunk_server(model_dir, directory, dtype=shape.dtype, device=device)
            trunks["naive"] = stack.enter_context(naive)
        common = {"shape": options.shape, "device": device}
        (unsplit,) = stack.enter_context(training_workers(1, model_dir, waits=False, **common))
        many = stack.enter_context(training_workers(clients, model_dir, waits=True, **common))
        yield Bench(
            unsplit,
            many,
            {side: address for side, (address, _) in trunks.items()},
            {side: process for side, (_, process) in trunks.items()},
            os.cpu_count() or 1,
        )


if __name__ == "__main__":
    sys.exit(main())
