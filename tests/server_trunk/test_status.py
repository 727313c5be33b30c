"""`trunkline trunk status` says what a trunk says, and exits as a readiness probe must."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from click.testing import Result
from typer.testing import CliRunner

from contract.checkpoint import fingerprint
from server_trunk import status
from server_trunk.cli import app
from tests.server_trunk.conftest import HIDDEN, RunningTrunk


def asked(address: str) -> Result:
    return CliRunner().invoke(app, ["status", address, "-o", "json"])


def test_a_trunk_that_serves_is_ready(trunk: RunningTrunk, model_dir: Path) -> None:
    done = asked(trunk.address)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["data"]
    assert (told["ready"], told["layers"], told["hidden_size"]) == (True, "1 to 2 of 4", HIDDEN)
    assert (told["model_fingerprint"], told["weights"]) == (fingerprint(model_dir), "plain")
    assert told["open_sessions"] <= told["max_sessions"]


def test_a_trunk_that_is_ending_is_not_ready(start_trunk: Callable[..., RunningTrunk]) -> None:
    ending = start_trunk()
    ending.run(ending.server._health.enter_graceful_shutdown())
    done = asked(ending.address)
    assert done.exit_code == 1
    assert json.loads(done.stdout)["data"]["ready"] is False
    assert "it takes no new sessions" in done.stderr


def test_where_nothing_answers_it_exits_with_three(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        done = asked(f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.exit_code == 3
    assert "no trunk answers at" in done.stderr


def test_another_grpc_server_is_named_as_none() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    done = asked(f"127.0.0.1:{port}")
    server.stop(None)
    assert done.exit_code == 1
    assert f"what listens at 127.0.0.1:{port} is no trunk: UNIMPLEMENTED" in done.stderr


def test_an_address_that_is_none_is_named() -> None:
    done = asked("nowhere")
    assert done.exit_code == 2
    assert "trunk is 'nowhere'; it must be HOST:PORT" in done.stderr


def test_another_protocol_is_told(trunk: RunningTrunk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "PROTOCOL", 99)
    assert "both sides need the same trunkline" in asked(trunk.address).stderr
