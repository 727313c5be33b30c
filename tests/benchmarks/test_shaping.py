"""The shaped link: its schedule by a clock of the test's own, and that a real proxy passes bytes on, paced."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.shaping import LinkSpec, Passed, Pipe, links

RATE_BPS = 8e6  # a megabyte a second


def test_a_lone_segment_takes_its_serialisation_and_the_delay() -> None:
    assert Pipe(RATE_BPS, 0.04, 65536).send(10.0, 5000) == pytest.approx(10.0 + 0.005 + 0.04)


def test_segments_that_come_together_leave_one_after_another_and_share_no_delay() -> None:
    pipe = Pipe(RATE_BPS, 0.04, 10**6)
    assert [pipe.send(0.0, 1000) for _ in range(3)] == pytest.approx([0.041, 0.042, 0.043])
    assert pipe.send(5.0, 1000) == pytest.approx(5.041)  # the link was idle meanwhile, which earns no credit
    assert pipe.passed_bytes == 4000


def test_a_full_queue_makes_the_sender_wait_for_room_and_nothing_else() -> None:
    pipe = Pipe(RATE_BPS, 0.04, 3000)
    for _ in range(3):
        assert pipe.wait_s(0.0, 1000) == 0.0
        pipe.send(0.0, 1000)
    assert pipe.wait_s(0.0, 1000) == pytest.approx(0.001)
    assert pipe.wait_s(0.0005, 1000) == pytest.approx(0.0005)
    assert pipe.wait_s(0.0, 9000) == pytest.approx(0.003)  # larger than the queue: when that is empty
    assert pipe.send(0.001, 1000) == pytest.approx(0.044)


def test_a_stream_through_the_schedule_runs_at_the_rate_whatever_the_queue_holds() -> None:
    spec = LinkSpec(20e6, 0.08)
    pipe, now_s, last_s = Pipe(spec.rate_bps, spec.rtt_s / 2, spec.queue_bytes), 0.0, 0.0
    for _ in range(1000):
        now_s += pipe.wait_s(now_s, spec.segment_bytes)
        last_s = pipe.send(now_s, spec.segment_bytes)
    assert last_s == pytest.approx(1000 * spec.segment_bytes * 8 / spec.rate_bps + 0.04)
    assert last_s - now_s == pytest.approx(spec.queue_bytes * 8 / spec.rate_bps + 0.04, rel=0.01)


@pytest.mark.parametrize("rate_mbit", [5, 20, 100])
def test_segments_are_short_and_a_queue_holds_a_round_trip(rate_mbit: int) -> None:
    spec = LinkSpec(rate_mbit * 1e6, 0.08)
    assert spec.segment_bytes >= 1500
    assert spec.segment_bytes * 8 / spec.rate_bps <= 0.0025
    assert spec.queue_bytes >= spec.rate_bps / 8 * 0.08 - 1
    assert spec.queue_bytes >= 2 * spec.segment_bytes


@contextmanager
def echo() -> Iterator[str]:
    """A server that sends everything back, to one connection."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    thread.join(10)
    listening.close()
    assert not thread.is_alive()


def test_a_real_link_passes_every_byte_counts_it_and_is_never_faster_than_it_says() -> None:
    payload = bytes(range(256)) * 1024
    spec = LinkSpec(8e6, 0.1)
    with echo() as target, links({"echo": target}, spec) as made:
        host, port = made["echo"].address.split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            began_s = time.monotonic()
            threading.Thread(target=connection.sendall, args=(payload,), daemon=True).start()
            got = b""
            while len(got) < len(payload):
                got += connection.recv(65536)
            took_s = time.monotonic() - began_s
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""  # the end of a stream passes too
        passed = made["echo"].passed
    assert got == payload
    assert passed == Passed(len(payload), len(payload))
    # Both directions work at once, so that there and back takes one serialisation and the round trip. How much longer
    # it took depends on how busy the machine is; a sum of both serialisations would be no pipe.
    assert took_s >= 0.95 * (len(payload) * 8 / spec.rate_bps + spec.rtt_s)


def test_a_target_that_is_not_there_ends_the_connection() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
        with links({"nobody": target}, LinkSpec(8e6, 0.0)) as made:
            host, port = made["nobody"].address.split(":")
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                assert ended(connection)


def ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
