"""A run as those see it who watch: scraped while it goes, drawn afterwards, and never held up by any of them."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from flwr.app import Error, Message

from contract.errors import ConfigError, ConnectionFailedError, LeaseError
from contract.records import RoundKey, RoundProgress
from orchestrator.audience import Audience, Listener
from orchestrator.lease import Lease
from orchestrator.run_metrics import CALL_S, Health, RunMetrics, failure_kind
from orchestrator.trunk import ServedModel, Trunk
from orchestrator.watchers import CLIENT_METRICS, INSECURE_METRICS, METRICS
from storage.ledger import open_ledger
from storage.records import RoundCommit
from tests.orchestrator.conftest import Bench
from tests.orchestrator.fakes import Content, FakeNode, is_training
from tests.orchestrator.private_runs import conducted_privately
from tests.orchestrator.secure_fakes import SecureClient
from tests.scraping import Scrape, ask, documented

MakeBench = Callable[..., Bench]
PRE = "trunkline_orchestrator_"


class Looker:
    """Scrapes a run whenever its first client trains, and when the last adapter is judged."""

    def __init__(self, bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
        self.scrapes: list[Scrape] = []
        self.answers: list[tuple[int, str]] = []
        self.traced: list[str] = []
        self._bench, self._caplog = bench, caplog
        node = min(bench.grid.nodes)
        self._work = bench.grid.nodes[node].work
        bench.grid.nodes[node] = FakeNode(self.look)

    @property
    def address(self) -> str:
        found = re.findall(r"metrics at http://(\S+)/metrics", self._caplog.text)
        return str(found[-1])

    def look(self, message: Message) -> Content:
        self.scrapes.append(Scrape(self.address))
        self.answers += [ask(self.address, "/readyz"), ask(self.address, "/healthz")]
        assert self._work is not None
        return self._work(message)


@pytest.fixture
def _served(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(METRICS, "127.0.0.1:0")
    caplog.set_level(logging.INFO, "trunkline")


@pytest.mark.usefixtures("_served")
def test_a_run_is_scraped_while_it_goes_and_its_numbers_are_those_of_sql(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench({1: 100, 2: 60, 3: 20}, num_rounds=3).tell_shapes_ahead()
    bench.grid.nodes[3] = FakeNode(lambda message: Error(1000, "BudgetError: spent"))
    looker = Looker(bench, caplog)
    bench.conduct()
    run = bench.store.get_run("last")
    first, second, third, judged = looker.scrapes
    assert [one.value(f"{PRE}round") for one in (first, second, third)] == [1, 2, 3]
    assert first.value(f"{PRE}phase", phase="training") == 1
    assert judged.value(f"{PRE}phase", phase="judging") == 1
    assert first.value(f"{PRE}cohort_clients") == 3
    assert first.value(f"{PRE}info", run=run.run_id) == 1
    rounds = bench.store.rounds(run.run_id)
    assert judged.value(f"{PRE}rounds_committed_total") == len(rounds) == judged.value(f"{PRE}rounds_planned") == 3
    assert judged.value(f"{PRE}trained_tokens_total") == sum(row.trained_tokens for row in rounds) == 480
    taken = [row.status for row in bench.store.participations(run.run_id)]
    for outcome in ("trained", "failed"):
        assert judged.value(f"{PRE}participations_total", outcome=outcome) == taken.count(outcome) > 0
    assert judged.value(f"{PRE}failures_total", error="BudgetError") == 3
    assert judged.value(f"{PRE}exchange_seconds_count", phase="training") == 3
    for phase, seconds in rounds[0].phase_seconds.items():
        assert second.value(f"{PRE}phase_seconds_sum", phase=phase) >= seconds
        assert judged.value(f"{PRE}phase_seconds_count", phase=phase) == 3
    training = [row.phase_seconds["training"] for row in rounds]
    assert judged.value(f"{PRE}phase_seconds_sum", phase="training") == pytest.approx(sum(training))
    assert 0 <= judged.value(f"{PRE}lease_age_seconds") < 60
    assert judged.finite()
    assert judged.labels() == {"le", "phase", "outcome", "error", "run"}
    assert set(looker.answers) == {(200, "ok\n")}
    assert judged.described() == documented(PRE), "docs/watching.md"
    with pytest.raises(OSError, match="refused"):
        ask(looker.address, "/healthz")


@pytest.mark.usefixtures("_served")
def test_clients_are_named_where_that_is_asked_for(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CLIENT_METRICS, "1")
    bench = make_bench({1: 100, 2: 60, 3: 20}, num_rounds=2).tell_shapes_ahead()
    bench.grid.nodes[3] = FakeNode(lambda message: Error(1000, "BudgetError: spent"))
    looker = Looker(bench, caplog)
    bench.conduct()
    judged, name = looker.scrapes[-1], f"{PRE}client_participations_total"
    taken = [(row.node_id, row.status) for row in bench.store.participations(bench.store.get_run("last").run_id)]
    assert {node_id for node_id, _ in taken} == {"1", "2", "3"}
    for node_id, outcome in taken:
        assert judged.value(name, client=node_id, outcome=outcome) == taken.count((node_id, outcome)) == 2
    assert judged.described() == documented(PRE, by_client=True)


def test_no_more_clients_are_named_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contract.named_clients.MOST", 2)
    metrics = RunMetrics("run", 1, lambda: 0.0, name_clients=True)
    for node_id in ("1", "2", "3", "4", "1"):
        metrics.participated(RoundKey("run", 1, 1), node_id, "trained", None)
    (family,) = (one for one in metrics.registry.collect() if one.name == f"{PRE}client_participations")
    assert {sample.labels["client"]: sample.value for sample in family.samples} == {"1": 2, "2": 1, "": 2}


@pytest.mark.usefixtures("_served")
def test_the_trunks_progress_is_counted_over_the_runs_attempts(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench({1: 100, 2: 60}).tell_shapes_ahead()
    looker = Looker(bench, caplog)
    told = {1: RoundProgress(2, 4, 64, 1000, 900), 2: RoundProgress(2, 6, 96, 1500, 1400)}
    monkeypatch.setattr(Trunk, "progress", lambda self, key: told[min(key.round, 2)])
    bench.conduct()
    rows = bench.store.rounds(bench.store.get_run("last").run_id)
    judged = looker.scrapes[-1]
    for name in ("steps", "tokens"):
        assert judged.value(f"{PRE}{name}_total") == sum(getattr(row, name) for row in rows) > 0
    assert judged.value(f"{PRE}trunk_received_bytes_total") == sum(row.received_bytes for row in rows) == 2500
    assert judged.value(f"{PRE}trunk_sent_bytes_total") == sum(row.sent_bytes for row in rows) == 2300


@pytest.mark.usefixtures("_served")
def test_readiness_goes_with_the_lease_and_the_trunk(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, away = [""], [False]
    describe = Trunk.describe

    def described(trunk: Trunk) -> ServedModel:
        if away[0]:
            raise ConnectionFailedError("no trunk answers")
        return describe(trunk)

    monkeypatch.setattr("orchestrator.run_metrics.PROBE_S", 0.0)
    monkeypatch.setattr(Lease, "fault", lambda self: fault[0])
    monkeypatch.setattr(Trunk, "describe", described)
    bench = make_bench({1: 100, 2: 60}, num_rounds=1).tell_shapes_ahead()
    looker, told = Looker(bench, caplog), []

    def look(message: Message) -> Content:
        if is_training(message):
            for fault[0], away[0] in (("the lease was last renewed 25 s ago", False), ("", True), ("", False)):
                told.append(ask(looker.address, "/readyz"))
        return looker.look(message)

    bench.grid.nodes[1] = FakeNode(look)
    bench.conduct()
    assert told == [
        (503, "the lease was last renewed 25 s ago\n"),
        (503, "no trunk answers\n"),
        (200, "ok\n"),
    ]


def test_a_run_that_stands_still_is_neither_healthy_nor_ready() -> None:
    still = [0.0]
    health = Health(lambda: still[0], lambda: "", lambda: None, CALL_S)
    assert health.healthy() == health.ready() == ""
    still[0] = CALL_S + 1
    assert health.healthy() == health.ready() == "the run has not moved for 901 s"


def test_a_lease_tells_its_age_and_why_it_is_not_held(make_bench: MakeBench) -> None:
    bench, now = make_bench(), [100.0]
    desk = bench.desk()
    lease = Lease(bench.store, desk.run_id, lambda: now[0])
    now[0] += 7
    assert (lease.age_s(), lease.fault()) == (7.0, "")
    now[0] += 20
    assert lease.fault() == "the lease was last renewed 27 s ago"
    lease.renew()
    assert lease.fault() == ""
    bench.store.finish_run(desk.run_id, "stopped", "by hand")
    lease.renew()
    assert "has stopped" in lease.fault()
    with pytest.raises(LeaseError):
        lease.require()


def test_a_taken_port_is_a_warning_that_names_it_and_the_run_goes_on(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv(METRICS, address)
        bench = make_bench({1: 100, 2: 60}, num_rounds=1).tell_shapes_ahead()
        with caplog.at_level(logging.WARNING, "trunkline"):
            bench.conduct()
    assert bench.store.get_run("last").status == "finished"
    (warning,) = [record.getMessage() for record in caplog.records if "metrics" in record.getMessage()]
    assert (
        warning == f"cannot serve the run's metrics at {address}: Address already in use; the run goes on without them"
    )


@pytest.mark.parametrize("value", ["nonsense", "0.0.0.0:9464"])
def test_a_bad_address_is_told_before_anything_is_sent(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(METRICS, value)
    monkeypatch.delenv(INSECURE_METRICS, raising=False)
    bench = make_bench()
    with pytest.raises(ConfigError, match=f"TRUNKLINE_METRICS is '{value}'"):
        bench.conduct()
    run = bench.store.get_run("last")
    assert (run.status, "TRUNKLINE_METRICS" in str(run.reason), bench.grid.sent) == ("failed", True, [])


@pytest.mark.parametrize(
    ("outcome", "reason", "kind"),
    [
        ("failed", "BudgetError: it would spend more", "BudgetError"),
        ("failed", "its ClientApp raised an error: QuorumError", "failed"),
        ("failed", "DataError at the client; its log says more", "DataError"),
        ("late", "no answer, and no progress for 30 s", "late"),
        ("refused", "x" * 500, "refused"),
        ("failed", None, "failed"),
    ],
)
def test_a_failures_kind_is_one_of_ours(outcome: str, reason: str | None, kind: str) -> None:
    assert failure_kind(outcome, reason) == kind  # type: ignore[arg-type]


@pytest.mark.usefixtures("_served")
def test_a_private_run_counts_its_charges_and_its_aborted_attempts(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    lookers: list[Looker] = []

    def prepare(bench: Bench) -> None:
        for number, client in bench.clients.items():
            assert isinstance(client, SecureClient)
            client.dies = partial(dies_once, [number])
        lookers.append(Looker(bench, caplog))

    bench = conducted_privately(make_bench, prepare, num_rounds=2)
    run = bench.store.get_run("last")
    with closing(open_ledger(f"sqlite:///{bench.home / 'trunkline.db'}")) as ledger:
        charges = sum(account.count for account in ledger.accounts(run.run_id))
    (looker,) = lookers
    last, rounds = looker.scrapes[-1], bench.store.rounds(run.run_id)
    assert last.value(f"{PRE}ledger_charges_total") == charges > 0
    assert last.value(f"{PRE}attempts_aborted_total") == sum(row.status == "aborted" for row in rounds) == 1
    assert last.value(f"{PRE}exchange_seconds_count", phase="unmasking") == 2
    assert last.value(f"{PRE}rounds_committed_total") == 2


def dies_once(left: list[int], stage: str, number: int) -> bool:
    """Clients 1 and 2 do not confirm, once, so that four of five are not there."""
    return stage == "confirm" and bool(left) and left.pop() <= 2


# ---- listeners -------------------------------------------------------------------------------------------------------


class Broken(Listener):
    what = "a broken tracker"

    def __init__(self) -> None:
        self.called = 0

    def committed(self, commit: RoundCommit) -> None:
        self.called += 1
        raise OSError("cannot reach https://ada:secret@tracker.example/api")


def test_a_listener_that_fails_is_told_nothing_more_and_costs_one_warning(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken()
    monkeypatch.setattr("orchestrator.watchers._mlflow", lambda run: broken)
    bench = make_bench({1: 100, 2: 60}, num_rounds=3).tell_shapes_ahead()
    with caplog.at_level(logging.WARNING, "trunkline"):
        bench.conduct()
    assert (bench.store.get_run("last").status, broken.called) == ("finished", 1)
    (warning,) = [record.getMessage() for record in caplog.records if "broken" in record.getMessage()]
    assert warning == (
        "a broken tracker: off for the rest of this run: OSError: cannot reach https://***@tracker.example/api"
    )


def test_a_tracker_that_cannot_begin_costs_one_warning(make_bench: MakeBench, caplog: pytest.LogCaptureFixture) -> None:
    bench = make_bench({1: 100, 2: 60}, num_rounds=1).tell_shapes_ahead()
    bench.home.mkdir(parents=True, exist_ok=True)
    runs = bench.home / "runs"
    runs.mkdir()

    def conducted() -> None:
        with pytest.MonkeyPatch.context() as patch:
            mkdir = Path.mkdir

            def refusing(path: Path, *args: object, **options: object) -> None:
                if path.name == "tensorboard":
                    raise PermissionError(13, "Permission denied")
                mkdir(path, *args, **options)  # type: ignore[arg-type]

            patch.setattr(Path, "mkdir", refusing)
            bench.conduct()

    with caplog.at_level(logging.WARNING, "trunkline"):
        conducted()
    assert bench.store.get_run("last").status == "finished"
    told = [record.getMessage() for record in caplog.records if "TensorBoard" in record.getMessage()]
    assert told == ["TensorBoard: off for this run: PermissionError: [Errno 13] Permission denied"]


def test_phases_are_told_in_their_order_and_with_their_end() -> None:
    heard: list[str] = []

    class Ear(Listener):
        def phase_began(self, phase: str) -> None:
            heard.append(f"+{phase}")

        def phase_ended(self, phase: str, seconds: float) -> None:
            heard.append(f"-{phase} {seconds:g}")

        def aborted(self, key: RoundKey) -> None:
            heard.append(f"aborted {key.round}")

    from orchestrator.stopwatch import Stopwatch
    from tests.orchestrator.fakes import FakeClock

    clock, audience = FakeClock(), Audience([Ear()])
    watch = Stopwatch(clock, audience)
    with watch.lap("training"):
        assert audience.phase == "training"
        clock.sleep(3)

    def failing() -> None:
        with watch.lap("averaging"):
            clock.sleep(1)
            raise ConfigError("no")

    with pytest.raises(ConfigError):
        failing()
    audience.tell(lambda one: one.aborted(RoundKey("r", 4, 1)))
    assert heard == ["+training", "-training 3", "+averaging", "-averaging 1", "aborted 4"]
    assert watch.seconds == {"training": 3.0}


@pytest.fixture(autouse=True)
def _no_leftover_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
