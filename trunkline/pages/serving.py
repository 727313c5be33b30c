"""Serving the dashboard: where it listens, and what bounds those who ask."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from contract.addresses import is_loopback, listen_address
from contract.errors import ConfigError, ListenError

MOST_CONNECTIONS = 48
MOST_HEADER_BYTES = 16_384
BACKLOG = 64
KEEP_ALIVE_S = 15
CONNECTION_S = 60.0
"""A connection is ended at this age, whatever it is about: who sends or reads slowly holds no place for longer."""
GRACE_S = 3

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
_WILDCARDS = ("0.0.0.0", "::")


def dashboard_address(listen: str, insecure: bool) -> tuple[str, int]:
    """(host, port) of HOST:PORT. Raises ConfigError when malformed, or not loopback without `insecure`."""
    host, port = listen_address("listen", listen)
    if not is_loopback(host) and not insecure:
        raise ConfigError(
            f"listen is {listen!r}, which other machines can reach, and the dashboard has neither TLS nor a login: "
            "listen on 127.0.0.1 and reach it by an SSH tunnel, or add --insecure-listen on a network that you trust"
        )
    return host, port


def host_names(host: str, named: Sequence[str]) -> list[str]:
    """What a browser may call the dashboard that listens on `host`; `named` are names that its operator gave it.

    Raises ConfigError where it listens on every address and has no name.
    """
    if is_loopback(host):
        return [*LOOPBACK_NAMES, host, *named]
    if host in _WILDCARDS and not named:
        raise ConfigError(f"listen is {host}, every address: say by --host which name or address browsers call it by")
    return [*LOOPBACK_NAMES, *named] if host in _WILDCARDS else [host, *named]


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens on `host` and `port`. Raises ListenError where it cannot be had."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ListenError(f"cannot listen on {where}: {error.strerror or error}") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            hint = "; name another port by --listen" if port else ""
            raise ListenError(f"cannot listen on {where}: {os.strerror(error.errno or 0)}{hint}") from error
        yield listener


def serve(app: Starlette, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; requests that are under way then get GRACE_S seconds."""
    config = uvicorn.Config(
        app,
        http=_BoundedConnection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
    )
    asyncio.run(_serve(_Server(config, ready), listener))


async def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    await server.serve(sockets=[listener])


class _Server(uvicorn.Server):
    """Says when it is ready, and takes a signal as the end that its operator wanted, no failure."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _BoundedConnection(H11Protocol):
    """A connection that has an end: uvicorn itself waits for ever for a request's headers, and for a slow reader."""

    _end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > 2 * MOST_CONNECTIONS:
            transport.abort()
            return
        self._end = self.loop.call_later(CONNECTION_S, self._come_to_end)

    def _come_to_end(self) -> None:
        self._end = self.loop.call_later(GRACE_S, self.transport.abort)
        self.shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._end is not None:
            self._end.cancel()
        super().connection_lost(exc)


def url_of(listener: socket.socket) -> str:
    """Where a browser on this machine finds the dashboard."""
    address: Any = listener.getsockname()
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
    return f"http://[{host}]:{address[1]}/" if ":" in host else f"http://{host}:{address[1]}/"
