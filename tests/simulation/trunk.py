"""A trunk's process: its contributions and adapters are the real ones, on its disk; what it computes is left out.

Sessions and counters are in its memory, and gone with it. The orchestrator's calls come by a gRPC channel of paper.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import grpc

from contract import trunk_pb2 as pb
from contract import wire
from contract.errors import ConnectionFailedError, SessionError, TrunklineError
from contract.records import CutLayers, RoundKey
from server_trunk.contributions import Contributions
from server_trunk.sessions import SessionTable
from tests.simulation.kernel import Kernel, KilledError, Process
from tests.simulation.network import Network

FINGERPRINT = "f" * 64
CUT = CutLayers(1, 1)
ADDRESS = "127.0.0.1:50051"
_HANG_S = 9.0


@cache
def _description() -> pb.TrunkDescription:
    model = wire.model_agreement(FINGERPRINT, CUT, "float32", "sdpa")
    return pb.TrunkDescription(protocol=wire.PROTOCOL, model=model, layers=3, hidden_size=8)


class CallError(grpc.RpcError):
    """How a gRPC call ends that was not answered, or answered by an error that the trunk named."""

    def __init__(self, code: grpc.StatusCode, details: str, named: str = "") -> None:
        super().__init__(details)
        self._code, self._details, self._named = code, details, named

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ((wire.ERROR_KEY, self._named),) if self._named else ()


@dataclass
class TrunkHost:
    """The machine that the trunk runs on: it starts it again whenever it was killed."""

    kernel: Kernel
    network: Network
    state_dir: Path
    process: Process = field(init=False)
    contributions: Contributions = field(init=False)
    counters: dict[RoundKey, list[int]] = field(init=False)
    table: SessionTable[Any, Any] = field(init=False)
    starts: int = 0

    def __post_init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.starts += 1
        self.kernel.say(f"trunk {self.starts} starts")
        self.process = Process(f"trunk {self.starts}", self._visit)
        self.contributions = Contributions(self.state_dir)
        self.counters = {}
        self.table = SessionTable(1, 1, 1.0, lambda: self.kernel.now_s)

    def _visit(self, place: str) -> None:
        self.kernel.say(f"{self.process.name} {place}")
        if self.network.strikes(self.network.weather.trunk_killed):
            self.kernel.at(self.network.rng.uniform(1.0, 15.0), self._start_again)
            self.kernel.die_at(place)
        self.network.spoil_disk(place)

    def _start_again(self) -> None:
        if self.network.strikes(self.network.weather.trunk_wiped):
            self.kernel.say("the trunk's disk is lost")
            shutil.rmtree(self.state_dir)
        self._start()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """The block is done by the trunk's process; ConnectionFailedError where it is not there, or dies of it."""
        if not self.process.alive:
            raise ConnectionFailedError("nothing answers at the trunk's address")
        with self.kernel.acting_as(self.process):
            try:
                yield
            except KilledError:
                raise ConnectionFailedError("the trunk's connection broke") from None

    def count(self, key: RoundKey, *, sessions: int = 0, steps: int = 0, tokens: int = 0) -> None:
        counters = self.counters.setdefault(key, [0] * 5)
        for place, more in enumerate((sessions, steps, tokens, 100 * steps, 100 * steps)):
            counters[place] += more


@dataclass
class Session:
    """One site's session with the trunk, for one round; lost where the trunk starts anew."""

    host: TrunkHost
    site: str
    key: RoundKey
    who: str
    base_sha256: str
    started: int

    @classmethod
    def open(cls, host: TrunkHost, site: str, key: RoundKey, who: str, base_sha256: str) -> Session:
        session = cls(host, site, key, who, base_sha256, host.starts)
        with session._asking():
            host.contributions.require_adapter(base_sha256)
            host.count(key, sessions=1)
        return session

    def step(self, tokens: int) -> None:
        with self._asking():
            self.host.count(self.key, steps=1, tokens=tokens)

    def base(self) -> bytes:
        """The trunk's half that the session started from."""
        with self._asking():
            return self.host.contributions.adapters.get(self.base_sha256)

    def contribute(self, trained_tokens: int, adapter: bytes) -> None:
        """Close the session; what it trained is durable when this returns, and may be when it raises."""
        network = self.host.network
        with self._asking():
            self.host.contributions.add(self.key, self.who, self.base_sha256, trained_tokens, adapter)
        if network.strikes(network.weather.call_ack_lost):
            raise ConnectionFailedError("the trunk's answer to the close was lost")

    @contextmanager
    def _asking(self) -> Iterator[None]:
        network = self.host.network
        if network.held_s(self.site, "trunk") or network.strikes(network.weather.call_lost):
            raise ConnectionFailedError("the trunk is out of reach")
        if self.host.process.alive and self.host.starts != self.started:
            raise SessionError("this trunk knows of no such session")
        if self.host.process.alive:
            self.host.table.require_going_on(self.key)
        with self.host.serving():
            yield


