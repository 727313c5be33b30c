"""A gRPC connection to a trunk: its description, and one stream of frames in which every wait is bounded."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc

from clients.wire_log import WireLog
from contract import traces, wire
from contract.addresses import split_address
from contract.errors import (
    ConnectionFailedError,
    DeadlineError,
    FrameError,
    FrameTooLargeError,
    SessionError,
    TrunklineError,
    error_named,
)
from contract.failpoint import failpoint
from contract.tls import TlsFiles, open_channel, told_failure
from contract.trunk_pb2 import ClientFrame, DescribeRequest, ServerFrame, TrunkDescription
from contract.trunk_pb2_grpc import TrunkStub

_QUEUED_FRAMES = 16
_WATCH_INTERVAL_S = 0.25

T = TypeVar("T")


class TrunkConnection:
    """A channel to the trunk at `address` (HOST:PORT). Opening one costs nothing until something is asked."""

    def __init__(
        self,
        address: str,
        *,
        connect_timeout_s: float = 10.0,
        wire_log: WireLog | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        """By TLS alone where `tls` is given. Raises ConfigError unless the address is HOST:PORT, and for TLS files."""
        split_address("trunk-address", address)
        self.address = address
        self.wire_log = wire_log or WireLog()
        self._connect_timeout_s = connect_timeout_s
        # As the orchestrator does: a proxy between us and a trunk would be named by the address, not the environment.
        self._by_tls = tls is not None
        self._channel = open_channel(address, tls, [*wire.message_limits(), ("grpc.enable_http_proxy", 0)])
        self._stub = TrunkStub(self._channel)

    def describe(self) -> TrunkDescription:
        """What the trunk serves. Raises ConnectionFailedError when nothing answers at the address."""
        request = DescribeRequest()
        self.wire_log.sent_message("describe", request)
        try:
            reply: TrunkDescription = self._stub.Describe(request, timeout=self._connect_timeout_s)
        except grpc.RpcError as error:
            if cast(grpc.Call, error).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                why = told_failure(cast(grpc.Call, error).details(), by_tls=self._by_tls)
                raise ConnectionFailedError(
                    f"no trunk answers at {self.address}{why}: start one with `trunkline trunk serve`, "
                    "or set trunk-address to where it listens"
                ) from error
            raise rebuilt(error, self.address) from error
        self.wire_log.received(reply.ByteSize())
        return reply

    def opened(self, opening: Callable[[TrunkConnection], T]) -> T:
        """What `opening` makes of this connection: there is no other trunk to turn to."""
        return opening(self)

    def round_trip_s(self) -> float:
        """How long the smallest question and its answer take on this channel. Raises as `describe` does."""
        started_s = time.monotonic()
        self.describe()
        return time.monotonic() - started_s

    def open_stream(self, timeout_s: float) -> FrameStream:
        """Starts a session's stream, in which each wait ends after `timeout_s`."""
        method = self._channel.stream_stream(wire.SESSION_METHOD, None, None)
        return FrameStream(method, self.address, timeout_s, self.wire_log)

    def close(self) -> None:
        self._channel.close()


@dataclass(frozen=True, slots=True)
class Due:
    """When a wait must have ended, by the monotonic clock, and what is told of the trunk where it has not."""

    at_s: float
    told: str


