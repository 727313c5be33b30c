"""Calls that have not said yet what they want: a bounded number of them, for seconds, and whoever speaks is let in.

A call takes a place from its headers on, before anything of it can be judged. Those that keep silent must not keep out
those that speak at once: where all places are taken, the one that has waited the longest of the connection that has
the most gives its place up, as a SYN cache does with half-open connections. A client says its hello with its headers,
so that it is through the door before it is old.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from contract.errors import CapacityError, DeadlineError, FrameError, FrameTooLargeError, TrunklineError

FIRST_WORD_S = 10.0
"""How long a call may take for its first message."""
_REQUEST_BYTES = 1 << 20
"""What a single request may have: parsed, a list of short names takes twenty times its bytes."""

Context = grpc.aio.ServicerContext[Any, Any]
Abort = Callable[[Context, TrunklineError], Awaitable[None]]


class Door:
    """The places of one server. Owned by its event loop."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.waiting = 0
        self._by_peer: dict[str, OrderedDict[asyncio.Timeout, int]] = {}
        self._came = 0

    @asynccontextmanager
    async def stranger(self, peer: str, patience_s: float) -> AsyncIterator[None]:
        """A place for a call of the connection `peer` until it has spoken.

        Raises CapacityError where the place was given to another, DeadlineError after `patience_s`.
        """
        if self.waiting >= self.places:
            self._turn_away(peer)
        limit = asyncio.timeout(patience_s)
        try:
            async with limit:
                self._enter(peer, limit)
                yield
        except TimeoutError:
            if limit not in self._by_peer.get(peer, ()):
                raise CapacityError(
                    f"{self.places} calls have not said what they want, which is this trunk's limit, and this one had "
                    "waited the longest: send the first message with the call"
                ) from None
            raise DeadlineError(f"no message came for {patience_s:g} s, so the call is closed") from None
        finally:
            self._leave(peer, limit)

    def _enter(self, peer: str, limit: asyncio.Timeout) -> None:
        self._came += 1
        self.waiting += 1
        self._by_peer.setdefault(peer, OrderedDict())[limit] = self._came

    def _leave(self, peer: str, limit: asyncio.Timeout) -> None:
        waiting = self._by_peer.get(peer)
        if waiting is not None and waiting.pop(limit, None) is not None:
            self.waiting -= 1
            if not waiting:
                del self._by_peer[peer]

    def _turn_away(self, newcomer: str) -> None:
        """End the oldest call of the connection that has the most, the newcomer's own counted; of equals the oldest."""

        def weight(peer: str) -> tuple[int, int]:
            waiting = self._by_peer[peer]
            return len(waiting) + (peer == newcomer), -next(iter(waiting.values()))

        peer = max(self._by_peer, key=weight)
        limit = next(iter(self._by_peer[peer]))
        self._leave(peer, limit)
        if not limit.expired():
            limit.reschedule(asyncio.get_running_loop().time())


class Doorkeeper(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets single requests in through a door: each is read and parsed within seconds, or refused by name.

    gRPC itself waits for a request as long as its connection lives. Streams of requests see to their first one
    themselves.
    """

    def __init__(self, door: Door, abort: Abort) -> None:
        self._door = door
        self._abort = abort

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        found = await continuation(handler_call_details)
        handler: Any = found
        if handler is None or handler.request_streaming:
            return found
        if handler.response_streaming:
            answered = self._answered(handler.unary_stream, handler.request_deserializer)
            return grpc.stream_stream_rpc_method_handler(answered, None, handler.response_serializer)
        answered = self._answered(handler.unary_unary, handler.request_deserializer)
        return grpc.stream_unary_rpc_method_handler(answered, None, handler.response_serializer)

    def _answered(
        self, method: Callable[[Any, Context], Awaitable[Any]], parse: Callable[[bytes], Any]
    ) -> Callable[[AsyncIterator[bytes], Context], Awaitable[Any]]:
        async def answer(requests: AsyncIterator[bytes], context: Context) -> Any:
            try:
                request = await self._first(aiter(requests), context.peer(), parse)
            except TrunklineError as error:
                await self._abort(context, error)
                raise
            return await method(request, context)

        return answer

    async def _first(self, requests: AsyncIterator[bytes], peer: str, parse: Callable[[bytes], Any]) -> Any:
        async with self._door.stranger(peer, FIRST_WORD_S):
            data = await anext(requests, None)
        if data is None:
            raise FrameError("the call ended without a request")
        if len(data) > _REQUEST_BYTES:
            raise FrameTooLargeError(f"a request of {len(data)} bytes came; it may have {_REQUEST_BYTES}")
        try:
            return parse(data)
        except DecodeError:
            raise FrameError(f"{len(data)} bytes are not the request that this method takes") from None