class TrunkChannel:
    """A grpc.Channel to the trunk, for the process that asks: calls take time, fail, and lose their answers."""

    def __init__(self, host: TrunkHost, caller: str, excused: Callable[[float], None]) -> None:
        """`caller` is cut off as a site is; `excused` is told of seconds that a call hung by the network's doing."""
        self._host = host
        self._caller = caller
        self._excused = excused

    def unary_unary(self, method: str, **serialisers: Any) -> Callable[..., Any]:
        return partial(self._call, method.rpartition("/")[2])

    def stream_unary(self, method: str, **serialisers: Any) -> Callable[..., Any]:
        return partial(self._call, method.rpartition("/")[2])

    def unary_stream(self, method: str, **serialisers: Any) -> Callable[..., Any]:
        return partial(self._call, method.rpartition("/")[2])

    def stream_stream(self, method: str, **serialisers: Any) -> Callable[..., Any]:
        return partial(self._call, method.rpartition("/")[2])

    def close(self) -> None:
        """Nothing is held."""

    def _call(self, name: str, request: Any, timeout: float | None = None, **more: Any) -> Any:
        network, kernel = self._host.network, self._host.kernel
        kernel.sleep(network.rng.uniform(0.001, 0.02))
        unreachable = network.held_s(self._caller, "driver-trunk") > 0.0
        if unreachable or network.strikes(network.weather.call_lost):
            if network.rng.random() < 0.3:
                hangs_s = min(timeout or _HANG_S, _HANG_S)
                self._excused(hangs_s)
                kernel.sleep(hangs_s)
                raise CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "")
            raise CallError(grpc.StatusCode.UNAVAILABLE, "")
        try:
            with self._host.serving():
                reply = self._serve(name, request)
        except ConnectionFailedError as error:
            raise CallError(grpc.StatusCode.UNAVAILABLE, str(error)) from None
        except TrunklineError as error:
            raise CallError(grpc.StatusCode.INTERNAL, str(error), type(error).__name__) from None
        if network.strikes(network.weather.call_ack_lost):
            raise CallError(grpc.StatusCode.UNAVAILABLE, "the answer was lost")
        kernel.sleep(network.rng.uniform(0.001, 0.02))
        return reply

    def _serve(self, name: str, request: Any) -> Any:
        answers: Mapping[str, Callable[[Any], Any]] = {
            "Describe": self._describe,
            "PutAdapter": self._put,
            "GetAdapter": self._get,
            "CommitRound": self._commit,
            "Progress": self._progress,
            "EndBefore": self._end_before,
        }
        return answers[name](request)

    def _describe(self, request: pb.DescribeRequest) -> pb.TrunkDescription:
        return _description()

    def _put(self, chunks: Iterable[pb.AdapterChunk]) -> pb.AdapterReceipt:
        data = b"".join(chunk.data for chunk in chunks)
        return pb.AdapterReceipt(sha256=self._host.contributions.adapters.put(data))

    def _get(self, request: pb.GetAdapterRequest) -> Iterator[pb.AdapterChunk]:
        self._host.contributions.require_adapter(request.sha256)
        data = self._host.contributions.adapters.get(request.sha256)
        return iter([pb.AdapterChunk(sha256=request.sha256, size_bytes=len(data), data=data)])

    def _commit(self, request: pb.CommitRoundRequest) -> pb.CommitRoundReply:
        key = wire.round_from_wire(request.round)
        self._host.kernel.say(f"the trunk averages {key.round}.{key.attempt} over {list(request.survivors)}")
        found = self._host.contributions.commit(key, request.base_sha256, list(request.survivors))
        return pb.CommitRoundReply(adapter_sha256=found.adapter_sha256, trained_tokens=found.trained_tokens)

    def _end_before(self, request: pb.RoundId) -> pb.EndBeforeReply:
        key = wire.round_from_wire(request)
        self._host.kernel.say(f"the trunk ends what is before {key.round}.{key.attempt}")
        self._host.table.end_before(key)
        return pb.EndBeforeReply()

    def _progress(self, request: pb.RoundId) -> pb.ProgressReply:
        found = self._host.counters.get(wire.round_from_wire(request), [0] * 5)
        names = ("sessions", "steps", "tokens", "received_bytes", "sent_bytes")
        return pb.ProgressReply(**dict(zip(names, found, strict=True)))
