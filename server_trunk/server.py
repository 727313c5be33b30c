"""A trunk server from its options to its end: bind, load, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psutil
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from contract.durable_file import replace_file
from contract.errors import ConfigError, ConnectionFailedError, ListenError, StorageError
from contract.records import CutLayers
from contract.tls import TlsFiles
from contract.wire import message_limits
from server_trunk.access import RoleGate
from server_trunk.admin import AdminServicer
from server_trunk.contributions import Contributions
from server_trunk.door import Door, Doorkeeper
from server_trunk.engine import Engine, choose_device, load_trunk
from server_trunk.health import Health
from server_trunk.heap import Heap
from server_trunk.lane import Graph
from server_trunk.memory import MemoryBudget, Spill, choose_budget, parse_size
from server_trunk.periodic import PeriodicTask
from server_trunk.port import check_listen, require_free, transport_options
from server_trunk.probe import DEFAULT_BATCH_TOKENS, Findings, probe
from server_trunk.ranks import HEARTBEAT_S, Member, Ranks
from server_trunk.residents import Residents
from server_trunk.scheduler import Scheduler
from server_trunk.servicer import SERVICE, Limits, TrunkServicer, abort
from server_trunk.session_adapter import SessionAdapter
from server_trunk.sessions import SessionTable
from server_trunk.sharded_lane import Follower, ShardedLane
from server_trunk.tickets import TicketBook, open_renewal_key
from server_trunk.watch import Parts, Watch
from server_trunk.worker import Worker

logger = logging.getLogger("trunkline.server_trunk")

T = TypeVar("T")

_HANG_UP_S = 2.0
_TORCHRUN_GRACE_S = 20.0
"""torchrun kills its processes 30 s after it told them to end."""
_DRAIN_POLL_S = 0.05
_SWEEP_S = 5.0
_TRIM_S = 0.25
_DAY_S = 86_400.0
_RELIEF_POLL_S = 0.5
_FOR_PASSES, _FOR_WAITING, _FOR_ADAPTERS = 0.5, 0.3, 0.2
_FOR_CACHES = 0.1  # of _FOR_WAITING, what sample caches may take
_STRANGERS = 256  # calls at once that have not said yet what they want
_CONTROL_CALLS = 64  # calls at once beside the sessions: descriptions, uploads, commits, progress, health
_TURNED_AWAY = 1024  # calls that gRPC may hold until they have been told that there is no place for them


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How `trunkline trunk serve` was asked to serve. Times are in seconds; `threads` 0 leaves PyTorch's own number,
    `lanes` and `batch_tokens` 0 try out what is fastest here; `weights` "int8" quantises them, "" does not.

    With `tls` callers show certificates, which its `ca` vouches for; with `ticket_signers`, public keys of 32 bytes,
    sessions need tickets of theirs.
    """

    model: str
    cut: CutLayers
    listen: str
    state_dir: Path
    dtype: str = "float32"
    weights: str = ""
    attn_implementation: str = "sdpa"
    device: str = "auto"
    threads: int = 0
    lanes: int = 0
    batch_tokens: int = 0
    max_sessions: int = 64
    max_pending: int = 16
    pending_ttl_s: float = 600.0
    max_tokens: int = 32768
    memory_budget: str = "auto"
    sample_cache_mib: int = 64
    spill_budget: str = "16G"
    idle_timeout_s: float = 900.0
    grace_s: float = 30.0
    announce_file: Path | None = None
    insecure_listen: bool = False
    tls: TlsFiles | None = None
    ticket_signers: tuple[bytes, ...] = ()
    metrics: str = ""
    insecure_metrics: bool = False
    client_metrics: bool = False


