"""The trunk's memory: resident bytes of a real trunk for 1 to 256 clients, and a flood of clients on a small budget.

Each number of clients has a trunk process of its own. All clients open their sessions, then all at once take two steps
each; the second needs what the first left. `peak_mib` is the highest resident size in that window, read every 20 ms;
`base_mib` what the trunk had before the first client; `adapters_mib` what all clients' adapters, gradients and AdamW
moments would take together; `constant_mib` the rest of the peak, below zero where idle clients' state was evicted.
`longest_answer_s` is the longest that a client waited for an answer: a client gives up after some minutes.
`rss_ratio_256` is the peak of 256 clients over that of one. Peaks are not averaged: a trunk that is killed is dead.

In the flood as many rude clients as honest ones send forwards whose backward never comes, do not read the answers, stop
in the middle of a tensor, or hang up, while the honest ones take their steps. `flood_unfinished` is how many honest
clients did not finish; a trunk that no longer answers has finished none.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from benchmarks.frame_client import FrameClient, Payload
from benchmarks.processes import trunk_server
from benchmarks.report import Cell, Report, Target
from benchmarks.workload import Workload
from contract.errors import TrunklineError

RSS_RATIO_LIMIT = 1.3
COUNTS, QUICK_COUNTS = (1, 8, 64, 256), (1, 8)
STEPS = 2
RUDE_FORWARDS = 4
SAMPLE_S = 0.02
WINDOW_LIMIT_S = 900.0
MIB = 1 << 20


@dataclass(slots=True)
class Peak:
    rss_bytes: int = 0


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    found = Report(
        "memory",
        f"{Workload()}; cut (1, 1); every client at once, {STEPS} steps each; "
        f"memory budget {options.budget}, of the flood {options.flood_budget}",
    )
    peaks: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as name:
        directory, model_dir = Path(name), Path(name) / "model"
        Workload().write_model(model_dir)
        payload = Payload(model_dir, Workload())
        for clients in options.clients:
            with _trunk(model_dir, directory, clients, options.budget) as (address, trunk):
                peaks[clients] = add_window(found, payload, address, trunk, clients)
        flood_flags = (options.flood_budget, "--pending-ttl-s", "5")
        with _trunk(model_dir, directory, 2 * options.flood, *flood_flags) as (address, trunk):
            add_flood(found, payload, address, trunk, options.flood)
    if {1, 256} <= peaks.keys():
        found.targets.append(Target.at_most("rss_ratio_256", peaks[256] / peaks[1], RSS_RATIO_LIMIT))
    return found.finish(options.json)


def add_window(found: Report, payload: Payload, address: str, trunk: psutil.Process, clients: int) -> int:
    """The row of `clients` clients to `found`; answers their peak in bytes."""
    base = trunk.memory_info().rss
    began_s = time.perf_counter()
    with _sampled(trunk) as peak:
        done, longest_s = asyncio.run(_window(address, payload, clients))
    adapters = clients * 4 * payload.adapter_bytes  # weights, gradients, and AdamW's two moments
    found.results.append(
        _row("window", clients, base, peak.rss_bytes, trunk.memory_info().rss, adapters, time.perf_counter() - began_s)
        | {"longest_answer_s": longest_s, "unfinished": clients - done}
    )
    found.targets.append(Target.at_most(f"unfinished_{clients}", clients - done, 0))
    return peak.rss_bytes


def add_flood(found: Report, payload: Payload, address: str, trunk: psutil.Process, honest: int) -> None:
    base = trunk.memory_info().rss
    began_s = time.perf_counter()
    with _sampled(trunk) as peak:
        done = asyncio.run(_flood(address, payload, honest))
    after = trunk.memory_info().rss if trunk.is_running() else 0
    adapters = 2 * honest * 4 * payload.adapter_bytes
    found.results.append(
        _row("flood", 2 * honest, base, peak.rss_bytes, after, adapters, time.perf_counter() - began_s)
        | {"unfinished": honest - done}
    )
    found.targets.append(Target.at_most("flood_unfinished", honest - done, 0))


def _row(part: str, clients: int, base: int, peak: int, after: int, adapters: int, seconds: float) -> dict[str, Cell]:
    return {
        "part": part,
        "clients": clients,
        "base_mib": base / MIB,
        "peak_mib": peak / MIB,
        "after_mib": after / MIB,
        "adapters_mib": adapters / MIB,
        "constant_mib": (peak - base - adapters) / MIB,
        "seconds": seconds,
    }


async def _window(address: str, payload: Payload, clients: int) -> tuple[int, float]:
    """How many of `clients` took all their steps, and the longest that any of them waited for an answer."""
    client = FrameClient(address, payload)
    await client.start()
    try:
        sessions = [await client.open() for _ in range(clients)]

        async def steps(number: int) -> None:
            for _ in range(STEPS):
                await sessions[number].step()

        done = await _finished(steps(number) for number in range(clients))
        return done, max(session.longest_s for session in sessions)
    finally:
        await client.close()


async def _flood(address: str, payload: Payload, honest: int) -> int:
    """How many of `honest` clients took all their steps beside as many rude ones; 0 when the trunk is gone."""
    client, crowd = FrameClient(address, payload), FrameClient(address, payload)
    await client.start()
    await crowd.start()

    async def steps() -> None:
        session = await client.open()
        for _ in range(STEPS):
            await session.step()

    async def rude(number: int) -> None:
        session = await crowd.open()
        for _ in range(RUDE_FORWARDS):
            await session.ask_forward()
        if number % 3 == 0:
            session.hang_up()
        elif number % 3 == 1:
            await session.ask_forward(whole=False)

    crowded = [asyncio.ensure_future(_ended(rude(number))) for number in range(honest)]
    try:
        done = await _finished(steps() for _ in range(honest))
        try:
            await client.describe()
        except grpc.aio.AioRpcError:
            done = 0
        return done
    finally:
        for task in crowded:
            task.cancel()
        await crowd.close()
        await client.close()


async def _finished(work: Iterable[Awaitable[None]]) -> int:
    """How much of `work`, done at once, came to a good end within WINDOW_LIMIT_S; why not goes to stderr, once."""
    tasks = [asyncio.ensure_future(_ended(one)) for one in work]
    done, late = await asyncio.wait(tasks, timeout=WINDOW_LIMIT_S)
    for task in late:
        task.cancel()
    reasons = [task.result() for task in done if task.result()] + (["took too long"] if late else [])
    if reasons:
        sys.stderr.write(f"{len(reasons)} of {len(tasks)} clients did not finish, the first: {reasons[0]}\n")
    return sum(not task.result() for task in done)


async def _ended(work: Awaitable[None]) -> str:
    """Why `work` failed, or nothing."""
    try:
        await work
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    except (TrunklineError, asyncio.InvalidStateError) as error:
        return str(error) or type(error).__name__
    return ""


@contextmanager
def _trunk(
    model_dir: Path, directory: Path, clients: int, budget: str, *flags: str
) -> Iterator[tuple[str, psutil.Process]]:
    sessions = str(max(64, clients))
    with trunk_server(model_dir, 0, directory, "--max-sessions", sessions, "--memory-budget", budget, *flags) as served:
        yield served


@contextmanager
def _sampled(process: psutil.Process) -> Iterator[Peak]:
    """The highest resident size of `process` within the block."""
    peak, over = Peak(process.memory_info().rss), threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_S):
            try:
                peak.rss_bytes = max(peak.rss_bytes, process.memory_info().rss)
            except psutil.NoSuchProcess:
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--quick", action="store_true", help="few clients: a sanity check, not a figure")
    parser.add_argument("--clients", type=int, nargs="+", help=f"how many, in place of {COUNTS}")
    parser.add_argument("--budget", default="384MiB", help="the trunk's --memory-budget (384MiB)")
    parser.add_argument("--flood-budget", default="384MiB", help="the same for the flood (384MiB)")
    options = parser.parse_args(argv)
    options.flood = 4 if options.quick else 48
    options.clients = options.clients or (QUICK_COUNTS if options.quick else COUNTS)
    if min(options.clients) < 1:
        parser.error(f"--clients {min(options.clients)}: there must be one at least")
    return options


if __name__ == "__main__":
    sys.exit(main())
