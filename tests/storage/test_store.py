"""The Store's contract, the same on both engines."""

import dataclasses
import threading
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import create_engine, text

from contract.errors import StorageError
from storage.records import RoundCommit
from storage.store import Store, open_reader, open_store

SHA = {letter: letter * 64 for letter in "abcdef"}


def start(store: Store, run_id: str = "r1", flower_run_id: str = "7") -> None:
    store.create_run(run_id, flower_run_id, {"num-rounds": 3, "learning-rate": 2e-4}, "simulation", "f" * 64)
    store.add_adapter_version(run_id, 0, SHA["a"], SHA["b"])


def commit_of(number: int, attempt: int, survivors: list[str], run_id: str = "r1") -> RoundCommit:
    return RoundCommit(
        run_id, number, attempt, SHA["c"], SHA["d"], 1000, survivors, 2.5, {"train": 2.0}, {"eval_loss": 3.5}
    )


def report(store: Store, phase: str = "train", steps: int = 0, tokens: int = 0) -> None:
    store.record_progress(
        "r1", 1, 1, phase=phase, replies=0, steps=steps, tokens=tokens, received_bytes=0, sent_bytes=0
    )


def everything(store: Store, run_id: str = "r1") -> list[object]:
    return [
        store.get_run(run_id),
        store.rounds(run_id),
        store.participations(run_id),
        store.adapter_versions(run_id),
        store.metrics(run_id),
        store.events(),
        store.clients(),
    ]


def test_a_run_reads_back_as_it_was_written(store: Store) -> None:
    start(store)
    run = store.get_run("r1")
    assert (run.run_id, run.flower_run_id, run.mode, run.status, run.reason) == (
        "r1",
        "7",
        "simulation",
        "running",
        None,
    )
    assert run.config == {"num-rounds": 3, "learning-rate": 2e-4}
    assert run.model_fingerprint == "f" * 64
    assert run.committed_rounds == 0
    assert run.created_at == datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC)
    assert run.created_at.utcoffset() == timedelta(0)
    assert run.ended_at is None


def test_runs_are_found_by_id_by_flower_id_and_as_the_last(store: Store) -> None:
    start(store, "r1", "7")
    start(store, "r2", "8")
    assert store.get_run("r1").run_id == "r1"
    assert store.get_run("8").run_id == "r2"
    assert store.get_run("last").run_id == "r2"
    found = store.run_by_flower_id("7")
    assert found is not None
    assert found.run_id == "r1"
    assert store.run_by_flower_id("99") is None


@pytest.mark.parametrize(("reference", "named"), [("r9", "there is no run r9"), ("last", "there is no run yet")])
def test_an_absent_run_is_named(store: Store, reference: str, named: str) -> None:
    with pytest.raises(StorageError, match=named):
        store.get_run(reference)


def test_runs_are_listed_newest_first_by_status_and_limit(store: Store) -> None:
    for name in ("r1", "r2", "r3"):
        start(store, name)
    store.finish_run("r2", "failed", "no quorum")
    assert [run.run_id for run in store.list_runs()] == ["r3", "r2", "r1"]
    assert [run.run_id for run in store.list_runs(limit=1)] == ["r3"]
    assert [run.run_id for run in store.list_runs(status="running")] == ["r3", "r1"]


def test_a_taken_run_id_is_refused(store: Store) -> None:
    start(store)
    with pytest.raises(StorageError, match="there is a run r1 already"):
        store.create_run("r1", "8", {}, "deployment", "f")


def test_one_round_from_open_to_commit(store: Store) -> None:
    start(store)
    store.add_client("11", "site one")
    assert store.open_round("r1", 1, ["11", "12", "13", "14"]) == 1
    store.record_progress(
        "r1", 1, 1, phase="train", replies=2, steps=30, tokens=3000, received_bytes=5_000_000_000, sent_bytes=7
    )
    store.record_participation("r1", 1, 1, "11", "trained", metrics={"train_loss": 3.0})
    store.record_participation("r1", 1, 1, "12", "trained")
    store.record_participation("r1", 1, 1, "13", "failed", "its data is empty")
    store.commit_round(commit_of(1, 1, ["11", "12"]))

    (row,) = store.rounds("r1")
    assert (row.status, row.replies, row.steps, row.tokens) == ("committed", 2, 30, 3000)
    assert (row.received_bytes, row.sent_bytes, row.trained_tokens) == (5_000_000_000, 7, 1000)
    assert (row.seconds, row.phase_seconds, row.reason) == (2.5, {"train": 2.0}, None)
    assert row.ended_at is not None
    assert row.ended_at > row.opened_at
    outcomes = {taken.node_id: (taken.name, taken.status, taken.reason) for taken in store.participations("r1", 1)}
    assert outcomes == {
        "11": ("site one", "trained", None),
        "12": (None, "trained", None),
        "13": (None, "failed", "its data is empty"),
        "14": (None, "late", "no update came before the round was committed"),
    }
    assert store.participations("r1")[0].metrics == {"train_loss": 3.0}
    version = store.adapter_version("r1", 1)
    assert (version.client_sha256, version.trunk_sha256, version.trained_tokens) == (SHA["c"], SHA["d"], 1000)
    assert [(m.node_id, m.attempt, m.name, m.value) for m in store.metrics("r1")] == [
        (None, 1, "eval_loss", 3.5),
        ("11", 1, "train_loss", 3.0),
    ]
    assert store.get_run("r1").committed_rounds == 1


