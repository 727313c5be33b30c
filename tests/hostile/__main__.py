"""Hostile clients against a trunk: `python -m tests.hostile` (or `make hostile`).

First fuzzed conversations in this process, for volume, then all attacks on a live trunk that takes whoever comes, some
fuzzed conversations over the wire among them, then impostors at one that wants certificates and tickets, while honest
clients train at each. It exits 1 where anything is not as it must be. The seed is printed; --seed plays it again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.hostile.attacks import ATTACKS
from tests.hostile.fuzz import Fuzz
from tests.hostile.impostors import LOCKED
from tests.hostile.stage import serving
from tests.hostile.storm import ABANDONED, Storm

OPEN = (*ATTACKS, *ABANDONED, "fuzz")
ALL = (*OPEN, *LOCKED)
FRAMES, SECONDS = 100_000, 20.0
QUICK_FRAMES, QUICK_SECONDS, QUICK_SCALE = 2_000, 2.0, 0.2


async def fuzzed(seed: int, frames: int) -> dict[str, Any]:
    """What came of at least so many fuzzed frames in this process."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        async with serving(Path(folder)) as (server, served):
            began_s, began_cpu_s = time.monotonic(), time.process_time()
            tally = await Fuzz(server, served, seed).run(frames, say)
            return {
                "frames": tally.frames,
                "conversations": tally.conversations,
                "honest": tally.honest,
                "ends": dict(tally.ends),
                "seconds": time.monotonic() - began_s,
                "cpu_seconds": time.process_time() - began_cpu_s,
                "faults": tally.faults,
            }


def stormed(seed: int, seconds: float, scale: float, attacks: Sequence[str], *, locked: bool = False) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        return Storm(Path(folder), seed, seconds, scale, say, locked).run(attacks)


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of all that is drawn; printed")
    parser.add_argument("--quick", action="store_true", help="a sanity check, not a figure")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--frames", type=int, help=f"fuzzed in this process ({FRAMES})")
    parser.add_argument("--seconds", type=float, help=f"of each attack ({SECONDS:g})")
    parser.add_argument("--attack", nargs="*", choices=ALL, default=ALL, help="which of them; none for fuzzing alone")
    options = parser.parse_args(argv)
    frames = options.frames if options.frames is not None else QUICK_FRAMES if options.quick else FRAMES
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    say(f"seed {options.seed}")
    found: dict[str, Any] = {"seed": options.seed}
    if frames:
        found["fuzz"] = asyncio.run(fuzzed(options.seed, frames))
    scale = QUICK_SCALE if options.quick else 1.0
    for part, those in (("storm", OPEN), ("locked", LOCKED)):
        if attacks := [name for name in options.attack if name in those]:
            found[part] = stormed(options.seed, seconds, scale, attacks, locked=part == "locked")
    faults = [fault for part in ("fuzz", "storm", "locked") if part in found for fault in found[part]["faults"]]
    sys.stdout.write(json.dumps(found) + "\n" if options.json else table(found))
    for fault in faults:
        say(f"fault: {fault}")
    return 1 if faults else 0


def table(found: dict[str, Any]) -> str:
    """What was seen, for people, in the form that docs/reliability.md has."""
    lines = []
    if "fuzz" in found:
        fuzz = found["fuzz"]
        lines.append(
            f"{fuzz['frames']} fuzzed frames in {fuzz['conversations']} conversations, {fuzz['honest']} honest ones "
            f"beside them: {_ends(fuzz['ends'])}; {len(fuzz['faults'])} faults"
        )
    for storm in (found[part] for part in ("storm", "locked") if part in found):
        quiet_ms = storm["phases"][0]["step_ms"]
        lines += ["| attack | what happened | peak MiB over base | an honest step | slowest |", "|---|---|---|---|---|"]
        for phase in storm["phases"]:
            lines.append(
                f"| {phase['name']} | {_ends(phase['ends'])} | {phase['peak_mib'] - storm['base']['rss_mib']:.0f} | "
                f"x {phase['step_ms'] / quiet_ms:.1f} | {phase['slowest_ms'] / 1000:.1f} s |"
            )
        lines.append(
            f"base {storm['base']['rss_mib']:.0f} MiB, budget {storm['budget_mib']}, constant {storm['constant_mib']}, "
            f"peak {storm['peak_mib']:.0f}; honest rounds {storm['honest_rounds']}; {len(storm['faults'])} faults"
        )
    return "\n".join(lines) + "\n"


def _ends(ends: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(ends.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    sys.exit(main())
