"""One trace runs from the orchestrator's round through each client's to its session at a real trunk."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contract import traces
from contract.errors import QuorumError
from tests.clients.capture import Capture
from tests.clients.real_run import conducted, settings
from tests.clients.sites import Site, write_texts
from tests.conftest import TrunkProcess
from tests.otlp import Receiver, SpanSeen

pytestmark = pytest.mark.usefixtures("flower_task")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    made = Receiver()
    monkeypatch.setenv(traces.VARIABLES[0], made.endpoint)
    yield made
    made.close()


def sites(llama_dir: Path, address: str, folder: Path) -> list[Site]:
    found = []
    for number in (1, 2):
        data = write_texts(folder / f"site {number}.jsonl", rows=8, seed=number)
        config = {"model": str(llama_dir), "data": str(data), "trunk-address": address, "name": f"site-{number}"}
        found.append(Site(number, dict(config)))
    return found


def test_a_trace_runs_from_the_round_to_the_trunks_sessions(
    llama_dir: Path, trunk_process: Callable[..., TrunkProcess], tmp_path: Path, receiver: Receiver
) -> None:
    trunk = trunk_process(llama_dir, 1, 1)  # started with the receiver's address in its environment
    config = settings(llama_dir, trunk.address, quorum=2)
    run_id = conducted(tmp_path / "home", config, sites(llama_dir, trunk.address, tmp_path)).run_id
    trunk.process.send_signal(signal.SIGTERM)
    assert trunk.process.wait(60) == 0

    by_id: dict[str, SpanSeen] = {span.span_id: span for span in receiver.spans}
    (round_,) = receiver.named("round")
    assert round_.error == ""
    assert round_.service == "trunkline-orchestrator"
    assert round_.parent_id == ""
    assert round_.attributes == {
        "trunkline.run": run_id, "trunkline.round": 1, "trunkline.attempt": 1, "trunkline.clients": 2
    }  # fmt: skip
    phases = [span.name for span in receiver.spans if span.parent_id == round_.span_id]
    assert sorted(phases) == ["phase averaging", "phase cohort", "phase storing", "phase training"]
    (training,) = receiver.named("phase training")
    trained = [span for span in receiver.named("client round") if span.parent_id == training.span_id]
    assert {span.attributes["trunkline.client"] for span in trained} == {"site-1", "site-2"}
    sessions = [span for span in receiver.named("trunk session") if span.trace_id == round_.trace_id]
    assert {by_id[span.parent_id].attributes["trunkline.client"] for span in sessions} == {"site-1", "site-2"}
    for span in (training, *trained, *sessions):
        assert span.trace_id == round_.trace_id
        parent = by_id[span.parent_id]
        assert parent.began_ns <= span.began_ns <= span.ended_ns
    assert {span.attributes["trunkline.outcome"] for span in sessions} == {"closed"}
    assert all(span.attributes["trunkline.run"] == run_id for span in receiver.spans)
    (judging,) = receiver.named("phase judging")
    judged = [span for span in receiver.named("client round") if span.parent_id == judging.span_id]
    assert len(judged) == 2
    assert (by_id[judging.parent_id].name, by_id[judging.parent_id].error) == ("judgement", "")
    tells_nothing_more(receiver)


def tells_nothing_more(receiver: Receiver) -> None:
    """Names, times and these attributes are all that a span has: no text, no tensor, no count of tokens."""
    known = {f"trunkline.{name}" for name in ("run", "round", "attempt", "client", "clients", "outcome")}
    for span in receiver.spans:
        assert span.attributes.keys() <= known


def test_a_round_that_fails_is_an_error_of_its_span(
    llama_dir: Path, trunk: TrunkProcess, tmp_path: Path, receiver: Receiver
) -> None:
    config = settings(llama_dir, trunk.address, quorum=2)
    first, second = sites(llama_dir, trunk.address, tmp_path)
    second.node_config["data"] = str(tmp_path / "not there.jsonl")
    with pytest.raises(QuorumError):
        conducted(tmp_path / "home", config, [first, second])
    (round_,) = receiver.named("round")
    assert round_.error == "unfinished"
    failed = [span for span in receiver.named("client round") if span.error]
    assert [(span.attributes["trunkline.client"], span.error) for span in failed] == [("site-2", "DataError")]


def test_the_traceparent_is_all_that_leaves_a_site_for_it_and_only_while_it_traces(
    llama_dir: Path, trunk: TrunkProcess, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = []
    for traced in (True, False):
        if not traced:
            monkeypatch.delenv(traces.VARIABLES[0])
        capture = Capture(trunk.address)
        config = settings(llama_dir, capture.address)
        folder = tmp_path / f"traced {traced}"
        folder.mkdir()
        conducted(folder / "home", config, sites(llama_dir, capture.address, folder)[:1])
        captured.append(capture.raw())
        capture.close()
    with_trace, without = captured
    assert traces.HEADER.encode() in with_trace
    assert traces.HEADER.encode() not in without


def test_a_parent_that_is_none_begins_a_trace_of_its_own(receiver: Receiver) -> None:
    tracer = traces.tracer("trunkline-tested")
    assert tracer is not None
    for parent in ("", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 5000):
        tracer.begin("alone", parent).end()
    tracer.close()
    found = receiver.named("alone")
    assert [span.parent_id for span in found] == [""] * 4
    assert len({span.trace_id for span in found}) == 4


def test_without_the_variable_or_the_extra_or_by_a_bad_setting_nothing_is_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in traces.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert traces.tracer("trunkline-tested") is None
    monkeypatch.setenv(traces.VARIABLES[0], "http://127.0.0.1:1")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
        assert traces.tracer("trunkline-tested") is None
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10")
    assert traces.tracer("trunkline-tested") is None
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["no traces", "no traces"]


def test_where_no_traces_are_asked_for_nothing_of_them_is_imported() -> None:
    code = (
        "import sys\nfrom contract import traces\nfrom server_trunk import server\nfrom orchestrator import run\n"
        "from clients import participation\nassert traces.tracer('x') is None\n"
        "found = sorted(name for name in sys.modules if name.split('.')[0] in ('opentelemetry', 'mlflow'))\n"
        "sys.exit(f'imported {found[:3]}' if found else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_receiver_that_is_gone_holds_nobody_up_for_long(
    llama_dir: Path, trunk: TrunkProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(traces.VARIABLES[0], "http://127.0.0.1:1")
    config = settings(llama_dir, trunk.address)
    assert conducted(tmp_path / "home", config, sites(llama_dir, trunk.address, tmp_path)[:1]).round == 1
