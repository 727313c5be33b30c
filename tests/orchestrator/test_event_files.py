"""A run as TensorBoard reads it: what SQL holds, each number once, also of a run that was resumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from contract.errors import QuorumError
from orchestrator.protection import most_spent
from orchestrator.scalars import HELD_OUT_LOSS, TRAIN_LOSS, RunScalars
from privacy.coverage import withheld
from storage.ledger import open_ledger
from tests.orchestrator.conftest import Bench
from tests.orchestrator.private_runs import conducted_privately
from tests.orchestrator.test_resume import failed, fails_in_round

MakeBench = Callable[..., Bench]


def directory(bench: Bench) -> Path:
    return bench.home / "runs" / bench.store.get_run("last").run_id / "tensorboard"


def drawn(bench: Bench) -> dict[str, dict[int, float]]:
    """Values by tag and step, as TensorBoard has them after all of its purging."""
    accumulator = EventAccumulator(str(directory(bench)))
    accumulator.Reload()
    return {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]
    }


def raw(bench: Bench) -> Counter[tuple[str, int]]:
    """How often each number stands in the files."""
    found: Counter[tuple[str, int]] = Counter()
    for path in directory(bench).iterdir():
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            found.update((value.tag, event.step) for value in event.summary.value)
    return found


def check(bench: Bench) -> dict[str, dict[int, float]]:
    """TensorBoard shows exactly what SQL has of committed rounds."""
    run_id, found = bench.store.get_run("last").run_id, drawn(bench)
    rounds = {row.number: row for row in bench.store.rounds(run_id) if row.status == "committed"}
    assert found["tokens/trained"] == {number: row.trained_tokens for number, row in rounds.items()}
    assert found["clients/trained"] == {number: row.replies for number, row in rounds.items()}
    assert found["bytes/received_by_trunk"] == {number: row.received_bytes for number, row in rounds.items()}
    assert found["seconds/round"] == pytest.approx({number: row.seconds for number, row in rounds.items()}, rel=1e-6)
    for phase in rounds[1].phase_seconds:
        expected = {number: row.phase_seconds[phase] for number, row in rounds.items()}
        assert found[f"seconds/{phase}"] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    metrics = bench.store.metrics(run_id, over_clients=True)
    judged = {one.number: one.value for one in metrics if one.name == "eval_loss" and one.attempt == 0}
    committed = {(row.number, row.attempt) for row in rounds.values()}
    trained = {
        one.number: one.value for one in metrics if one.name == "train_loss" and (one.number, one.attempt) in committed
    }
    assert found[HELD_OUT_LOSS] == pytest.approx(judged, rel=1e-6)
    assert found[TRAIN_LOSS] == pytest.approx(trained, rel=1e-6)
    assert len(trained) == len(rounds)
    assert set(raw(bench).values()) == {1}
    return found


def test_a_run_draws_what_sql_holds(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60}, num_rounds=3).tell_shapes_ahead()
    bench.conduct()
    found = check(bench)
    assert found[HELD_OUT_LOSS] == {0: 5.0, 1: 4.0, 2: 3.0, 3: 2.0}
    assert not [tag for tag in found if tag.startswith("epsilon")]


@pytest.mark.parametrize("number", [2, 3])
def test_a_resumed_run_has_every_number_once(make_bench: MakeBench, number: int) -> None:
    bench = make_bench({1: 100, 2: 60}, num_rounds=4).tell_shapes_ahead()
    run_id = failed(bench, number)
    bench.conduct(resume_run=run_id)
    found = check(bench)
    assert sorted(found["tokens/trained"]) == [1, 2, 3, 4]
    assert len(list(directory(bench).iterdir())) == 1


def test_what_a_crash_left_out_is_there_after_the_resumption(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench({1: 100, 2: 60}, num_rounds=3).tell_shapes_ahead()
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.event_files.EventFile.committed", lambda self, commit: None)
        fails_in_round(bench, 3)
        with pytest.raises(QuorumError):
            bench.conduct()
    run_id = bench.store.get_run("last").run_id
    assert "tokens/trained" not in drawn(bench)
    fails_in_round(bench, 99)
    bench.conduct(resume_run=run_id)
    assert sorted(check(bench)["tokens/trained"]) == [1, 2, 3]


def test_epsilon_is_drawn_against_whom_it_may_be_told_and_history_is_what_was_drawn(make_bench: MakeBench) -> None:
    bench = conducted_privately(make_bench, num_rounds=2)
    run = bench.store.get_run("last")
    found = drawn(bench)
    told = {name for name in ("holder", "orchestrator", "trunk") if f"epsilon/{name}" in found}
    with closing(open_ledger(f"sqlite:///{bench.home / 'trunkline.db'}")) as ledger:
        most = most_spent(bench.config, ledger.accounts(run.run_id))
        assert told == {name for name in most if withheld(bench.config, name) is None}
        assert 0 < len(told) < len(most), "the trunk reads the text: against it there is no epsilon"
        for name in told:
            first, last = (found[f"epsilon/{name}"][number] for number in (1, 2))
            assert last == pytest.approx(most[name], rel=1e-6)
            assert 0 < first < last
        again = RunScalars(run.run_id, bench.config, bench.store, ledger).history()
        history = {(name, point.round): value for point in again for name, value in point.values.items()}
    live = {(tag, step): value for tag, values in found.items() for step, value in values.items()}
    assert history.keys() == live.keys()
    assert history == pytest.approx(live, rel=1e-5, abs=1e-6)