class TrunkServer:
    """One serving trunk. Everything but the constructor runs on one event loop."""

    def __init__(self, options: ServeOptions) -> None:
        """Raises ConfigError for a listen address, device, announce file or limits that cannot be served."""
        self._options = options
        self._host, self._port = check_listen(
            options.listen,
            options.insecure_listen,
            tls=options.tls is not None,
            tickets=bool(options.ticket_signers),
        )
        self._credentials = None if options.tls is None else options.tls.server_credentials()
        self.watch = Watch(options.metrics, insecure=options.insecure_metrics, name_clients=options.client_metrics)
        choose_device(options.device)
        self._member = Member.told(os.environ)
        if self._member.size > 1 and options.lanes > 1:
            raise ConfigError(f"lanes is {options.lanes}; a trunk of several processes has one lane: leave it out")
        if self._member.size > 1 and options.weights:
            raise ConfigError(f"weights is {options.weights!r}; a trunk of several processes keeps them as they are")
        if options.announce_file is not None:
            _require_announceable(options.announce_file)
        self._spill_bytes = parse_size("spill-budget", options.spill_budget)
        if options.memory_budget != "auto":
            choose_budget(options.memory_budget, "cpu")
        self._first_lane = Worker("trunk-compute-1")
        self._disk = Worker("trunk-disk")
        self._health = Health()
        self._door = Door(_STRANGERS)
        self.told_to_end = asyncio.Event()
        self._cut_off_s = math.inf
        self._table: SessionTable[SessionAdapter, Graph] = SessionTable(
            options.max_sessions,
            options.max_pending,
            options.pending_ttl_s,
            time.monotonic,
        )

    async def start(self) -> tuple[str, str]:
        """Take the address, load the model, serve; answers "HOST:PORT" and what is served, in words.

        The address comes first, so that a busy port is told before a long load. Raises ListenError, ModelError,
        UnsupportedModelError, ConfigError, StorageError.
        """
        options, address = self._options, self._take_address()
        try:
            self.watch.begin()
            contributions = Contributions(options.state_dir)
            tickets = self._ticket_book()
            contributions.sweep()
            engine = await self._first_lane.run(self._load)
            found = await self._first_lane.run(self._try_out, engine)
        except BaseException:
            self.watch.end()
            await self._server.stop(None)
            raise
        self._workers = [self._first_lane, *(Worker(f"trunk-compute-{number}") for number in range(2, found.lanes + 1))]
        self._spill = Spill(options.state_dir, self._spill_bytes)
        budget = choose_budget(options.memory_budget, engine.device)
        if engine.device == "cpu" and options.memory_budget == "auto":
            budget //= engine.processes  # each keeps the graphs of the same passes, on this machine's memory
        self._scheduler = Scheduler(
            list(zip(engine.lanes[: found.lanes], self._workers, strict=True)),
            threads=engine.threads,
            batch_tokens=found.batch_tokens,
            graph_bytes=engine.meter.estimate,
            transient_bytes=engine.meter.transient,
            pass_bytes=int(budget * _FOR_PASSES),
            residents=Residents(int(budget * _FOR_ADAPTERS), self._spill.folder, budget),
            observe=self.watch.passed,
        )
        memory = MemoryBudget(int(budget * _FOR_WAITING))
        self.watch.serving(Parts(engine, self._table, self._scheduler, memory, self._spill))
        self._servicer = TrunkServicer(
            engine,
            self._table,
            contributions,
            Limits(options.max_tokens, options.idle_timeout_s, options.sample_cache_mib << 20, found.autocast_dtype),
            scheduler=self._scheduler,
            first_lane=self._first_lane,
            disk=self._disk,
            memory=memory,
            cache_memory=MemoryBudget(int(budget * _FOR_CACHES)),
            spill=self._spill,
            door=self._door,
            tickets=tickets,
            watch=self.watch,
        )
        self._server.add_generic_rpc_handlers((self._servicer.handler(),))
        self._server.add_generic_rpc_handlers((AdminServicer(self._table, self.end_within).handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        # Of a GPU's budget this process's own memory is no part.
        heap = Heap(psutil.Process().memory_info().rss + budget if engine.device == "cpu" else sys.maxsize)
        self._periodic = (
            PeriodicTask("the sweep of old graphs", min(_SWEEP_S, options.pending_ttl_s / 4), self._sweep),
            PeriodicTask("making room for who waits", _RELIEF_POLL_S, self._servicer.relieve),
            PeriodicTask("giving back free memory", _TRIM_S, partial(self._disk.run, heap.trim)),
            PeriodicTask("the sweep of the state directory", _DAY_S, partial(self._disk.run, contributions.sweep)),
        )
        self._sharded = [lane for lane in engine.lanes if isinstance(lane, ShardedLane)]
        self._beating = asyncio.create_task(self._beat())
        return address, f"{engine.summary()} {found.summary()}"

    def end(self) -> None:
        """Have the trunk end as the options say: open sessions get their grace period, or the rest of a shorter one.

        torchrun's own patience bounds it.
        """
        grace_s = self._options.grace_s if self._member.size == 1 else min(self._options.grace_s, _TORCHRUN_GRACE_S)
        self._cut_off_s = min(self._cut_off_s, time.monotonic() + grace_s)
        self.told_to_end.set()

    def end_within(self, grace_s: float) -> None:
        """Admit no more sessions from now on, and end once the open ones have, or in `grace_s` seconds.

        The last call decides, also while the trunk drains already.
        """
        self._table.stop_admitting()
        self._cut_off_s = time.monotonic() + grace_s
        self.told_to_end.set()

    async def drain(self, hurry: asyncio.Event) -> None:
        """Admit no more sessions, let the open ones finish until they are cut off (or until `hurry`), then stop."""
        self._table.stop_admitting()
        await self._health.enter_graceful_shutdown()
        if not self.told_to_end.is_set():
            self.end()
        logger.warning(
            "draining for up to %.0f s; signal again to stop now", max(0.0, self._cut_off_s - time.monotonic())
        )
        while self._table.taken and time.monotonic() < self._cut_off_s and not hurry.is_set():
            await asyncio.sleep(_DRAIN_POLL_S)
        if self._table.taken:
            logger.warning("%d sessions were still open and are cut off", self._table.taken)
        await self.stop()

    async def stop(self) -> None:
        """Cut off what is open with UNAVAILABLE and give the threads back."""
        for one in (*self._periodic, self._beating):
            one.cancel()
        self._servicer.hang_up()
        await self._server.stop(_HANG_UP_S)
        await self._scheduler.close()
        for lane in self._sharded:
            try:
                await self._first_lane.run(lane.end)
            except ConnectionFailedError as error:
                logger.warning("the other processes could not be told to end: %s", error)
        for worker in (*self._workers, self._disk):
            worker.close()
        self._spill.close()
        self.watch.end()

    def _take_address(self) -> str:
        """HOST:PORT of the server that is made here. Raises ListenError."""
        options, credentials = self._options, self._credentials
        self._server = grpc.aio.server(
            options=[*message_limits(), *transport_options(options.max_sessions + _CONTROL_CALLS)],
            maximum_concurrent_rpcs=options.max_sessions + _STRANGERS + _CONTROL_CALLS + _TURNED_AWAY,
            interceptors=[Doorkeeper(self._door, abort), *([] if credentials is None else [RoleGate()])],
        )
        host = f"[{self._host}]" if ":" in self._host else self._host
        require_free(self._host, self._port)
        address = f"{host}:{self._port}"
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ListenError(f"cannot listen on {options.listen}: {error}") from error
        return f"{host}:{port}"

    def _ticket_book(self) -> TicketBook | None:
        options = self._options
        if not options.ticket_signers:
            return None
        return TicketBook(options.ticket_signers, open_renewal_key(options.state_dir))

    def _load(self) -> Engine:
        options = self._options
        if options.threads:
            torch.set_num_threads(options.threads)
        ranks = Ranks(self._member, choose_device(options.device)) if self._member.size > 1 else None
        return Engine(
            options.model,
            options.cut,
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
            device=options.device,
            lanes=options.lanes,
            weights=options.weights,
            ranks=ranks,
        )

    def _try_out(self, engine: Engine) -> Findings:
        options = self._options
        if options.batch_tokens or engine.processes > 1:  # a pass that the others are not told of would never end
            return Findings(options.batch_tokens or DEFAULT_BATCH_TOKENS, len(engine.lanes), "")
        found = probe(engine.lanes, engine.threads)
        return replace(found, lanes=len(engine.lanes)) if options.lanes else found

    async def _sweep(self) -> None:
        freed = self._table.sweep()
        if freed:
            logger.info("freed %d graphs that waited too long for their backward", freed)

    async def _beat(self) -> None:
        """Lets the other processes of this trunk know, while nobody computes, that they are still wanted."""
        while self._sharded:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                for lane in self._sharded:
                    await self._first_lane.run(lane.beat)
            except ConnectionFailedError as error:
                logger.error("%s", error)
                return


def follow(options: ServeOptions, member: Member) -> None:
    """Compute as another process of this trunk tells, until it sends this one home.

    Raises ModelError, UnsupportedModelError, ConfigError; ConnectionFailedError when another process is lost.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    ranks = Ranks(member, device)
    for signum in (signal.SIGTERM, signal.SIGINT):  # from here on the leader hears them, and is heard when it ends
        signal.signal(signum, signal.SIG_IGN)
    model = load_trunk(options.model, options.cut, options.dtype, options.attn_implementation, device, member.size)
    Follower(model, options.cut, device, ranks).follow()


async def serve(options: ServeOptions, on_ready: Callable[[str], None]) -> bool:
    """Serve until SIGTERM, Ctrl-C or an operator tells it to end, then drain; a second signal ends the grace period.

    `on_ready` is called with HOST:PORT and what is served once clients can come and the announce file is there.
    False when a signal came before that: the thread that loads the model may still run, and cannot be stopped.
    """
    server = TrunkServer(options)
    ending, hurry = server.told_to_end, asyncio.Event()
    signalled = asyncio.Event()

    def end() -> None:
        if signalled.is_set():
            hurry.set()
        signalled.set()
        server.end()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, end)
    started = await _unless(ending, server.start())
    if started is None:
        return False
    address, summary = started
    try:
        if options.announce_file is not None:
            _announce(options.announce_file, address)
        on_ready(f"{address} {summary}")
    except BaseException:
        await server.stop()
        raise
    await ending.wait()
    await server.drain(hurry)
    return True


async def _unless(told: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The answer of `work`, or what it raised; None, and `work` is cancelled, when `told` is set first."""
    working, telling = asyncio.create_task(work), asyncio.create_task(told.wait())
    try:
        await asyncio.wait((working, telling), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, telling):
            task.cancel()
        await asyncio.wait((working, telling))


def _require_announceable(path: Path) -> None:
    """Raise ConfigError for an announce file that could not be written after a long load."""
    if path.is_dir():
        raise ConfigError(f"announce-file {path} is a folder; it must be a file")
    if not path.parent.is_dir():
        raise ConfigError(f"announce-file {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"announce-file {path}: the folder {path.parent} cannot be written to")


def _announce(path: Path, address: str) -> None:
    """Write `address` to `path`, whole or not at all. Raises StorageError."""
    try:
        replace_file(path, f"{address}\n".encode())
    except OSError as error:
        raise StorageError(f"announce-file {path} cannot be written: {error.strerror}") from error