def test_a_round_opens_only_after_the_adapter_before_it(store: Store) -> None:
    store.create_run("r1", "7", {}, "unknown", "f")
    with pytest.raises(StorageError, match="its first adapter comes next"):
        store.open_round("r1", 1, ["1"])
    store.add_adapter_version("r1", 0, SHA["a"], SHA["b"])
    for number in (0, 2):
        with pytest.raises(StorageError, match="round 1 comes next"):
            store.open_round("r1", number, ["1"])
    store.open_round("r1", 1, ["1"])
    store.commit_round(commit_of(1, 1, ["1"]))
    with pytest.raises(StorageError, match="round 2 comes next"):
        store.open_round("r1", 1, ["1"])


def test_an_attempt_that_a_crash_left_open_is_aborted_by_the_next(store: Store) -> None:
    start(store)
    assert store.open_round("r1", 1, ["1", "2"]) == 1
    assert store.open_round("r1", 1, ["2", "3"]) == 2
    assert [(row.attempt, row.status) for row in store.rounds("r1")] == [(1, "aborted"), (2, "open")]
    assert store.rounds("r1")[0].reason == "interrupted; the round was attempted again"
    assert [(row.attempt, row.node_id) for row in store.participations("r1", 1)] == [
        (1, "1"), (1, "2"), (2, "2"), (2, "3"),
    ]  # fmt: skip
    with pytest.raises(StorageError, match="attempt 1 at round 1 of run r1 is aborted; it must be open"):
        store.commit_round(commit_of(1, 1, ["1"]))


def test_an_aborted_attempt_keeps_its_reason_and_phase_and_its_numbers_are_not_the_rounds(store: Store) -> None:
    start(store)
    store.open_round("r1", 1, ["1"])
    report(store, phase="commit")
    store.record_participation("r1", 1, 1, "1", "trained", metrics={"train_loss": 9.0})
    store.abort_round("r1", 1, 1, "the trunk went away")
    (row,) = store.rounds("r1")
    assert (row.status, row.reason, row.phase) == ("aborted", "the trunk went away", "commit")
    assert store.metrics("r1") == []
    assert store.participations("r1")[0].metrics == {"train_loss": 9.0}
    assert store.open_round("r1", 1, ["1"]) == 2


@pytest.mark.parametrize(
    ("outcomes", "survivors", "named"),
    [
        ({"1": "trained", "2": "trained"}, ["1"], "client 2 is no survivor but trained"),
        ({"1": "failed"}, ["1", "2"], "client 1 is a survivor but failed"),
        ({}, ["1", "9"], "client 9 is a survivor but not in the cohort"),
    ],
)
def test_a_commit_whose_survivors_are_not_those_recorded_changes_nothing(
    store: Store, outcomes: dict[str, str], survivors: list[str], named: str
) -> None:
    start(store)
    store.open_round("r1", 1, ["1", "2"])
    for node_id, status in outcomes.items():
        store.record_participation("r1", 1, 1, node_id, status, "so it was")  # type: ignore[arg-type]
    before = everything(store)
    with pytest.raises(StorageError, match=named):
        store.commit_round(commit_of(1, 1, survivors))
    assert everything(store) == before


def break_inserts_into(store: Store, table: str) -> None:
    """Have the database itself fail on the next row of `table`."""
    dialect = store._engine.dialect.name
    if dialect == "sqlite":
        statements = [f"CREATE TRIGGER broken BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'broken disk'); END"]
    else:
        body = "BEGIN RAISE EXCEPTION 'broken disk'; END"
        statements = [
            f"CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$",
            f"CREATE TRIGGER broken BEFORE INSERT ON {table} EXECUTE FUNCTION broken()",
        ]
    with store._engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


