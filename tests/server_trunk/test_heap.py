"""What the C library kept of freed tensors goes back to the system, above a limit only."""

from __future__ import annotations

import psutil
import pytest
import torch

from server_trunk.heap import Heap

pytestmark = pytest.mark.skipif(Heap(0)._trim is None, reason="this C library has no malloc_trim")


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_what_is_free_is_given_back_above_the_limit() -> None:
    blocks = [torch.ones(25_000) for _ in range(2_000)]  # 200 MB, in blocks too small to be mapped apart
    kept = blocks[-1]
    del blocks
    full = resident()
    Heap(1).trim()
    assert resident() < full - (100 << 20)
    del kept


def test_it_is_kept_below(monkeypatch: pytest.MonkeyPatch) -> None:
    heap = Heap(resident() * 2)
    trimmed: list[int] = []
    monkeypatch.setattr(heap, "_trim", trimmed.append)
    heap.trim()
    assert not trimmed
    heap.limit = resident() // 2
    heap.trim()
    assert trimmed == [0]
