"""What a soak reads off its samples, and how it tells processes apart; `make soak` plays one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.soak.__main__ import SLOPE_LIMIT_MIB_MIN, table
from tests.soak.family import Reading, carrying, kill, role, those
from tests.soak.trunk import SoakTrunk


def lived(mib_per_min: float, minutes: float) -> SoakTrunk:
    """A trunk whose memory wavers by 5 MiB, grows at first, and then by so much."""
    draw = random.Random(1)
    life = [
        Reading(float(second), 400 + min(second, 60) + mib_per_min * second / 60 + draw.uniform(0, 5), 20)
        for second in range(int(60 * minutes))
    ]
    return SoakTrunk(Path("model"), Path("folder"), [[Reading(0.0, 900.0, 3)], life])


@pytest.mark.parametrize("grows", [0.0, 0.5, 5.0])
def test_the_slope_is_that_of_the_last_lifes_last_two_thirds(grows: float) -> None:
    slope = lived(grows, 20).slope()
    assert slope is not None
    assert slope.low <= grows <= slope.high
    assert slope.high - slope.low < 0.2
    assert slope.minutes == pytest.approx(20 * 2 / 3, rel=0.01)
    assert (slope.high <= SLOPE_LIMIT_MIB_MIN) == (grows < SLOPE_LIMIT_MIB_MIN)


def test_a_life_that_was_too_short_has_no_slope() -> None:
    assert lived(0.0, 0.5).slope() is None


def test_processes_of_a_home_are_found_told_apart_and_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "TRUNKLINE_HOME": str(tmp_path)}
    sleeping = "import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", sleeping, "flwr-simulation"], env=environment)
    other = subprocess.Popen([sys.executable, "-c", sleeping, "flower-superlink"], env=environment)
    try:
        deadline = time.monotonic() + 20
        while len(carrying(tmp_path)) < 2:
            assert time.monotonic() < deadline
        assert [one.pid for one in those(tmp_path, "orchestrator")] == [process.pid]
        assert role(psutil.Process(other.pid)) == "superlink"
        assert carrying(tmp_path / "elsewhere") == []
        assert kill(psutil.Process(process.pid))
        process.wait(20)
        assert those(tmp_path, "orchestrator") == []
    finally:
        for one in (process, other):
            one.kill()
            one.wait()


def test_a_soak_is_told_as_a_table() -> None:
    life = {
        "minutes": 20.0,
        "first_mib": 400.0,
        "last_mib": 410.0,
        "peak_mib": 430.0,
        "most_files": 30,
        "last_files": 20,
    }
    found = {
        "seed": 7,
        "minutes": 30.5,
        "clients": 20,
        "runs": 9,
        "kills": {"trunk": 2, "orchestrator": 3},
        "resumes": 4,
        "trunk_slope": {"mib_per_min": 0.01, "low": -0.02, "high": 0.05, "minutes": 20.0},
        "slope_limit_mib_min": 1.0,
        "trunk_lives": [life],
        "orchestrators": [life, {}],
        "faults": ["x"],
    }
    told = table(found)
    assert "| kills | 3 orchestrator, 2 trunk |" in told
    assert "+0.010 MiB a minute (-0.020 to +0.050) over the last 20.0 minutes; the limit is 1" in told
    assert "| faults | 1 |" in told
    assert "too short to tell" in table({**found, "trunk_slope": None})