@pytest.mark.parametrize("table", ["adapter_versions", "metrics"])
def test_a_commit_that_fails_in_the_middle_leaves_nothing_behind_and_can_be_repeated(store: Store, table: str) -> None:
    start(store)
    store.open_round("r1", 1, ["1", "2"])
    before = everything(store)
    break_inserts_into(store, table)
    with pytest.raises(StorageError, match="broken disk"):
        store.commit_round(commit_of(1, 1, ["1"]))
    assert everything(store) == before
    with store._engine.begin() as connection:
        on = "" if store._engine.dialect.name == "sqlite" else f" ON {table}"
        connection.execute(text(f"DROP TRIGGER broken{on}"))
    store.commit_round(commit_of(1, 1, ["1"]))
    assert store.get_run("r1").committed_rounds == 1


def test_a_number_that_is_not_finite_is_refused_and_the_commit_leaves_nothing(store: Store) -> None:
    start(store)
    store.open_round("r1", 1, ["1"])
    before = everything(store)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(StorageError, match="metric eval_loss of round 1 is"):
            store.commit_round(dataclasses.replace(commit_of(1, 1, ["1"]), metrics={"eval_loss": bad}))
        with pytest.raises(StorageError, match="metric eval_loss of round 1 is"):
            store.record_participation("r1", 1, 1, "1", "trained", metrics={"eval_loss": bad})
    with pytest.raises(StorageError):
        store.commit_round(dataclasses.replace(commit_of(1, 1, ["1"]), phase_seconds={"train": float("nan")}))
    assert everything(store) == before


def test_the_first_ending_of_a_run_stays_and_nothing_changes_after_it(store: Store) -> None:
    start(store)
    store.open_round("r1", 1, ["1"])
    assert store.finish_run("r1", "failed", "quorum 2, 1 answered")
    assert not store.finish_run("r1", "stopped", "Ctrl-C")
    run = store.get_run("r1")
    assert (run.status, run.reason) == ("failed", "quorum 2, 1 answered")
    assert run.ended_at is not None
    (row,) = store.rounds("r1")
    assert (row.status, row.reason) == ("aborted", "the run failed: quorum 2, 1 answered")
    before = everything(store)
    for change in (
        lambda: store.open_round("r1", 1, ["1"]),
        lambda: store.record_metrics("r1", 1, None, {"x": 1.0}),
        lambda: report(store),
        lambda: store.commit_round(commit_of(1, 1, ["1"])),
        lambda: store.add_adapter_version("r1", 0, SHA["a"], SHA["b"]),
    ):
        with pytest.raises(StorageError, match="run r1 has failed; it changes no more"):
            change()
    assert everything(store) == before


def test_progress_moves_its_time_only_when_something_moved(store: Store) -> None:
    start(store)
    store.open_round("r1", 1, ["1"])
    report(store)
    moved = store.rounds("r1")[0].progress_at
    report(store)
    assert store.rounds("r1")[0].progress_at == moved
    report(store, steps=1)
    assert store.rounds("r1")[0].progress_at > moved


def test_a_client_is_remembered_once_and_keeps_its_name(store: Store) -> None:
    store.add_client("1", "alpha")
    store.add_client("1")
    store.add_client("2")
    assert [(client.node_id, client.name) for client in store.clients()] == [("1", "alpha"), ("2", None)]
    first = store.clients()[0].first_seen_at
    store.add_client("1", "beta")
    assert (store.clients()[0].name, store.clients()[0].first_seen_at) == ("beta", first)


def test_only_a_client_of_the_cohort_takes_part(store: Store) -> None:
    start(store)
    store.open_round("r1", 1, ["1"])
    store.add_client("2")
    with pytest.raises(StorageError, match="client 2 is not in the cohort of round 1"):
        store.record_participation("r1", 1, 1, "2", "trained")


def test_the_first_adapter_comes_once_and_later_ones_by_commit_alone(store: Store) -> None:
    start(store)
    with pytest.raises(StorageError, match="has its first adapter already"):
        store.add_adapter_version("r1", 0, SHA["a"], SHA["b"])
    with pytest.raises(StorageError, match="comes by committing round 1"):
        store.add_adapter_version("r1", 1, SHA["a"], SHA["b"])
    with pytest.raises(StorageError, match="run r1 has no adapter of round 1"):
        store.adapter_version("r1", 1)


