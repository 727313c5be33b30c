"""A trunk's operator sees who works with it, no more of private sessions than their round tells, and can end it."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from contract import output
from contract import trunk_pb2 as pb
from contract.errors import ConfigError, ConnectionFailedError
from contract.trunk_pb2_grpc import TrunkAdminStub
from server_trunk.admin_calls import TrunkOperator
from server_trunk.cli import app
from storage.store import open_reader, open_store
from tests.server_trunk.conftest import HIDDEN, RunningTrunk
from tests.server_trunk.test_serving import serving
from tests.server_trunk.wire_client import WireClient, WireSession

HIDDEN_BTD = torch.ones(1, 4, HIDDEN)
LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)


def trunkline_trunk(*arguments: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=typed)


def data(*arguments: str) -> Any:
    done = trunkline_trunk(*arguments, "-o", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["data"]


def in_a_round(client: WireClient, lora: pb.Lora, who: str, **fields: Any) -> WireSession:
    sha256 = client.first_adapter(lora)
    key = pb.RoundId(run="r1", round=2, attempt=3)
    return client.session(client.hello(lora, client_id=who, adapter_sha256=sha256, round=key, **fields))


def test_open_sessions_are_listed_with_what_they_did(start_trunk: Callable[..., RunningTrunk], lora: pb.Lora) -> None:
    trunk = start_trunk()
    client = WireClient(trunk.address)
    assert data("sessions", trunk.address) == []
    first, second = client.session(client.hello(lora, client_id="own")), in_a_round(client, lora, "ward")
    second.forward(HIDDEN_BTD)
    second.backward(HIDDEN_BTD)
    second.forward(HIDDEN_BTD)
    own, ward = data("sessions", trunk.address)
    assert (own["client"], own["run"], own["steps"], own["pending"]) == ("own", None, 0, 0)
    assert (ward["client"], ward["run"], ward["round"], ward["attempt"]) == ("ward", "r1", 2, 3)
    assert (ward["tokens"], ward["pending"], ward["quiet"]) == (8, 1, False)
    assert ward["received_bytes"] > 0 < ward["sent_bytes"]
    assert 0 <= ward["idle_s"] <= ward["open_s"] <= own["open_s"]
    assert [row["client"] for row in data("sessions", trunk.address, "--client", "ward")] == ["ward"]
    assert [row["client"] for row in data("sessions", trunk.address, "--run", "r1")] == ["ward"]
    assert [row["client"] for row in data("sessions", trunk.address, "--limit", "1")] == ["ward"]
    assert [row["client"] for row in data("sessions", trunk.address, "--since", "2020-01-01")] == ["own", "ward"]
    assert data("sessions", trunk.address, "--since", "2999-01-01") == []
    assert f"trunk {trunk.address}: 2 sessions" in trunkline_trunk("sessions", trunk.address).stdout
    for session in (first, second):
        session.close()


def test_of_a_private_session_no_count_and_no_moment_of_a_frame_is_told(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    trunk = start_trunk()
    client = WireClient(trunk.address)
    session = in_a_round(client, lora, "ward", quiet=True)
    session.forward(HIDDEN_BTD)
    session.backward(HIDDEN_BTD)
    session.forward(HIDDEN_BTD)
    (row,) = data("sessions", trunk.address)
    assert row["quiet"] is True
    assert {row[name] for name in ("steps", "tokens", "received_bytes", "sent_bytes", "pending")} == {None}
    told = TrunkAdminStub(client.channel).Sessions(pb.SessionsRequest(), timeout=LIMIT_S).sessions[0]
    assert (told.steps, told.tokens, told.received_bytes, told.sent_bytes, told.pending) == (0, 0, 0, 0, 0)
    before = row["idle_s"]
    session.backward(HIDDEN_BTD)
    (after,) = data("sessions", trunk.address)
    assert after["idle_s"] > before, "a frame of a private session showed in how long it was idle"
    session.close()


@pytest.mark.parametrize("grace_s", [-1.0, 86_401.0, math.inf, math.nan])
def test_a_grace_that_is_none_is_refused_by_name_and_drains_nothing(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, grace_s: float
) -> None:
    trunk = start_trunk()
    operator = TrunkOperator(trunk.address)
    with pytest.raises(ConfigError, match="grace_s is .*; it must be 0 to 86400 seconds"):
        operator.drain(grace_s, "ada")
    operator.close()
    done = trunkline_trunk("drain", trunk.address, "--grace-s", str(grace_s), "--yes")
    assert done.exit_code == 2
    assert "it must be 0 to 86400 seconds" in done.stderr
    assert not trunk.server.told_to_end.is_set()
    client = WireClient(trunk.address)
    client.session(client.hello(lora)).close()


def test_a_dry_run_tells_who_would_be_cut_off_and_drains_nothing(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    trunk = start_trunk()
    client = WireClient(trunk.address)
    session = client.session(client.hello(lora, client_id="ward"))
    told = data("drain", trunk.address, "--grace-s", "5", "--dry-run")
    assert told == {"address": trunk.address, "open_sessions": 1, "grace_s": 5.0, "clients": ["ward"]}
    assert not trunk.server.told_to_end.is_set()
    session.close()


def test_without_a_terminal_or_agreement_nothing_is_drained(
    start_trunk: Callable[..., RunningTrunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = start_trunk()
    refused = trunkline_trunk("drain", trunk.address)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "there is no terminal to ask at: give --yes" in refused.stderr
    monkeypatch.setattr(output, "has_terminal", lambda: True)
    declined = trunkline_trunk("drain", trunk.address, typed="n\n")
    assert declined.exit_code == 1
    assert f"Drain trunk {trunk.address}? Its 0 sessions get 30 s" in declined.stderr
    assert not trunk.server.told_to_end.is_set()


def test_where_no_trunk_answers_both_exit_with_three() -> None:
    for arguments in (("sessions", "127.0.0.1:9"), ("drain", "127.0.0.1:9", "--yes")):
        done = trunkline_trunk(*arguments)
        assert done.exit_code == 3
        assert "no trunk answers at 127.0.0.1:9" in done.stderr


def test_a_drained_trunk_takes_nobody_lets_the_open_finish_and_ends_well(
    model_dir: Path, tmp_path: Path, lora: pb.Lora
) -> None:
    open_store().close()
    with serving(tmp_path, "--model", str(model_dir), "--listen", "127.0.0.1:0") as (process, address):
        client = WireClient(address)
        session = client.session(client.hello(lora))
        hello = client.hello(lora)
        told = data("drain", address, "--grace-s", "600", "--yes", "--operator", "ada")
        assert told == {"address": address, "open_sessions": 1, "grace_s": 600.0}
        with pytest.raises(Exception, match="shutting down and takes no new sessions"):
            client.session(hello)
        assert len(data("sessions", address)) == 1, "the operator can look while it drains"
        session.forward(HIDDEN_BTD)
        session.backward(HIDDEN_BTD)
        session.close()
        client.close()
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    assert "'ada' has the trunk drained: 1 sessions get 600 s" in err
    reader = open_reader()
    (entry,) = reader.audit_log()
    reader.close()
    assert (entry.operator, entry.action, entry.target) == ("ada", "trunk-drained", address)
    assert entry.detail == {"grace_s": 600.0, "open_sessions": 1}


def test_drained_again_the_shorter_grace_counts_and_sessions_are_cut_off(
    model_dir: Path, tmp_path: Path, lora: pb.Lora
) -> None:
    with serving(tmp_path, "--model", str(model_dir), "--listen", "127.0.0.1:0") as (process, address):
        client = WireClient(address)
        session = client.session(client.hello(lora))
        first = trunkline_trunk("drain", address, "--grace-s", "3600", "--yes")
        assert first.exit_code == 0, first.output
        assert "this machine has no database: only the trunk's own log says who drained it" in first.stderr
        assert process.poll() is None
        assert trunkline_trunk("drain", address, "--grace-s", "0.1", "--yes").exit_code == 0
        assert "shutting down; the session is lost" in session.ending().line
        _, err = process.communicate(timeout=LIMIT_S)
        client.close()
    assert process.returncode == 0
    assert "1 sessions were still open and are cut off" in err


def test_a_signal_while_it_drains_leaves_no_more_than_its_own_grace(
    model_dir: Path, tmp_path: Path, lora: pb.Lora
) -> None:
    arguments = ("--model", str(model_dir), "--listen", "127.0.0.1:0", "--grace-s", "0.2")
    with serving(tmp_path, *arguments) as (process, address):
        client = WireClient(address)
        session = client.session(client.hello(lora))
        assert trunkline_trunk("drain", address, "--grace-s", "3600", "--yes").exit_code == 0
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert "the session is lost" in session.ending().line
        process.communicate(timeout=LIMIT_S)
        client.close()
    assert process.returncode == 0


def test_an_unreachable_database_is_told_before_anything_is_drained(
    start_trunk: Callable[..., RunningTrunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = start_trunk()
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    done = trunkline_trunk("drain", trunk.address, "--yes")
    assert done.exit_code == ConnectionFailedError.exit_code
    assert "no database answers at" in done.stderr
    assert not trunk.server.told_to_end.is_set()
