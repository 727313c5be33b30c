"""A live trunk as Prometheus sees it: the numbers are those of its progress, and nothing tells of quiet sessions."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from grpc._cython import cygrpc
from typer.testing import CliRunner

from contract import errors
from contract import trunk_pb2 as pb
from contract.logs import JsonFormatter
from server_trunk.cli import app
from server_trunk.memory import Spill
from server_trunk.watch import SessionSeen, Watch
from tests.scraping import Scrape, ask, documented
from tests.server_trunk.conftest import HIDDEN, RunningTrunk
from tests.server_trunk.wire_client import Refused, WireClient

PATIENCE_S = 60.0
PRE = "trunkline_trunk_"
HIDDEN_BTD = torch.zeros(2, 4, HIDDEN)
TOKENS = 8
StartTrunk = Callable[..., RunningTrunk]


def watched(start_trunk: StartTrunk, **options: object) -> RunningTrunk:
    return start_trunk(metrics="127.0.0.1:0", **options)


def scrape(trunk: RunningTrunk) -> Scrape:
    return Scrape(trunk.server.watch.address)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def stored(lora: pb.Lora) -> Callable[[WireClient], str]:
    """Puts a first adapter for rounds at the trunk; answers its id."""

    def store(client: WireClient) -> str:
        import hashlib

        session = client.session(client.hello(lora))
        data = session.read()
        session.close()
        return client.put_adapter(hashlib.sha256(data).hexdigest(), data)

    return store


def test_the_numbers_are_those_of_the_rounds_progress(
    start_trunk: StartTrunk, lora: pb.Lora, stored: Callable[[WireClient], str]
) -> None:
    trunk = watched(start_trunk)
    client = WireClient(trunk.address)
    sha256 = stored(client)
    before = scrape(trunk)
    round_id = pb.RoundId(run="watched", round=1, attempt=1)
    for number in range(2):
        session = client.session(client.hello(lora, client_id=f"c{number}", round=round_id, adapter_sha256=sha256))
        for _ in range(3):
            session.backward(session.forward(HIDDEN_BTD))
        session.forward(HIDDEN_BTD, need_grad=False)
        session.step()
        session.close(trained_tokens=9, contribute=True)
    client.call("CommitRound", pb.CommitRoundRequest(round=round_id, base_sha256=sha256, survivors=["c0", "c1"]))
    until(lambda: scrape(trunk).value(f"{PRE}sessions_total", outcome="closed") == 3)
    progress, seen = client.call("Progress", round_id), scrape(trunk)

    def risen(name: str, **labels: str) -> float:
        return seen.value(PRE + name, **labels) - before.value(PRE + name, **labels)

    assert progress.tokens == risen("tokens_total") == 2 * 3 * TOKENS
    assert progress.steps == risen("steps_total") == 2
    assert progress.received_bytes == risen("received_bytes_total") > 0
    assert progress.sent_bytes == risen("sent_bytes_total") > 0
    assert (risen("forwards_total"), risen("backwards_total"), risen("commits_total")) == (8, 6, 1)
    assert risen("pass_tokens_sum", kind="forward") == 8 * TOKENS
    assert risen("pass_clients_count", kind="backward") == risen("pass_seconds_count", kind="backward") == 6
    assert risen("queue_seconds_count", kind="forward") == 8
    assert risen("pass_seconds_sum", kind="forward") > 0
    assert (seen.value(f"{PRE}sessions_open"), seen.value(f"{PRE}sessions_limit")) == (0, 64)
    assert seen.value(f"{PRE}pending_graphs") == 0
    assert seen.value(f"{PRE}memory_limit_bytes", kind="waiting") > 0
    assert seen.finite()
    assert seen.labels() <= {"le", "kind", "outcome", "error", "version", "model", "cut", "dtype", "device"}


def test_the_page_has_every_metric_with_its_type_and_its_meaning(start_trunk: StartTrunk) -> None:
    assert scrape(watched(start_trunk)).described() == documented(PRE)


def test_clients_are_named_where_that_is_asked_for(
    start_trunk: StartTrunk, lora: pb.Lora, stored: Callable[[WireClient], str]
) -> None:
    trunk = watched(start_trunk, client_metrics=True)
    client = WireClient(trunk.address)
    sha256 = stored(client)
    for name, steps, quiet in (("north", 2, False), ("south", 1, False), ("north", 1, False), ("west", 1, True)):
        round_id = pb.RoundId(run="watched", round=1, attempt=1)
        hello = client.hello(lora, client_id=name, round=round_id, adapter_sha256=sha256, quiet=quiet)
        session = client.session(hello)
        for _ in range(steps):
            session.backward(session.forward(HIDDEN_BTD))
            session.step()
        session.close()
    until(lambda: scrape(trunk).value(f"{PRE}sessions_total", outcome="closed") == 5)
    seen = scrape(trunk)
    assert [seen.value(f"{PRE}client_steps_total", client=name) for name in ("north", "south")] == [3, 1]
    assert [seen.value(f"{PRE}client_tokens_total", client=name) for name in ("north", "south")] == [3 * TOKENS, TOKENS]
    names = {sample.labels["client"] for sample in seen.families[f"{PRE}client_steps"].samples}
    assert names == {"", "north", "south"}, "who stored the adapter is of no round, and none is the quiet session's"
    for counted in ("steps", "tokens", "received_bytes", "sent_bytes"):
        by_client = [seen.value(f"{PRE}client_{counted}_total", client=name) for name in names]
        assert sum(by_client) == seen.value(f"{PRE}{counted}_total") > 0, counted
    assert seen.described() == documented(PRE, by_client=True)


def test_what_is_held_shows_while_it_is_held(start_trunk: StartTrunk, lora: pb.Lora) -> None:
    trunk = watched(start_trunk)
    client = WireClient(trunk.address)
    session = client.session(client.hello(lora))
    session.forward(HIDDEN_BTD)
    seen = scrape(trunk)
    assert (seen.value(f"{PRE}sessions_open"), seen.value(f"{PRE}pending_graphs")) == (1, 1)
    assert seen.value(f"{PRE}memory_bytes", kind="waiting") >= 3 * HIDDEN_BTD.numel() * 4
    assert seen.value(f"{PRE}memory_bytes", kind="adapters") > 0
    until(lambda: scrape(trunk).value(f"{PRE}received_bytes_total") > 0)  # an open session counts too
    session.call.cancel()
    until(lambda: scrape(trunk).value(f"{PRE}sessions_total", outcome="dropped") == 1)
    assert scrape(trunk).value(f"{PRE}memory_bytes", kind="waiting") == 0


def test_short_memory_shows_as_recomputes_evictions_and_bytes_on_disk(
    start_trunk: StartTrunk, lora: pb.Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server_trunk.server.choose_budget", lambda asked, device: 60000)
    monkeypatch.setattr("server_trunk.server._FOR_WAITING", 0.1)
    monkeypatch.setattr("server_trunk.server._FOR_PASSES", 1000.0)
    monkeypatch.setattr("server_trunk.server._FOR_ADAPTERS", 0.0)
    spilled = []
    place = Spill.place
    monkeypatch.setattr(Spill, "place", lambda spill, size: (spilled.append(size), place(spill, size))[1])
    trunk = watched(start_trunk, lanes=1)
    client = WireClient(trunk.address)
    session = client.session(client.hello(lora))
    for _ in range(3):
        session.forward(HIDDEN_BTD)
    held = scrape(trunk)
    for microbatch in (1, 2, 3):
        session.backward(HIDDEN_BTD, microbatch=microbatch)
    session.step()
    until(lambda: scrape(trunk).value(f"{PRE}evictions_total") > 0)
    seen = scrape(trunk)
    assert spilled
    assert held.value(f"{PRE}spill_bytes") == seen.value(f"{PRE}spilled_bytes_total") == sum(spilled)
    assert seen.value(f"{PRE}spill_bytes") == 0
    assert seen.value(f"{PRE}recomputes_total") == 3


def test_refusals_and_failures_are_counted_by_their_kind(start_trunk: StartTrunk, lora: pb.Lora) -> None:
    trunk = watched(start_trunk)
    client = WireClient(trunk.address)
    for fields in ({"protocol": 999}, {"trainable": "x" * 50}):
        with pytest.raises(Refused):
            client.session(client.hello(lora, **fields))
    session = client.session(client.hello(lora))
    session.send(step=pb.Step(lr=float("nan")))
    assert session.ending().error is errors.FrameError
    until(lambda: scrape(trunk).value(f"{PRE}sessions_failed_total", error="FrameError") == 1)
    seen = scrape(trunk)
    assert seen.value(f"{PRE}sessions_total", outcome="refused") == 2
    assert seen.value(f"{PRE}hellos_refused_total", error="AgreementError") == 1
    assert seen.value(f"{PRE}hellos_refused_total", error="FrameError") == 1


def test_of_a_quiet_session_no_more_shows_than_that_it_was_there(start_trunk: StartTrunk, lora: pb.Lora) -> None:
    trunk = watched(start_trunk)
    client = WireClient(trunk.address)
    session = client.session(client.hello(lora, quiet=True))
    session.backward(session.forward(HIDDEN_BTD))
    session.step()
    session.close()
    until(lambda: scrape(trunk).value(f"{PRE}sessions_total", outcome="closed") == 1)
    seen = scrape(trunk)
    for name in ("tokens", "steps", "forwards", "backwards", "received_bytes", "sent_bytes"):
        assert seen.value(f"{PRE}{name}_total") == 0, name
    for kind in ("forward", "backward", "other"):
        assert (
            seen.value(f"{PRE}pass_seconds_count", kind=kind) == seen.value(f"{PRE}queue_seconds_count", kind=kind) == 0
        )


def test_a_draining_trunk_is_alive_and_not_ready(start_trunk: StartTrunk, lora: pb.Lora) -> None:
    trunk = watched(start_trunk, grace_s=PATIENCE_S)
    address = trunk.server.watch.address
    client = WireClient(trunk.address)
    session = client.session(client.hello(lora))
    assert ask(address, "/readyz") == ask(address, "/healthz") == (200, "ok\n")
    drained = asyncio.run_coroutine_threadsafe(trunk.server.drain(asyncio.Event()), trunk.loop)
    until(lambda: ask(address, "/readyz")[0] == 503)
    assert ask(address, "/readyz")[1] == "it takes no new sessions\n"
    assert ask(address, "/healthz")[0] == 200
    session.close()
    drained.result(PATIENCE_S)
    with pytest.raises(OSError, match="refused"):
        ask(address, "/healthz")


def test_a_stuck_event_loop_is_told(start_trunk: StartTrunk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_trunk.watch.ANSWER_S", 0.2)
    trunk = watched(start_trunk)
    address = trunk.server.watch.address
    go = threading.Event()
    trunk.loop.call_soon_threadsafe(go.wait, PATIENCE_S)
    try:
        assert ask(address, "/healthz") == (503, "the trunk's event loop has not answered for 0.2 s\n")
        assert ask(address, "/metrics") == (503, "the process does not answer\n")
    finally:
        go.set()
    until(lambda: ask(address, "/healthz")[0] == 200)


def test_without_the_option_nothing_listens(start_trunk: StartTrunk) -> None:
    trunk = start_trunk()
    assert trunk.server.watch.address == ""
    assert trunk.server.watch.metrics is None


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("9100", "metrics is '9100'; it must be HOST:PORT"),
        ("0.0.0.0:9100", "metrics is '0.0.0.0:9100', which other machines can reach"),
    ],
)
def test_a_bad_address_is_told_before_the_model_is_loaded(value: str, told: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", "--model", str(tmp_path / "none"), "--metrics", value])
    assert result.exit_code == 2
    assert told in result.stderr
    assert "is not a directory" not in result.stderr


def test_clients_cannot_be_named_where_no_metrics_are_served(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", "--model", str(tmp_path / "none"), "--client-metrics"])
    assert result.exit_code == 2
    told = "error: client-metrics is given without metrics, HOST:PORT, where they would be served\n"
    assert result.stderr.endswith(told)
    assert "is not a directory" not in result.stderr


def test_an_unknown_log_format_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUNKLINE_LOG_FORMAT", "xml")
    result = CliRunner().invoke(app, ["serve", "--model", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert result.stderr == "error: TRUNKLINE_LOG_FORMAT is 'xml'; it must be json or text\n"


def test_a_busy_metrics_port_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = ["--model", str(model_dir), "--listen", "127.0.0.1:0", "--state-dir", str(tmp_path / "state")]
        result = CliRunner().invoke(app, ["serve", *arguments, "--metrics", address])
    assert result.exit_code == 1
    assert f"error: cannot serve the trunk's metrics at {address}: Address already in use" in result.stderr


def test_a_client_that_went_away_is_one_line_and_any_other_error_its_traceback(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = """
import logging
from grpc._cython import cygrpc
from server_trunk.log import speak
speak()
for error in (cygrpc.ExecuteBatchError("execute_batch"), ValueError("other")):
    try:
        raise error
    except Exception:
        logging.getLogger("grpc._cython.cygrpc").exception("raised by servicer method")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    gone, *rest = capfd.readouterr().err.splitlines()
    assert gone.endswith("INFO grpc._cython.cygrpc: a client went away before it had its answer")
    assert rest[0].endswith("ERROR grpc._cython.cygrpc: raised by servicer method")
    assert rest[-1] == "ValueError: other"


