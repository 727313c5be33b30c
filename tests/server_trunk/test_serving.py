"""A trunk's life: start, health, drain, and the command line around it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from contract import errors
from contract import trunk_pb2 as pb
from contract.checkpoint import fingerprint
from contract.records import CutLayers
from server_trunk.cli import app, model_app
from server_trunk.port import check_listen
from server_trunk.server import ServeOptions, TrunkServer
from tests.server_trunk.conftest import HIDDEN, RunningTrunk, save_llama
from tests.server_trunk.wire_client import Refused, WireClient

ROOT = Path(__file__).resolve().parents[2]
HIDDEN_BTD = torch.zeros(1, 4, HIDDEN)


def health(client: WireClient, service: str = "") -> str:
    reply = health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def test_a_trunk_describes_itself_and_is_healthy(client: WireClient, model_dir: Path) -> None:
    described = client.call("Describe", pb.DescribeRequest())
    assert described.protocol == 2
    assert list(described.codecs) == ["identity", "bf16", "fp16", "int8", "int4-delta"]
    assert (described.layers, described.hidden_size, described.max_tokens) == (4, HIDDEN, 64)
    assert (described.model.head_layers, described.model.tail_layers) == (1, 1)
    assert described.model.fingerprint == fingerprint(model_dir)
    assert described.max_sessions == 8
    assert health(client) == health(client, "trunkline.v1.Trunk") == "SERVING"


def test_a_client_that_vanishes_gives_its_place_back(client: WireClient, lora: pb.Lora) -> None:
    before = client.call("Describe", pb.DescribeRequest()).open_sessions
    session = client.session(client.hello(lora))
    session.forward(HIDDEN_BTD)
    assert client.call("Describe", pb.DescribeRequest()).open_sessions == before + 1
    session.call.cancel()
    deadline = time.monotonic() + 5
    while client.call("Describe", pb.DescribeRequest()).open_sessions != before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_draining_lets_open_sessions_finish_and_admits_no_others(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    trunk = start_trunk(grace_s=20.0)
    client = WireClient(trunk.address)
    session = client.session(client.hello(lora))
    hello = client.hello(lora)
    drained = asyncio.run_coroutine_threadsafe(trunk.server.drain(asyncio.Event()), trunk.loop)
    deadline = time.monotonic() + 5
    while health(client) != "NOT_SERVING":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(Refused) as caught:
        client.session(hello)
    assert caught.value.error is errors.ConnectionFailedError
    assert caught.value.status is grpc.StatusCode.UNAVAILABLE
    assert caught.value.line == "this trunk is shutting down and takes no new sessions"
    session.forward(HIDDEN_BTD)
    session.backward(HIDDEN_BTD)
    assert not drained.done()
    session.close()
    drained.result(10)


def test_sessions_that_outlast_the_grace_period_are_cut_off_as_unavailable(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    trunk = start_trunk(grace_s=0.2)
    client = WireClient(trunk.address)
    session = client.session(client.hello(lora))
    started = time.monotonic()
    asyncio.run_coroutine_threadsafe(trunk.server.drain(asyncio.Event()), trunk.loop)
    refused = session.ending()
    assert refused.status is grpc.StatusCode.UNAVAILABLE
    assert refused.error is errors.ConnectionFailedError
    assert refused.line == "this trunk is shutting down; the session is lost"
    assert 0.1 < time.monotonic() - started < 5


def test_a_second_signal_ends_the_grace_period(start_trunk: Callable[..., RunningTrunk], lora: pb.Lora) -> None:
    trunk = start_trunk(grace_s=60.0)
    client = WireClient(trunk.address)
    session = client.session(client.hello(lora))
    hurry = asyncio.Event()
    drained = asyncio.run_coroutine_threadsafe(trunk.server.drain(hurry), trunk.loop)
    time.sleep(0.2)
    assert not drained.done()
    trunk.loop.call_soon_threadsafe(hurry.set)
    assert session.ending().status is grpc.StatusCode.UNAVAILABLE
    drained.result(10)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:50051", "[::1]:0", "127.8.8.8:1"])
def test_loopback_needs_no_leave(listen: str) -> None:
    check_listen(listen, insecure=False)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "10.1.2.3:50051", "[::]:0", "trunk.example:50051"])
def test_an_address_that_others_reach_needs_leave(listen: str) -> None:
    with pytest.raises(errors.ConfigError, match="--insecure-listen"):
        check_listen(listen, insecure=False)
    check_listen(listen, insecure=True)


@pytest.mark.parametrize(
    "listen", ["50051", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", ":50051", "127.0.0.1:\u00b2"]
)
def test_a_malformed_address_is_named(listen: str) -> None:
    with pytest.raises(errors.ConfigError, match="it must be HOST:PORT"):
        check_listen(listen, insecure=True)


def test_an_absent_device_is_told_at_once(model_dir: Path, tmp_path: Path) -> None:
    options = ServeOptions(str(model_dir), CutLayers(1, 1), "127.0.0.1:0", tmp_path, device="tpu")
    with pytest.raises(errors.ConfigError, match="device is 'tpu'; it must be auto, cpu or cuda"):
        TrunkServer(options)


# ---- the command line ----------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


@contextmanager
def serving(directory: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    announce = directory / "address"
    process = subprocess.Popen(
        [sys.executable, "-c", "from server_trunk.cli import app; app()", "serve", *arguments]
        + ["--state-dir", str(directory / "state"), "--announce-file", str(announce)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not announce.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process, announce.read_text().strip()
    finally:
        process.kill()
        process.wait(10)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def test_the_command_serves_until_sigterm_and_a_busy_port_is_one_line(
    model_dir: Path, tmp_path: Path, lora: pb.Lora
) -> None:
    with serving(tmp_path, "--model", str(model_dir), "--listen", "127.0.0.1:0") as (process, address):
        state = ("--state-dir", str(tmp_path / "other"))
        busy = CliRunner().invoke(app, ["serve", "--model", str(model_dir), "--listen", address, *state])
        assert busy.exit_code == 1
        assert busy.stdout == ""
        assert busy.stderr.splitlines() == [
            f"loading the trunk of {model_dir}",
            f"error: cannot listen on {address}: Address already in use; name another port, or 0 for a free one",
        ]

        client = WireClient(address)
        session = client.session(client.hello(lora))
        session.forward(HIDDEN_BTD)
        process.send_signal(signal.SIGTERM)
        session.backward(HIDDEN_BTD)
        session.close()
        client.close()
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out == ""
    assert f"trunk ready {address} (layers 1 to 2 of 4" in err
    assert "draining" in err
    assert "Traceback" not in err


def test_a_model_that_is_none_is_one_line(tmp_path: Path) -> None:
    arguments = ["--model", str(tmp_path / "none"), "--listen", "127.0.0.1:0", "--state-dir", str(tmp_path / "state")]
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[1:] == [
        f"error: model '{tmp_path}/none' is not a directory; it must hold config.json and safetensors"
    ]


def test_split_writes_parts_that_serve_and_says_their_sizes(
    tmp_path: Path, lora: pb.Lora, start_trunk: Callable[..., RunningTrunk]
) -> None:
    whole, parts = save_llama(tmp_path / "whole"), tmp_path / "parts"
    result = CliRunner().invoke(model_app, ["split", str(whole), "--out", str(parts), "-o", "json"])
    assert result.exit_code == 0, result.stderr
    rows = {row["part"]: row for row in json.loads(result.stdout)["data"]}
    assert rows["client"]["size_bytes"] + rows["trunk"]["size_bytes"] == rows["whole"]["size_bytes"]
    weights = sum(file.stat().st_size for file in (parts / "trunk").glob("*.safetensors"))
    assert rows["trunk"]["size_bytes"] == pytest.approx(weights, rel=0.1)

    sessions = []
    for directory in (whole, parts / "trunk"):
        client = WireClient(start_trunk(model=str(directory)).address)
        sessions.append(client.session(client.hello(lora)))
    assert torch.equal(*(session.forward(torch.ones(1, 4, HIDDEN)) for session in sessions))

    again = CliRunner().invoke(model_app, ["split", str(whole), "--out", str(parts)])
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_the_command_line_imports_no_torch() -> None:
    code = "import sys, server_trunk.cli; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60, check=False).returncode == 0


def test_two_trunks_cannot_share_a_port(start_trunk: Callable[..., RunningTrunk]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(errors.ListenError, match="Address already in use"):
            start_trunk(listen=f"127.0.0.1:{taken.getsockname()[1]}")
    first = start_trunk()
    with pytest.raises(errors.ListenError, match="Address already in use"):
        start_trunk(listen=first.address)
