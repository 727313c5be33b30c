"""One attack in a process of its own: `python -m tests.hostile.attacker NAME TARGET_FILE SEED SECONDS SCALE`.

It goes on for its seconds and tells, as one line of JSON, how its calls ended. SCALE is a share of its full size.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from tests.hostile.attacks import ATTACKS, Attack
from tests.hostile.caller import Outcomes, Target, drawing
from tests.hostile.impostors import LOCKED


async def main(name: str, target_file: str, seed: str, seconds: str, scale: str) -> None:
    outcomes = Outcomes()
    attack = Attack(Target.read(Path(target_file)), drawing(int(seed), name), float(seconds), float(scale), outcomes)
    await {**ATTACKS, **LOCKED}[name](attack)
    sys.stdout.write(json.dumps({"ends": dict(outcomes.ends), "faults": outcomes.faults}) + "\n")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
