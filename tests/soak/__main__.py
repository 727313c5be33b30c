"""Simulations that are killed at random and resumed, for half an hour: `python -m tests.soak` (or `make soak`).

Passes where every run finished, the ledger verifies, no process is left, and the trunk's memory does not grow: the
upper end of its slope's interval stays below a bound, to which a soak of 15 minutes or more is held. The seed is
printed; it draws what is killed and when.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.clients.sites import save_site_model
from tests.soak.family import Reading
from tests.soak.simulation import Simulations
from tests.soak.trunk import SoakTrunk
from trunkline.processes import ending_signals_interrupt

SLOPE_LIMIT_MIB_MIN = 1.0
JUDGED_MIN = 10.0
"""Over fewer minutes a slope is told and not judged: what code and the first clients take would be most of it."""
MINUTES, CLIENTS = 30.0, 20


def soak(folder: Path, seed: int, minutes: float, clients: int) -> dict[str, Any]:
    """Play it; `faults` is empty where all is as it must be."""
    trunk = SoakTrunk(save_site_model(folder / "model"), folder)
    try:
        trunk.start()
        began_s = time.monotonic()
        played = Simulations(folder, folder / "model", trunk, clients, random.Random(seed), began_s + 60 * minutes, say)
        told = played.play()
        faults = [*told.faults, *_unfinished(played)]
        slope = trunk.slope()
        if slope is not None and slope.minutes >= JUDGED_MIN and slope.high > SLOPE_LIMIT_MIB_MIN:
            faults.append(f"the trunk's memory grows by up to {slope.high:.2f} MiB a minute")
    finally:
        trunk.stop()
    return {
        "seed": seed,
        "minutes": (time.monotonic() - began_s) / 60,
        "clients": clients,
        "runs": told.runs,
        "kills": dict(told.kills),
        "resumes": told.resumes,
        "trunk_slope": None if slope is None else asdict(slope),
        "slope_limit_mib_min": SLOPE_LIMIT_MIB_MIN,
        "trunk_lives": [_life(life) for life in trunk.lives],
        "orchestrators": [_life(life) for life in played.orchestrators.values()],
        "faults": faults,
    }


def _unfinished(played: Simulations) -> list[str]:
    """What is wrong with what all runs have left in SQL."""
    rows = played.ask("runs", "list", "--limit", "1000")
    found = [f"run {row['run_id']} is {row['status']}" for row in rows if row["status"] != "finished"]
    if len(rows) != played.told.runs:
        found.append(f"SQL knows {len(rows)} runs, {played.told.runs} were begun")
    verified = played.command("budget", "verify")
    if verified.returncode != 0:
        found.append(f"the ledger does not verify: {(verified.stdout + verified.stderr)[-500:]}")
    return found


def _life(life: Sequence[Reading]) -> dict[str, float]:
    if not life:
        return {}
    return {
        "minutes": (life[-1].at_s - life[0].at_s) / 60,
        "first_mib": life[0].rss_mib,
        "last_mib": life[-1].rss_mib,
        "peak_mib": max(one.rss_mib for one in life),
        "most_files": max(one.files for one in life),
        "last_files": life[-1].files,
    }


def say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of what is killed and when; printed")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"how long ({MINUTES:g})")
    parser.add_argument("--clients", type=int, default=CLIENTS, help=f"of each simulation ({CLIENTS})")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the logs, also where all is well")
    options = parser.parse_args(argv)
    say(f"seed {options.seed}")
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    with ending_signals_interrupt():
        found = soak(folder, options.seed, options.minutes, options.clients)
    sys.stdout.write(json.dumps(found) + "\n" if options.json else table(found))
    for fault in found["faults"]:
        say(f"fault: {fault}")
    if found["faults"] or options.keep:
        say(f"the logs are kept in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if found["faults"] else 0


def table(found: dict[str, Any]) -> str:
    kills = ", ".join(f"{count} {kind}" for kind, count in sorted(found["kills"].items())) or "none"
    slope, lives = found["trunk_slope"], found["trunk_lives"]
    grown = (
        "too short to tell"
        if slope is None
        else f"{slope['mib_per_min']:+.3f} MiB a minute ({slope['low']:+.3f} to {slope['high']:+.3f}) over the last "
        f"{slope['minutes']:.1f} minutes; the limit is {found['slope_limit_mib_min']:g}"
        f"{'' if slope['minutes'] >= JUDGED_MIN else ', to which so short a time is not held'}"
    )
    orchestrators = [one for one in found["orchestrators"] if one]
    peak = max((one["peak_mib"] for one in orchestrators), default=0.0)
    files = max((one["most_files"] for one in orchestrators), default=0)
    rows = (
        ("seed", found["seed"]),
        ("minutes, clients", f"{found['minutes']:.1f}, {found['clients']}"),
        ("runs finished", found["runs"]),
        ("kills", kills),
        ("resumed", found["resumes"]),
        ("trunk's memory", grown),
        (
            "trunk's lives, MiB first and last",
            "; ".join(f"{one['first_mib']:.0f}, {one['last_mib']:.0f}" for one in lives),
        ),
        ("trunk's open files, most and last", _each(lives, "most_files", "last_files")),
        ("orchestrators, highest MiB and files", f"{len(orchestrators)}: {peak:.0f}, {files}"),
        ("faults", len(found["faults"])),
    )
    return "".join(f"| {name} | {value} |\n" for name, value in rows)


def _each(lives: Sequence[dict[str, float]], *names: str) -> str:
    return "; ".join(", ".join(f"{one[name]:.0f}" for name in names) for one in lives if one)


if __name__ == "__main__":
    sys.exit(main())
