"""The HTTP side of watching a process: what it answers, and that nobody can hold it up."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from contract import scrape
from contract.errors import ConfigError, ListenError
from contract.scrape import Exporter, metrics_address

PATIENCE_S = 60.0


class Process:
    """A process as its operator sees it; `told` and `unready` are what its checks answer."""

    def __init__(self) -> None:
        self.told = self.unready = ""
        registry = CollectorRegistry()
        Gauge("trunkline_tested", "A number.", registry=registry).set(42)
        self.exporter = Exporter(
            "127.0.0.1", 0, registry, healthy=lambda: self.told, ready=lambda: self.unready, what="metrics"
        )
        host, _, port = self.exporter.address.rpartition(":")
        self.place = (host, int(port))

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection(*self.place, timeout=PATIENCE_S)
        try:
            connection.request(method, path, headers=headers)
            reply = connection.getresponse()
            return reply.status, reply.read().decode(), reply.headers
        finally:
            connection.close()


@pytest.fixture
def process() -> Iterator[Process]:
    made = Process()
    yield made
    made.exporter.close()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_metrics_are_what_prometheus_parses(process: Process) -> None:
    status, body, headers = process.get("/metrics")
    assert status == 200
    (family,) = text_string_to_metric_families(body)
    assert [(sample.name, sample.value) for sample in family.samples] == [("trunkline_tested", 42.0)]
    assert headers["Content-Type"].startswith("text/plain; version=")
    assert headers["Cache-Control"] == "no-store"


def test_openmetrics_is_sent_to_who_asks_for_it(process: Process) -> None:
    status, body, headers = process.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert (status, body.splitlines()[-1]) == (200, "# EOF")
    assert headers["Content-Type"].startswith("application/openmetrics-text")


def test_health_and_readiness_are_told_with_their_reason(process: Process) -> None:
    assert process.get("/healthz")[:2] == process.get("/readyz")[:2] == (200, "ok\n")
    process.unready = "it takes no new sessions"
    assert process.get("/readyz")[:2] == (503, "it takes no new sessions\n")
    assert process.get("/healthz")[0] == 200
    process.told = "stuck"
    assert process.get("/healthz")[:2] == (503, "stuck\n")


def test_other_paths_and_other_methods_are_refused(process: Process) -> None:
    assert process.get("/")[0] == process.get("/metrics/../etc/passwd")[0] == 404
    assert process.get("/metrics", "POST")[0] == 501
    status, body, headers = process.get("/metrics", "HEAD")
    assert (status, body) == (200, "")
    assert int(headers["Content-Length"]) > 0


def test_a_request_has_few_bytes(process: Process) -> None:
    assert process.get("/metrics", Padding="x" * (scrape.REQUEST_BYTES // 2))[0] == 200
    with socket.create_connection(process.place, PATIENCE_S) as peer:
        peer.sendall(b"GET /metrics HTTP/1.1\r\nPadding: " + b"x" * scrape.REQUEST_BYTES + b"\r\n\r\n")
        assert b" 431 " in peer.recv(1000)


def test_a_peer_that_sends_nothing_is_cut_off(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "CONNECTION_S", 0.5)
    with socket.create_connection(process.place, PATIENCE_S) as peer:
        assert peer.recv(1) == b""


def test_a_peer_that_dribbles_is_cut_off(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "CONNECTION_S", 1.0)
    deadline = time.monotonic() + PATIENCE_S
    with socket.create_connection(process.place, PATIENCE_S) as peer:

        def dribble() -> None:
            while time.monotonic() < deadline:
                peer.sendall(b"x")
                time.sleep(0.05)

        with pytest.raises(OSError, match="pipe|reset|abort"):
            dribble()


def test_idle_connections_never_keep_a_scrape_out(process: Process) -> None:
    before = threading.active_count()
    idle = [socket.create_connection(process.place, PATIENCE_S) for _ in range(4 * scrape.MAX_CONNECTIONS)]
    try:
        for _ in range(5):
            assert process.get("/metrics")[0] == 200
        assert threading.active_count() - before <= 2 * scrape.MAX_CONNECTIONS
    finally:
        for peer in idle:
            peer.close()
    until(lambda: threading.active_count() <= before + 1)


def test_a_peer_that_reads_nothing_holds_up_nobody_and_not_the_end(process: Process) -> None:
    with socket.create_connection(process.place, PATIENCE_S) as peer:
        peer.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert process.get("/metrics")[0] == 200
        process.exporter.close()
        assert peer.recv(1) == b""


def test_a_busy_port_is_named() -> None:
    first = Process()
    try:
        with pytest.raises(
            ListenError, match=f"cannot serve a run's metrics at {first.exporter.address}: Address already"
        ):
            Exporter(*first.place, CollectorRegistry(), healthy=lambda: "", ready=lambda: "", what="a run's metrics")
    finally:
        first.exporter.close()


@pytest.mark.parametrize("value", ["9100", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", ":9100", "127.0.0.1:\u00b2"])
def test_a_malformed_address_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match="metrics is .* it must be HOST:PORT"):
        metrics_address("metrics", value, insecure=True, allowed_by="--x")


@pytest.mark.parametrize("value", ["0.0.0.0:0", "10.1.2.3:9100", "[::]:0", "trunk.example:9100"])
def test_an_address_that_others_reach_needs_leave(value: str) -> None:
    with pytest.raises(ConfigError, match="allow it by --let-them"):
        metrics_address("metrics", value, insecure=False, allowed_by="--let-them")
    assert metrics_address("metrics", value, insecure=True, allowed_by="")[1] in (0, 9100)


def test_loopback_needs_no_leave() -> None:
    assert metrics_address("metrics", "[::1]:9100", insecure=False, allowed_by="") == ("::1", 9100)
    assert metrics_address("metrics", "localhost:0", insecure=False, allowed_by="") == ("localhost", 0)
