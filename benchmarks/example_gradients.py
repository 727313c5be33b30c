"""What a step of DP-SGD costs a client, by each way to rows' gradients, against a plain step through the same trunk.

Both train the client's half on the same rows, the trunk's half frozen, and are read in rounds of some steps: the proof
on made-up rows that a private round begins with is in its figure. Each pair is read as plain, private, plain. Memory is
the highest that the client's process has held, and the difference to the plain one's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.private_worker import PLAIN
from benchmarks.processes import Reading, trunk_server, worker
from benchmarks.report import Ratio, Report, Spread, Target
from benchmarks.workload import Workload

METHODS = ("book-keeping", "hooks", "ghost")
TIME_RATIO_LIMIT = 1.25
WIRE_RATIO_LIMIT = 1.01
WARM_UP_STEPS = 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.example_gradients", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--quick", action="store_true", help="few pairs: a sanity check, not a figure")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of each process")
    options = parser.parse_args(argv)
    pairs, steps = (3, 3) if options.quick else (8, 6)
    return report(measure(pairs, steps, options.threads), steps, options.threads).finish(options.json)


def measure(pairs: int, steps: int, threads: int) -> dict[str, list[Reading]]:
    """Readings by side; of the plain one, two for each of the others'."""
    readings: dict[str, list[Reading]] = {side: [] for side in (PLAIN, *METHODS)}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(name)
        model_dir = directory / "model"
        Workload().write_model(model_dir)
        address, trunk = stack.enter_context(trunk_server(model_dir, threads, directory))
        workers = {
            side: stack.enter_context(
                worker(model_dir, threads, address, trunk, module="benchmarks.private_worker", side=side)
            )
            for side in readings
        }
        for each in workers.values():
            each.read(WARM_UP_STEPS)
        for _ in range(pairs):
            for side in METHODS:
                readings[PLAIN].append(workers[PLAIN].read(steps))
                readings[side].append(workers[side].read(steps))
                readings[PLAIN].append(workers[PLAIN].read(steps))
    return readings


def report(readings: dict[str, list[Reading]], steps: int, threads: int) -> Report:
    found = Report(
        "example_gradients",
        f"{Workload()}; {threads} threads a process; cut (1, 1), the trunk's half frozen; rounds of {steps} steps",
    )
    plain = readings[PLAIN]
    for side, of_side in readings.items():
        seconds = Spread.of([reading.seconds / steps for reading in of_side])
        peak = max(reading.peak_bytes for reading in of_side)
        found.results.append(
            {
                "side": side,
                "step_s": seconds.median,
                "min": seconds.min,
                "max": seconds.max,
                "cpu_s": Spread.of([reading.cpu_seconds / steps for reading in of_side]).median,
                "peak_mib": peak / 2**20,
                "over_plain": (peak - max(reading.peak_bytes for reading in plain)) / 2**20,
                "wire_mib": _wire(of_side) / len(of_side) / steps / 2**20,
            }
        )
    for index, side in enumerate(METHODS):
        before, after = plain[2 * index :: 2 * len(METHODS)], plain[2 * index + 1 :: 2 * len(METHODS)]
        ratio = Ratio.of_pairs(_seconds(readings[side]), _seconds(before), _seconds(after))
        found.ratios[f"time_ratio_{side}"] = ratio
        if side == METHODS[0]:
            found.targets.append(Target.of_ratio(f"time_ratio_{side}", ratio, TIME_RATIO_LIMIT))
        wire = _wire(readings[side]) / _wire(plain[: len(readings[side])])
        found.targets.append(Target.at_most(f"wire_ratio_{side}", wire, WIRE_RATIO_LIMIT))
    return found


def _seconds(readings: list[Reading]) -> list[float]:
    return [reading.seconds for reading in readings]


def _wire(readings: list[Reading]) -> int:
    return sum(reading.sent_bytes + reading.received_bytes for reading in readings)


if __name__ == "__main__":
    sys.exit(main())
