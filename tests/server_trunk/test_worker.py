"""The one thread behind an event loop, and what happens to an answer that nobody waits for any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from server_trunk.worker import Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker("test")
    yield made
    made.close()


def test_calls_run_in_order_on_one_thread(worker: Worker) -> None:
    seen: list[tuple[int, str]] = []

    async def main() -> None:
        await asyncio.gather(
            *(worker.run(lambda n=n: seen.append((n, threading.current_thread().name))) for n in range(5))
        )

    asyncio.run(main())
    assert [number for number, _ in seen] == list(range(5))
    assert len({name for _, name in seen}) == 1


def test_an_error_reaches_the_caller(worker: Worker) -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(worker.run(lambda: 1 // 0))


@pytest.mark.parametrize("started", [True, False])
def test_what_a_cancelled_caller_acquired_is_released(worker: Worker, started: bool) -> None:
    running, go = threading.Event(), threading.Event()
    made: list[str] = []
    released: list[str] = []

    def make() -> str:
        running.set()
        go.wait(5)
        made.append("adapter")
        return "adapter"

    async def main() -> None:
        if not started:
            worker.submit(go.wait, 5)
        task = asyncio.create_task(worker.acquire(make, released.append))
        await asyncio.sleep(0.05)
        assert running.is_set() == started
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()
        await worker.run(lambda: None)
        await worker.run(lambda: None)

    asyncio.run(main())
    assert released == made
    assert bool(made) == started
