"""A TCP proxy that keeps what a client sends, and the gRPC messages in it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import defaultdict
from dataclasses import dataclass, field

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _PADDED = 0, 0x8


@dataclass
class Capture:
    """Passes everything on to `target` (HOST:PORT) and keeps each connection's bytes from the client."""

    target: str
    sent: list[bytearray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def raw(self) -> bytes:
        return b"".join(bytes(part) for part in self.sent)

    def messages(self) -> list[list[bytes]]:
        """The messages of each call, in the order in which the calls began."""
        return [messages for part in self.sent for messages in grpc_messages(bytes(part))]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                host, _, port = self.target.rpartition(":")
                trunk = socket.create_connection((host, int(port)))
                kept = bytearray()
                self.sent.append(kept)
                for source, sink, copy in ((client, trunk, kept), (trunk, client, None)):
                    threading.Thread(target=_pump, args=(source, sink, copy), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, copy: bytearray | None) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if copy is not None:
                copy += data
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def grpc_messages(raw: bytes) -> list[list[bytes]]:
    """The uncompressed gRPC messages that a client sent on one HTTP/2 connection, by call."""
    assert raw.startswith(_PREFACE)
    at, bodies = len(_PREFACE), defaultdict[int, bytearray](bytearray)
    while at < len(raw):
        size, kind, flags = int.from_bytes(raw[at : at + 3], "big"), raw[at + 3], raw[at + 4]
        stream = int.from_bytes(raw[at + 5 : at + 9], "big")
        payload = raw[at + 9 : at + 9 + size]
        assert len(payload) == size
        if kind == _DATA:
            bodies[stream] += payload[1 : size - payload[0]] if flags & _PADDED else payload
        at += 9 + size
    return [_unframed(bytes(bodies[stream])) for stream in sorted(bodies)]


def _unframed(body: bytes) -> list[bytes]:
    messages, at = [], 0
    while at < len(body):
        assert body[at] == 0, "a compressed message cannot be searched"
        size = int.from_bytes(body[at + 1 : at + 5], "big")
        messages.append(body[at + 5 : at + 5 + size])
        at += 5 + size
    return messages
