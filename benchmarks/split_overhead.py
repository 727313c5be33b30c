"""What the split costs one client: training through a trunk on loopback against un-split PEFT training.

Both sides train the same model on the same batch with the same number of threads. A pair is read as yardstick, split,
yardstick, so that a drift of the machine's speed shows in the yardstick's ratio to itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.processes import Order, Reading, training_workers, trunk_server
from benchmarks.report import Ratio, Report, Spread, Target
from benchmarks.workload import Workload

TIME_RATIO_LIMIT = 1.07
WARM_UP_STEPS = 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.split_overhead", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--quick", action="store_true", help="few pairs: a sanity check, not a figure")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of each process")
    options = parser.parse_args(argv)
    pairs, steps = (5, 2) if options.quick else (20, 4)
    readings = measure(pairs, steps, options.threads)
    return report(readings, steps, options.threads).finish(options.json)


def measure(pairs: int, steps: int, threads: int) -> dict[str, list[Reading]]:
    readings: dict[str, list[Reading]] = {"unsplit": [], "split": [], "unsplit_again": []}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model_dir = directory / "model"
        Workload().write_model(model_dir)
        with (
            trunk_server(model_dir, threads, directory) as (address, trunk),
            training_workers(1, model_dir, waits=False) as (unsplit,),
            training_workers(1, model_dir, waits=True, trunk=trunk) as (split,),
        ):
            alone, through = Order("unsplit", steps, threads), Order("split", steps, threads, address=address)
            unsplit.read(replace(alone, steps=WARM_UP_STEPS))
            split.read(replace(through, steps=WARM_UP_STEPS))
            for _ in range(pairs):
                readings["unsplit"].append(unsplit.read(alone))
                readings["split"].append(split.read(through))
                readings["unsplit_again"].append(unsplit.read(alone))
    return readings


def report(readings: dict[str, list[Reading]], steps: int, threads: int) -> Report:
    found = Report("split_overhead", f"{Workload()}; {threads} threads a process; cut (1, 1)")
    for side, of_side in readings.items():
        seconds = Spread.of([reading.seconds / steps for reading in of_side])
        cpu = Spread.of([reading.cpu_seconds / steps for reading in of_side])
        row = {"step_s": seconds.median, "step_s_min": seconds.min, "step_s_max": seconds.max}
        found.results.append({"side": side, **row, "cpu_s_per_step": cpu.median, "pairs": len(of_side)})
    seconds_of = {side: [reading.seconds for reading in of_side] for side, of_side in readings.items()}
    ratio = Ratio.of_pairs(seconds_of["split"], seconds_of["unsplit"], seconds_of["unsplit_again"])
    found.targets.append(Target.of_ratio("time_ratio", ratio, TIME_RATIO_LIMIT))
    found.ratios["time_ratio"] = ratio
    return found


if __name__ == "__main__":
    sys.exit(main())
