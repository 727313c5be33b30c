"""A reply that nobody took: what is dropped while it goes to the disk leaves nothing there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from contract.wire import CHUNK_BYTES
from server_trunk.memory import Hold, MemoryBudget, Spill, Spilled
from server_trunk.outgoing import Outgoing
from server_trunk.worker import Worker

DATA = bytes(range(256)) * (CHUNK_BYTES // 256) + b"the rest"


def reply() -> Outgoing:
    return Outgoing(None, memoryview(DATA), Hold(MemoryBudget(1)))


async def taken(out: Outgoing) -> list[bytes]:
    disk = Worker("disk")
    try:
        return [bytes(await out.next(disk)) for _ in range(3)]
    finally:
        disk.close()


def test_the_data_come_in_chunks_from_memory_and_from_disk(tmp_path: Path) -> None:
    spill = Spill(tmp_path, len(DATA))
    aside = reply()
    aside.put_aside(spill)
    assert spill.taken == len(DATA)
    expected = [DATA[:CHUNK_BYTES], DATA[CHUNK_BYTES:], b""]
    assert asyncio.run(taken(reply())) == asyncio.run(taken(aside)) == expected
    aside.drop()
    assert spill.taken == 0
    spill.close()


def test_what_is_dropped_while_it_goes_to_disk_leaves_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill = Spill(tmp_path, len(DATA))
    out = reply()
    append = Spilled.append

    def dropping(spilled: Spilled, data: memoryview) -> None:
        out.drop()
        append(spilled, data)

    monkeypatch.setattr(Spilled, "append", dropping)
    out.put_aside(spill)
    assert (spill.taken, list(spill.folder.iterdir())) == (0, [])
    assert asyncio.run(taken(out)) == [b"", b"", b""]
    spill.close()
