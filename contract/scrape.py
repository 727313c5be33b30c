"""What an operator's tools ask of a running process over HTTP: /metrics for Prometheus, /healthz and /readyz.

Who asks slowly, asks for much or asks often gets in nobody's way: a connection lasts seconds, a request has few bytes,
and where there are many connections the oldest gives way.
"""

from __future__ import annotations

import http.server
import io
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from contract.addresses import is_loopback, listen_address
from contract.errors import ConfigError, ListenError

logger = logging.getLogger("trunkline.scrape")

Check = Callable[[], str]
"""Answers why something is not well, in one line; nothing where it is."""

MAX_CONNECTIONS = 16
REQUEST_BYTES = 8192
CONNECTION_S = 10.0
_LOOK_S = 0.5


def metrics_address(name: str, value: str, *, insecure: bool, allowed_by: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT. Raises ConfigError, naming `name`, when malformed, or not loopback without `insecure`.

    `allowed_by` is what lets other machines in.
    """
    host, port = listen_address(name, value)
    if not insecure and not is_loopback(host):
        raise ConfigError(
            f"{name} is {value!r}, which other machines can reach, and metrics have neither TLS nor a login: "
            f"take 127.0.0.1, or allow it by {allowed_by} on a network that you trust"
        )
    return host, port


class Exporter:
    """Serves one process's metrics and health from a thread of its own, until it is closed."""

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, *, healthy: Check, ready: Check, what: str
    ) -> None:
        """Raises ListenError where the address cannot be had; `what` says in it whose metrics are meant.

        `healthy` and `ready` are called on other threads, and MUST answer within seconds.
        """
        try:
            self._server = _Server(host, port, registry, {"/healthz": healthy, "/readyz": ready})
        except OSError as error:
            raise ListenError(f"cannot serve {what} at {host}:{port}: {error.strerror or error}") from error
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_LOOK_S,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; what is being answered is cut off."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.cut_off(0)


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, registry: CollectorRegistry, checks: dict[str, Check]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.registry = registry
        self.checks = checks
        self._open: dict[Any, float] = {}  # since when, by connection, the oldest first
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            self._cut(next(iter(self._open)))
        if len(self._open) >= 2 * MAX_CONNECTIONS:  # those cut off have not noticed yet
            self.shutdown_request(request)
            return
        self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.pop(request, None)

    def service_actions(self) -> None:
        self.cut_off(CONNECTION_S)

    def cut_off(self, older_than_s: float) -> None:
        oldest = time.monotonic() - older_than_s
        for request, since in list(self._open.items()):
            if since <= oldest:
                self._cut(request)

    def _cut(self, request: Any) -> None:
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)
        # To the end, so that the next one to give way is another one.
        if (since := self._open.pop(request, None)) is not None:
            self._open[request] = since

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a connection for metrics broke", exc_info=True)


class _Bounded(io.RawIOBase):
    """The first `left` bytes of a connection, and then its end."""

    def __init__(self, source: io.BufferedReader, left: int) -> None:
        self._source = source
        self.left = left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read1(min(len(buffer), self.left))
        buffer[: len(data)] = data
        self.left -= len(data)
        return len(data)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    server_version = "trunkline"
    sys_version = ""
    timeout = CONNECTION_S

    def setup(self) -> None:
        super().setup()
        self._bounded = _Bounded(self.rfile, REQUEST_BYTES)  # type: ignore[arg-type]
        self.rfile = io.BufferedReader(self._bounded)

    def do_GET(self) -> None:
        if self._bounded.left <= 0:
            self._answer(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a request has {REQUEST_BYTES} bytes at most\n")
            return
        path = urlsplit(self.path).path
        if path == "/metrics":
            self._metrics()
        elif (check := self.server.checks.get(path)) is not None:
            told = check()
            status = HTTPStatus.SERVICE_UNAVAILABLE if told else HTTPStatus.OK
            self._answer(status, f"{told or 'ok'}\n")
        else:
            self._answer(HTTPStatus.NOT_FOUND, "there are /metrics, /healthz and /readyz\n")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _metrics(self) -> None:
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        try:
            body = encode(self.server.registry)
        except TimeoutError:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "the process does not answer\n")
            return
        self._answer(HTTPStatus.OK, body, content_type)

    def _answer(self, status: HTTPStatus, body: str | bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