class FrameStream:
    """Frames out and in on one call. One thread may send while another receives; a stream that failed stays failed.

    Replies are read by the caller's own thread, so nothing piles up here: gRPC's flow control holds the peer back.
    A watching thread cancels the call when a wait runs past its limit.
    """

    def __init__(self, method: Callable[..., Any], address: str, timeout_s: float, wire_log: WireLog) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._wire_log = wire_log
        self._outgoing: queue.Queue[bytes | None] = queue.Queue(maxsize=_QUEUED_FRAMES)
        traceparent = traces.current()
        self._call: Any = method(self._frames(), metadata=((traces.HEADER, traceparent),) if traceparent else None)
        self._waits: Due | None = None  # what the thread that receives waits for
        self._expired: Due | None = None
        self._failed: TrunklineError | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="trunk-watch", daemon=True).start()

    def send(self, frame: ClientFrame) -> None:
        """Queues one message. Raises as `receive` does when the stream is over or takes nothing more."""
        kind = str(frame.WhichOneof("body"))
        failpoint(f"site.{kind}.send")
        self._wire_log.sent_message(kind, frame)
        self._put(frame.SerializeToString())
        failpoint(f"site.{kind}.sent")

    def send_chunks(self, frames: Iterable[bytes], size_bytes: int) -> None:
        """Queues serialised chunk frames with `size_bytes` of one tensor, all of which must go in time."""
        due = self._all_due(size_bytes, "take all of a tensor")
        for frame in frames:
            self._wire_log.sent("trunk", "chunk", len(frame), {"chunk.data": len(frame)})
            self._put(frame, due)

    def receive(self, kind: str) -> Any:
        """The body of the next frame, which must be of `kind` and no chunk.

        Raises the trunk's own error, rebuilt; ConnectionFailedError when the connection broke; SessionError when the
        stream is over; DeadlineError after the time limit; FrameError when another kind came.
        """
        frame: ServerFrame = wire.parse_server_frame(self._next())
        got = frame.WhichOneof("body")
        if got != kind:
            raise FrameError(f"the trunk at {self._address} sent {got!r} where {kind!r} was due")
        failpoint(f"site.{kind}.received")
        return getattr(frame, kind)

    def receive_chunks(self, size_bytes: int, what: str) -> Iterator[memoryview]:
        """The data of the next frames, which must be chunks, without an end: all of `what` must come in time.

        Raises as `receive` does.
        """
        due = self._all_due(size_bytes, f"send all of {what}")
        while True:
            yield self._chunk(due)

    def _chunk(self, due: Due) -> memoryview:
        frame = self._next(due)
        data = wire.chunk_data(frame)
        if data is None:
            parsed: ServerFrame = wire.parse_server_frame(frame)
            if (got := parsed.WhichOneof("body")) != "chunk":
                raise FrameError(f"the trunk at {self._address} sent {got!r} where a chunk was due")
            data = memoryview(parsed.chunk.data)
        return data

    def finish(self) -> None:
        """Ends the stream once everything queued has been sent and the trunk has ended its side, or the time is up."""
        if (call := self._call) is None:
            return
        self._hang_up()
        self._waits = self._frame_due()
        try:
            next(call, None)
        except grpc.RpcError as error:  # the goodbye was answered: how the call ends is no matter
            error.__traceback__ = None
        self._let_go()

    def cancel(self) -> None:
        """Drops the stream at once; the trunk forgets the session."""
        if (call := self._call) is not None:
            call.cancel()
            self._hang_up()
        self._let_go()

    def _let_go(self) -> None:
        """The stream is over.

        gRPC's call takes a lock of its own when it is collected. At the interpreter's end a thread of gRPC's may have
        been stopped with that lock in hand, so that the process would never end: it is collected now.
        """
        self._ended.set()
        self._call = None

    def _frame_due(self) -> Due:
        return Due(time.monotonic() + self._timeout_s, f"did not answer within {self._timeout_s:g} s")

    def _all_due(self, size_bytes: int, what: str) -> Due:
        """For an announced tensor as a whole, or a byte now and then would renew each frame's own limit for ever.

        It is told without its size, which is that of the site's batch.
        """
        limit_s = self._timeout_s + size_bytes / wire.SLOWEST_BYTES_S
        return Due(
            time.monotonic() + limit_s,
            f"did not {what} in time: at least {wire.SLOWEST_BYTES_S >> 10} KiB/s must move",
        )

    def _put(self, frame: bytes, due: Due | None = None) -> None:
        due = _sooner(self._frame_due(), due)
        while (call := self._call) is not None and not call.done():
            if time.monotonic() > due.at_s:
                self._expired = due
                break
            with suppress(queue.Full):
                return self._outgoing.put(frame, timeout=_WATCH_INTERVAL_S)
        failed, call = self._failure(call), None  # which a traceback would keep
        raise failed

    def _next(self, due: Due | None = None) -> bytes:
        if (call := self._call) is None:
            raise self._failure()
        failed: TrunklineError | None = None
        due = _sooner(self._frame_due(), due)
        if time.monotonic() > due.at_s:  # which the watch may not see where each wait is short
            self._expired = due
            failed, call = self._failure(call), None
            raise failed
        self._waits = due
        try:
            frame: bytes = next(call)
        except (grpc.RpcError, StopIteration) as error:
            error.__traceback__ = None  # gRPC raises the call itself, which no traceback may keep: see `_let_go`
            failed = self._failure(call)
        finally:
            self._waits = None
        if failed is not None:
            call = None
            raise failed
        self._wire_log.received(len(frame))
        return frame

    def _hang_up(self) -> None:
        # Where the queue is full, gRPC's sending thread takes frames until the cancelled call stops it.
        with suppress(queue.Full):
            self._outgoing.put_nowait(None)

    def _frames(self) -> Iterator[bytes]:
        while (frame := self._outgoing.get()) is not None:
            yield frame

    def _watch(self) -> None:
        while not self._ended.wait(_WATCH_INTERVAL_S):
            due = self._waits
            if due is not None and time.monotonic() > due.at_s:
                self._expired = due
                self.cancel()

    def _failure(self, call: Any = None) -> TrunklineError:
        """The error that `call` ended with; what came first, if it is asked again."""
        if self._failed is None and (call is not None or self._expired is not None):
            # What ended the call is asked before cancelling it, which would be the answer otherwise.
            self._failed = self._judged(call)
        self.cancel()
        failed = self._failed or self._over()
        return type(failed)(str(failed))  # an error's own traceback belongs to who met it

    def _judged(self, call: Any) -> TrunklineError:
        if self._expired is not None:
            return DeadlineError(f"the trunk at {self._address} {self._expired.told}")
        status = call.code() if call.done() else None
        if status in (None, grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
            return self._over()
        if status is grpc.StatusCode.UNAVAILABLE and _named(call) is None:
            return ConnectionFailedError(
                f"the connection to the trunk at {self._address} broke ({_first_line(call)}): its session is lost with "
                "the trunk's half of the adapter and optimiser, start a new one"
            )
        return rebuilt(call, self._address)

    def _over(self) -> SessionError:
        return SessionError(f"the session with the trunk at {self._address} is over: start a new one")


def _sooner(one: Due, other: Due | None) -> Due:
    return one if other is None or one.at_s < other.at_s else other


_STATUS_ERRORS: Mapping[grpc.StatusCode, type[TrunklineError]] = {
    grpc.StatusCode.UNAVAILABLE: ConnectionFailedError,
    grpc.StatusCode.UNAUTHENTICATED: ConnectionFailedError,
    grpc.StatusCode.PERMISSION_DENIED: ConnectionFailedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: FrameTooLargeError,
}


def rebuilt(call: Any, address: str) -> TrunklineError:
    """The trunk's own error, of the class that it named, or the nearest one for an error of the transport."""
    cls = _named(call)
    if cls is not None:
        return cls(f"trunk at {address}: {_first_line(call)}")
    cls = _STATUS_ERRORS.get(call.code(), TrunklineError)
    return cls(f"trunk at {address}: {call.code().name}: {_first_line(call)}")


def _named(call: Any) -> type[TrunklineError] | None:
    name = next((value for key, value in call.trailing_metadata() or () if key == wire.ERROR_KEY), None)
    return error_named(name) if isinstance(name, str) else None


def _first_line(call: Any) -> str:
    return (str(call.details() or "").splitlines() or ["no reason given"])[0]
