"""A site's process keeps what one step frees for the next: counted in page faults, not in seconds."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from tests.deploy.command_lines import ROOT

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")

# Tensors of 4 MiB, twelve at once, freed before the next twelve are made: as steps do.
STEPS = """
import resource
import sys
from clients.heap import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
def step():
    held = [bytearray(4 << 20) for _ in range(12)]
    held.clear()
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how],
        env={"PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(done.stdout)


def test_steps_after_the_first_take_no_fresh_pages() -> None:
    fresh = 10 * 12 * (4 << 20) // 4096
    assert faults("as it comes") > fresh // 4
    assert faults("kept") < fresh // 100


def test_what_the_operator_says_stays() -> None:
    assert faults("kept", MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072") > 100_000