@pytest.fixture
def lines() -> Iterator[list[dict[str, object]]]:
    """The trunk's log as JSON."""
    found: list[dict[str, object]] = []
    logger, handler = logging.getLogger("trunkline.server_trunk"), logging.Handler()
    handler.emit = lambda record: found.append(json.loads(JsonFormatter().format(record)))  # type: ignore[method-assign]
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_session_whose_client_went_away_before_its_answer_was_dropped_and_did_not_fail(
    lines: list[dict[str, object]],
) -> None:
    for error, outcome in ((cygrpc.ExecuteBatchError("execute_batch"), "dropped"), (ValueError("other"), "failed")):
        seen = SessionSeen(Watch(), "")
        seen._session = cast(Any, SimpleNamespace(session_id="a-session", closed=False))
        seen.ended(error)
        assert lines[-1]["message"] == f"session a-session: {outcome}"


def test_a_sessions_lines_name_its_round_and_its_client(
    start_trunk: StartTrunk, lora: pb.Lora, stored: Callable[[WireClient], str], lines: list[dict[str, object]]
) -> None:
    trunk = start_trunk()
    client = WireClient(trunk.address)
    sha256 = stored(client)
    round_id = pb.RoundId(run="watched", round=2, attempt=3)
    session = client.session(client.hello(lora, client_id="north", round=round_id, adapter_sha256=sha256))
    session.send(step=pb.Step(lr=float("nan")))
    session.ending()
    until(lambda: any("failed" in str(line["message"]) for line in lines))
    told = [line for line in lines if line.get("client") == "north"]
    assert {str(line["message"]).partition(" ")[0] for line in told} == {"session"}
    assert len(told) == 2, "how it ended, and what was refused"
    assert all((line["run"], line["round"], line["attempt"]) == ("watched", 2, 3) for line in told)
