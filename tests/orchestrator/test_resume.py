"""A run that ended early goes on from its last committed round, and comes to what it would have come to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
from flwr.app import Error, Message

from contract.config import ConfigValue
from contract.errors import AgreementError, ConfigError, IntegrityError, LeaseError, QuorumError, StorageError
from orchestrator.lease import Lease, renewed
from storage.leases import LEASE_S
from storage.store import open_store, utc_now
from tests.orchestrator.conftest import Bench
from tests.orchestrator.fakes import Content, FakeNode

MakeBench = Callable[..., Bench]


def fails_in_round(bench: Bench, number: int) -> None:
    """Let one client of two fail from round `number` on, so that the run ends for want of a quorum."""
    healthy = bench.clients[2]

    def dies(message: Message) -> Content:
        return Error(8) if int(message.metadata.group_id or 0) >= number else healthy(message)

    bench.grid.nodes[2] = FakeNode(dies)


def failed(bench: Bench, number: int) -> str:
    """The id of a run of `bench` that failed in round `number`; all its clients are well again."""
    fails_in_round(bench, number)
    with pytest.raises(QuorumError):
        bench.conduct()
    bench.grid.nodes[2] = FakeNode(bench.clients[2])
    return bench.store.get_run("last").run_id


def versions(bench: Bench, run_id: str) -> list[tuple[int, str, str]]:
    return [(row.number, row.client_sha256, row.trunk_sha256) for row in bench.store.adapter_versions(run_id)]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_resumed_run_comes_to_the_adapters_of_one_that_never_failed(make_bench: MakeBench, number: int) -> None:
    whole = make_bench({1: 100, 2: 60}, num_rounds=3).tell_shapes_ahead()
    uninterrupted = whole.conduct()
    bench = make_bench({1: 100, 2: 60}, num_rounds=3).tell_shapes_ahead()
    run_id = failed(bench, number)
    committed = versions(bench, run_id)
    export = bench.conduct(resume_run=run_id)
    assert export.run_id == run_id
    assert export.adapter_sha256 == uninterrupted.adapter_sha256
    assert versions(bench, run_id) == versions(whole, uninterrupted.run_id)
    assert versions(bench, run_id)[: len(committed)] == committed
    run = bench.store.get_run(run_id)
    assert (run.status, run.committed_rounds) == ("finished", 3)
    assert [row.run_id for row in bench.store.list_runs()].count(run_id) == 1


def test_a_trunk_that_lost_its_adapters_is_given_the_committed_one_again(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60}).tell_shapes_ahead()
    run_id = failed(bench, 2)
    held = bench.trunk.contributions.adapters
    held.path(bench.store.adapter_version(run_id, 1).trunk_sha256).unlink()
    assert bench.conduct(resume_run=run_id).round == 2


def test_the_open_round_is_a_fresh_attempt(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60}).tell_shapes_ahead()
    run_id = failed(bench, 2)
    bench.conduct(resume_run=run_id)
    told = [(row.number, row.attempt, row.status) for row in bench.store.rounds(run_id)]
    assert told == [(1, 1, "committed"), (2, 1, "aborted"), (2, 2, "committed")]


def test_a_run_that_was_killed_before_its_end_was_told_still_exports(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60}).tell_shapes_ahead()
    done = bench.conduct()
    with bench.store._writing("as if killed") as session:
        from storage import schema

        run = session.get(schema.Run, done.run_id)
        assert run is not None
        run.status, run.ended_at, run.lease_until = "running", None, None
    sent = len(bench.grid.sent)
    again = bench.conduct(resume_run=done.run_id)
    assert again == done
    assert bench.store.get_run(done.run_id).status == "finished"
    assert all(message.content["round"]["final"] for message in bench.grid.sent[sent:])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"learning_rate": 1.0}, "learning-rate is 1.0, and run .* began with 0.0002; a run that is resumed keeps"),
        ({"num_rounds": 9}, "num-rounds is 9, and run .* began with 2"),
        ({"secagg": "on"}, "secagg is 'on', and run .* began with 'off'"),
        ({"quorum": 1}, "quorum is 1, and run .* began with 2"),
    ],
)
def test_a_resumed_run_keeps_its_settings(make_bench: MakeBench, change: dict[str, ConfigValue], told: str) -> None:
    bench = make_bench({1: 100, 2: 60}).tell_shapes_ahead()
    run_id = failed(bench, 2)
    before = bench.store.get_run(run_id)
    with pytest.raises(ConfigError, match=told):
        bench.conduct(resume_run=run_id, **change)
    assert bench.store.get_run(run_id) == before
    assert len(bench.store.list_runs()) == 1


def test_how_long_is_waited_may_change(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60}).tell_shapes_ahead()
    run_id = failed(bench, 2)
    bench.conduct(resume_run=run_id, node_wait_s=20.0, round_timeout_s=60.0)
    assert bench.store.get_run(run_id).config["node-wait-s"] == 10.0


def test_another_model_is_refused(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60}).tell_shapes_ahead()
    run_id = failed(bench, 2)
    with bench.store._writing("another model") as session:
        from storage import schema

        run = session.get(schema.Run, run_id)
        assert run is not None
        run.model_fingerprint = "e" * 64
    with pytest.raises(AgreementError, match=f"trains a model of fingerprint {'e' * 64}; the trunk serves"):
        bench.conduct(resume_run=run_id)
    assert bench.store.get_run(run_id).status == "failed"


def test_a_run_that_is_not_there_is_refused_and_made_by_nobody(make_bench: MakeBench) -> None:
    bench = make_bench()
    with pytest.raises(StorageError, match="there is no run nowhere"):
        bench.conduct(resume_run="nowhere")
    assert bench.store.list_runs() == []


@pytest.mark.parametrize("half", ["client_sha256", "trunk_sha256"])
def test_a_committed_adapter_that_was_changed_on_disk_is_not_gone_on_with(make_bench: MakeBench, half: str) -> None:
    bench = make_bench({1: 100, 2: 60}).tell_shapes_ahead()
    run_id = failed(bench, 2)
    path = bench.artifacts.path(getattr(bench.store.adapter_version(run_id, 1), half))
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match="it was changed or cut short"):
        bench.conduct(resume_run=run_id)
    assert bench.store.get_run(run_id).status == "failed"


def test_a_run_that_is_stopped_ends_within_a_look(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.lease.RENEW_S", 0.3)
    bench = make_bench({1: 100, 2: 60}).tell_shapes_ahead()
    bench.grid.nodes[2] = FakeNode(None)
    plain_sleep, seen = bench.clock.sleep, threading.Event()

    def sleep(seconds: float) -> None:
        if not bench.grid.sent:
            return plain_sleep(seconds)
        if not seen.is_set():
            other = open_store(f"sqlite:///{bench.home / 'trunkline.db'}")
            other.finish_run(bench.store.get_run("last").run_id, "stopped", "stopped by ada")
            other.close()
            seen.set()
        threading.Event().wait(0.02)
        return plain_sleep(0.001)

    monkeypatch.setattr(bench.clock, "sleep", sleep)
    with pytest.raises(LeaseError, match="has stopped; it changes no more"):
        bench.conduct()
    run = bench.store.get_run("last")
    assert (run.status, run.reason) == ("stopped", "stopped by ada")


def test_a_lease_is_renewed_while_its_block_runs_and_not_after(make_bench: MakeBench) -> None:
    bench = make_bench()
    run_id = bench.desk().run_id
    first = bench.store.get_run(run_id).lease_until
    with renewed(bench.store, run_id, every_s=0.01) as lease:
        wait_until(lambda: bench.store.get_run(run_id).lease_until != first)
        lease.require()
    last = bench.store.get_run(run_id).lease_until
    threading.Event().wait(0.1)
    assert bench.store.get_run(run_id).lease_until == last


def test_a_machine_that_slept_asks_before_it_goes_on(make_bench: MakeBench) -> None:
    bench = make_bench()
    run_id, now = bench.desk().run_id, [100.0]
    lease = Lease(bench.store, run_id, lambda: now[0])
    other = open_store(f"sqlite:///{bench.home / 'trunkline.db'}", lambda: utc_now() + timedelta(hours=1))
    other.resume_run(run_id, "flower-2")
    other.close()
    lease.require()
    now[0] += LEASE_S + 1
    with pytest.raises(LeaseError, match="was resumed as Flower run flower-2"):
        lease.require()


def test_a_run_that_was_refused_before_it_began_is_not_resumed(make_bench: MakeBench) -> None:
    bench = make_bench().tell_shapes_ahead()
    with pytest.raises(ConfigError):
        bench.conduct(model="/nowhere")
    run_id = bench.store.get_run("last").run_id
    with pytest.raises(StorageError, match="was refused before it began: model is '/nowhere'; .* start it anew"):
        bench.conduct(resume_run=run_id)


def wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    waited = threading.Event()
    for _ in range(int(limit_s / 0.01)):
        if condition():
            return
        waited.wait(0.01)
    raise AssertionError("waited in vain")