def test_metrics_outside_an_attempt_replace_those_of_the_same_name(store: Store) -> None:
    start(store)
    store.record_metrics("r1", 3, None, {"eval_loss": 4.0, "eval_tokens": 10})
    store.record_metrics("r1", 3, "1", {"eval_loss": 5.0})
    store.record_metrics("r1", 3, None, {"eval_loss": 3.0})
    assert [(m.number, m.attempt, m.node_id, m.name, m.value) for m in store.metrics("r1")] == [
        (3, 0, None, "eval_loss", 3.0),
        (3, 0, None, "eval_tokens", 10.0),
        (3, 0, "1", "eval_loss", 5.0),
    ]


def test_events_are_kept_in_order_and_the_newest_are_read(store: Store) -> None:
    start(store)
    for index in range(5):
        store.add_event("r1", "note", f"event {index}", {"index": index})
    store.add_event(None, "note", "of no run")
    assert [event.message for event in store.events("r1", limit=2)] == ["event 3", "event 4"]
    assert [event.message for event in store.events()][-1] == "of no run"
    assert store.events("r1")[0].detail == {"index": 0}
    with pytest.raises(StorageError):
        store.add_event("r9", "note", "of a run that is not there")


def test_text_that_a_database_refuses_cannot_spoil_a_write(store: Store) -> None:
    start(store)
    store.open_round("r1", 1, ["1", "2"])
    store.record_participation("r1", 1, 1, "1", "failed", "a\x00b \ud800 ü")
    assert store.participations("r1")[0].reason == "ab \\ud800 ü"
    store.commit_round(commit_of(1, 1, ["2"]))


def test_a_number_too_large_for_the_database_is_our_error(store: Store) -> None:
    start(store)
    store.open_round("r1", 1, ["1"])
    before = everything(store)
    with pytest.raises(StorageError):
        report(store, tokens=2**70)
    assert everything(store) == before


def test_the_database_itself_refuses_a_second_open_round_and_a_second_commit(store: Store) -> None:
    start(store)
    store.open_round("r1", 1, ["1"])
    copied = "INSERT INTO rounds SELECT run_id, number, 7, {status}, reason, phase, replies, steps, tokens, "
    copied += "received_bytes, sent_bytes, trained_tokens, seconds, phase_seconds, opened_at, progress_at, ended_at, "
    copied += "threshold FROM rounds WHERE attempt = 1"
    for status in ("open", "committed"):
        if status == "committed":
            store.commit_round(commit_of(1, 1, ["1"]))
        with pytest.raises(Exception, match=r"(?i)unique"):
            with store._engine.begin() as connection:
                connection.execute(text(copied.format(status=f"'{status}'")))


def test_what_was_written_is_there_when_the_database_is_opened_again(store: Store, database_url: str) -> None:
    start(store)
    store.open_round("r1", 1, ["1"])
    store.commit_round(commit_of(1, 1, ["1"]))
    before = everything(store)
    store.close()
    again = open_store(database_url)
    assert everything(again) == before
    again.close()


def test_a_reader_sees_whole_commits_only_and_is_not_held_up_by_an_open_write(store: Store, database_url: str) -> None:
    start(store)
    reader = open_reader(database_url)
    assert not hasattr(reader, "commit_round")
    with store._writing("a test") as session:
        session.execute(text("UPDATE runs SET status = 'finished', reason = 'half way'"))
        session.execute(text("DELETE FROM adapter_versions"))
        assert reader.get_run("last").status == "running"
        assert len(reader.adapter_versions("r1")) == 1
    assert reader.get_run("last").status == "finished"
    reader.close()


def test_a_write_waits_for_another_ones_turn_and_then_sees_it(store: Store, database_url: str) -> None:
    start(store)
    other = open_store(database_url)
    done: list[bool] = []
    with store._writing("a test") as session:
        session.execute(text("UPDATE runs SET status = 'stopped'"))
        thread = threading.Thread(target=lambda: done.append(other.finish_run("r1", "finished")))
        thread.start()
        thread.join(0.5)
        assert done == [], "the second write did not wait"
    thread.join(20)
    assert done == [False]
    other.close()


def test_a_password_never_shows_in_an_error(store: Store, database_url: str) -> None:
    if not database_url.startswith("postgresql"):
        pytest.skip("SQLite has no passwords")
    shut = create_engine(database_url.replace("trunkline@", "trunkline:hunter2@", 1))
    broken = Store(shut)
    with pytest.raises(StorageError) as caught:
        broken.add_event("r9", "kind", "of a run that is not there")
    assert "hunter2" not in str(caught.value)
    assert ":***@" in str(caught.value)
    broken.close()
