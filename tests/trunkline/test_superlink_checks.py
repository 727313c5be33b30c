"""What the doctor says of a SuperLink elsewhere; tests/deploy/test_gate.py asks a real one, and a gate."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.authority import create_authority
from trunkline.cli import app
from trunkline.finding import DoubtfulError, NotReadyError, SkippedError
from trunkline.superlink_checks import check_superlink, check_superlink_clock

Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts an HTTP server that answers everything with one status and one date; its HOST:PORT."""
    started: list[ThreadingHTTPServer] = []

    def start(status: int, date: str | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response_only(status)
                if date != "":
                    self.send_header("Date", date or self.date_time_string())
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return f"127.0.0.1:{server.server_address[1]}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("status", "what"), [(200, "a SuperLink"), (403, "a gate that hands on what sites ask")])
def test_one_without_tls_is_doubtful(serve: Serve, status: int, what: str) -> None:
    address = serve(status)
    with pytest.raises(DoubtfulError, match=f"{address} is {what}, without TLS"):
        check_superlink(address, None)
    assert f"the clock of {address} is" in check_superlink_clock(address, None)


def test_another_server_is_none(serve: Serve) -> None:
    with pytest.raises(NotReadyError, match="answers /health with 404: it is no SuperLink"):
        check_superlink(serve(404), None)


def test_a_clock_that_is_far_off_is_told_and_one_that_is_not_told_is_not_judged(serve: Serve) -> None:
    with pytest.raises(NotReadyError, match="s behind this machine's"):
        check_superlink_clock(serve(200, "Tue, 01 Sep 2026 00:00:00 GMT"), None)
    with pytest.raises(SkippedError, match="does not tell its time"):
        check_superlink_clock(serve(200, ""), None)
    with pytest.raises(SkippedError, match="does not tell its time"):
        check_superlink_clock(serve(200, "now"), None)


def test_what_does_not_answer_or_speaks_no_tls_is_not_ready(serve: Serve, tmp_path: Path) -> None:
    authority = create_authority(tmp_path / "authority", datetime.now(UTC), 1)
    with pytest.raises(NotReadyError, match="TLS came to nothing: "):
        check_superlink(serve(200), authority.directory / "ca.pem")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(NotReadyError, match=f"{address} does not answer in clear"):
        check_superlink(address, None)
    with pytest.raises(SkippedError, match="not asked"):
        check_superlink_clock(address, None)
    nothing = tmp_path / "ca.pem"
    with pytest.raises(NotReadyError, match="ca.pem: .*No such file"):
        check_superlink(address, nothing)


def test_an_address_that_is_none_is_told_before_anything_is_checked() -> None:
    result = CliRunner().invoke(app, ["doctor", "--superlink", "garbage"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: superlink is 'garbage'; it must be HOST:PORT\n"


def test_certificates_without_a_superlink_are_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--root-certificates", str(tmp_path / "ca.pem")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "root-certificates is given without superlink" in result.stderr


def test_the_doctor_looks_at_the_superlink_that_it_is_given(serve: Serve) -> None:
    lines = CliRunner().invoke(app, ["doctor", "--superlink", serve(200)]).stdout.splitlines()
    assert any(line.startswith("WARN  superlink: ") for line in lines)
    assert any(line.startswith("PASS  superlink clock: ") for line in lines)
