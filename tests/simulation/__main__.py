"""Plays seeds of the simulation: `python -m tests.simulation --seeds 200`, or `make simulate`.

Exits 1 where a seed went wrong, and says which, why, and the command that plays it again to the same trace.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from tests.simulation.seeds import Tally, outcomes, told
from tests.simulation.weather import plan_of
from tests.simulation.world import RARE, judged, surroundings

ENOUGH = 200
"""So many seeds must bring everything that comes up often."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed; the others follow it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many processes play them")
    parser.add_argument("--trace", action="store_true", help="print all that happened in each seed")
    options = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be 1 or more")
    if options.trace:
        return _trace(range(options.first, options.first + options.seeds))
    tally, began_s = Tally(), time.monotonic()
    try:
        for outcome in outcomes(range(options.first, options.first + options.seeds), min(options.jobs, options.seeds)):
            tally.add(outcome)
            if outcome.wrong:
                _say(told(outcome))
            if tally.seeds % 50 == 0:
                _say(f"{tally.seeds} seeds in {time.monotonic() - began_s:.0f} s, {len(tally.failed)} wrong")
    except KeyboardInterrupt:
        _say(f"interrupted: {options.seeds - tally.seeds} seeds were not played")
    return _sum_up(tally, options.first, time.monotonic() - began_s)


def _sum_up(tally: Tally, first: int, seconds: float) -> int:
    _say(
        f"{tally.seeds} seeds from {first} in {seconds:.0f} s: {tally.lives} orchestrators, "
        f"{tally.commits} rounds committed, {tally.virtual_s / 3600:.1f} virtual hours"
    )
    for name in RARE:
        _say(f"    {name}: in {tally.met[name]} seeds")
    missing = tally.missing if tally.seeds >= ENOUGH else []
    if missing:
        _say(f"never came up, so that nothing of it was tested: {', '.join(missing)}")
    wrong = [outcome.seed for outcome in tally.failed]
    _say(f"{len(wrong)} seeds are wrong" + (f": {', '.join(map(str, wrong))}" if wrong else ""))
    return 1 if wrong or missing else 0


def _trace(seeds: Sequence[int]) -> int:
    """Play seeds once each and print everything."""
    wrong = False
    with surroundings() as around:
        for seed in seeds:
            plan = plan_of(seed)
            _say(f"seed {seed}: {len(plan.sites)} sites, {dict(plan.settings)}, {plan.weather}")
            outcome = judged(around, seed)
            _say("\n".join(outcome.trace))
            _say(f"seed {seed}: trace {outcome.trace_sha256}; {'; '.join(outcome.wrong) or 'nothing is wrong'}")
            wrong = wrong or bool(outcome.wrong)
    return 1 if wrong else 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
