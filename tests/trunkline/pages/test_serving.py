"""`trunkline dashboard` as a process: where it listens, how it ends, and that nobody can hold it up."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
from sqlalchemy import text

from contract.errors import ConfigError, ListenError
from storage.engine import make_engine
from storage.revisions import VERSION_TABLE
from tests.trunkline.pages.cases import case_at, eventful
from tests.trunkline.pages.conftest import Dashboard, until
from trunkline.pages import serving
from trunkline.pages.serving import MOST_CONNECTIONS, MOST_HEADER_BYTES, dashboard_address, host_names, listening, serve

Start = Callable[..., Dashboard]


def asked(port: int, request: bytes, limit_s: float = 30.0) -> bytes:
    """All that comes back for `request` until the connection ends."""
    with socket.create_connection(("127.0.0.1", port), limit_s) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(65_536):
            parts.append(part)
        return b"".join(parts)


GET = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_is_told_to_end_and_ends_well(url: str, dashboard: Start, number: signal.Signals) -> None:
    with case_at(url) as case:
        eventful(case)
    started = dashboard()
    assert asked(started.port, GET).startswith(b"HTTP/1.1 200")
    assert started.end(number) == 0
    assert started.said().splitlines()[-1] == "the dashboard has ended"
    assert "Traceback" not in started.said()


def test_it_ends_while_a_browser_holds_a_connection(url: str, dashboard: Start) -> None:
    with case_at(url) as case:
        case.begin()
    started = dashboard()
    with socket.create_connection(("127.0.0.1", started.port), 10) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        assert started.end() == 0


def test_a_port_that_is_taken_is_named_with_what_to_do(url: str, dashboard: Start) -> None:
    with case_at(url) as case:
        case.begin()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = dashboard("--listen", f"127.0.0.1:{port}", ready=False)
        assert refused.process.wait(120) == 1
    expected = f"error: cannot listen on 127.0.0.1:{port}: Address already in use; name another port by --listen\n"
    assert refused.said() == expected


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--listen", "0.0.0.0:0"), "which other machines can reach, and the dashboard has neither TLS nor a login"),
        (("--listen", "nowhere"), "listen is 'nowhere'; it must be HOST:PORT"),
        (("--listen", "127.0.0.1:99999"), "it must be HOST:PORT"),
        (("--listen", "0.0.0.0:0", "--insecure-listen"), "say by --host which name or address browsers call it by"),
    ],
)
def test_an_address_that_will_not_do_is_refused_before_anything_listens(
    url: str, arguments: tuple[str, ...], told: str
) -> None:
    command = [sys.executable, "-m", "trunkline", "dashboard", *arguments]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert told in refused.stderr


def test_listening_elsewhere_warns_and_answers_by_its_name_alone(url: str, dashboard: Start) -> None:
    with case_at(url) as case:
        case.begin()
    started = dashboard("--listen", "0.0.0.0:0", "--insecure-listen", "--host", "board.example")
    assert "warning: no TLS and no login" in started.said()
    assert asked(started.port, GET.replace(b"127.0.0.1", b"board.example")).startswith(b"HTTP/1.1 200")
    assert asked(started.port, GET.replace(b"127.0.0.1", b"other.example")).startswith(b"HTTP/1.1 421")


def test_a_schema_that_is_older_ends_it_with_what_to_do(url: str, dashboard: Start) -> None:
    with case_at(url) as case:
        case.begin()
    engine = make_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '0001'"))
    engine.dispose()
    refused = dashboard(ready=False)
    assert refused.process.wait(120) == 1
    assert "run `trunkline db upgrade`" in refused.said()


@pytest.mark.parametrize(
    ("place", "code", "told"),
    [
        ("postgresql://ada:secret@127.0.0.1:1/runs", 3, "no database answers at"),
        ("mysql://127.0.0.1/runs", 2, "must be sqlite:///PATH or postgresql://"),
    ],
)
def test_a_database_that_cannot_be_had_ends_it(
    url: str, dashboard: Start, monkeypatch: pytest.MonkeyPatch, place: str, code: int, told: str
) -> None:
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", place)
    refused = dashboard(ready=False)
    assert refused.process.wait(120) == code
    assert told in refused.said()
    assert "secret" not in refused.said()
    assert refused.said().count("\n") == 1


def test_headers_without_an_end_end_the_connection(url: str, dashboard: Start) -> None:
    with case_at(url) as case:
        case.begin()
    started = dashboard()
    sent = 0
    with socket.create_connection(("127.0.0.1", started.port), 30) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: ")
        with contextlib.suppress(ConnectionError):
            while sent < 100 * MOST_HEADER_BYTES:
                sent += connection.send(b"x" * 4096)
                time.sleep(0.001)  # so that it comes in parts, as over a network
    assert sent < 100 * MOST_HEADER_BYTES
    assert asked(started.port, GET).startswith(b"HTTP/1.1 200")


def test_more_connections_than_there_may_be_are_turned_away_and_the_others_are_served(
    url: str, dashboard: Start
) -> None:
    with case_at(url) as case:
        case.begin()
    started = dashboard()
    held = [socket.create_connection(("127.0.0.1", started.port), 30) for _ in range(MOST_CONNECTIONS)]
    try:
        until("the limit", lambda: asked(started.port, GET).startswith(b"HTTP/1.1 503"))
    finally:
        for one in held:
            one.close()
    until("room again", lambda: asked(started.port, GET).startswith(b"HTTP/1.1 200"))


@pytest.mark.parametrize("request_begun", [b"", b"GET / HTTP/1.1\r\nHost: 127.", GET.replace(b"close", b"keep-alive")])
def test_a_connection_has_an_end_whatever_it_is_about(monkeypatch: pytest.MonkeyPatch, request_begun: bytes) -> None:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    monkeypatch.setattr(serving, "CONNECTION_S", 0.5)
    monkeypatch.setattr(serving, "GRACE_S", 1)
    app = Starlette(routes=[Route("/healthz", lambda request: PlainTextResponse("ok"))])
    ready = threading.Event()
    with listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=_serve_until_told, args=(app, listener, ready, monkeypatch), daemon=True)
        thread.start()
        assert ready.wait(60)
        with socket.create_connection(("127.0.0.1", port), 60) as connection:
            connection.sendall(request_begun)
            while connection.recv(4096):
                pass  # ends only because the server ends it: the test's own limit is 60 s
        _Told.server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


class _Told:
    server: serving._Server


def _serve_until_told(
    app: object, listener: socket.socket, ready: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kept(serving._Server):
        def capture_signals(self):  # type: ignore[no-untyped-def]
            _Told.server = self
            return contextlib.nullcontext()  # signals belong to the main thread

    monkeypatch.setattr(serving, "_Server", Kept)
    serve(app, listener, ready.set)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "named", "found"),
    [
        ("127.0.0.1", (), {"127.0.0.1", "localhost", "::1"}),
        ("::1", ("board",), {"127.0.0.1", "localhost", "::1", "board"}),
        ("10.0.0.7", (), {"10.0.0.7"}),
        ("0.0.0.0", ("board.example",), {"127.0.0.1", "localhost", "::1", "board.example"}),
    ],
)
def test_it_is_called_by_where_it_listens_and_by_the_names_that_it_was_given(
    host: str, named: tuple[str, ...], found: set[str]
) -> None:
    assert set(host_names(host, named)) == found


def test_ipv6_is_written_in_brackets() -> None:
    assert dashboard_address("[::1]:8088", False) == ("::1", 8088)
    with pytest.raises(ConfigError):
        dashboard_address("[2001:db8::1]:8088", False)
    assert dashboard_address("[2001:db8::1]:8088", True) == ("2001:db8::1", 8088)


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(ListenError, match=r"cannot listen on 192\.0\.2\.1:80"), listening("192.0.2.1", 80):
        time.sleep(0)
