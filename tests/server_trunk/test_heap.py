"""What the C library kept of freed tensors goes back to the system, above a limit only."""

from __future__ import annotations

import threading

import psutil
import pytest
import torch

from server_trunk.heap import Heap

pytestmark = pytest.mark.skipif(Heap(0)._trim is None, reason="this C library has no malloc_trim")


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def fill_and_free() -> None:
    """Leaves about 100 MB of holes: blocks below what is mapped apart, each second one still in use."""
    blocks = [torch.ones(25_000) for _ in range(2_000)]
    kept = blocks[::2]
    del blocks
    del kept


def test_what_is_free_is_given_back_above_the_limit_and_kept_below() -> None:
    thread = threading.Thread(target=fill_and_free)
    thread.start()
    thread.join()
    grown = resident()
    Heap(2 * grown).trim()
    assert resident() > grown - (20 << 20)
    blocks = [torch.ones(25_000) for _ in range(2_000)]
    kept = blocks[-1]
    del blocks
    full = resident()
    Heap(1).trim()
    assert resident() < full - (100 << 20)
    del kept
