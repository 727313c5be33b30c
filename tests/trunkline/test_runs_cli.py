"""`trunkline runs stop` and what `runs resume` refuses before it starts anything."""

from __future__ import annotations

import getpass
import json
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from contract import watching
from contract.config import ConfigValue, RunConfig
from orchestrator.adapter_cli import app as adapter_app
from orchestrator.cli import rounds_app
from storage.records import RoundCommit, RunMode
from storage.store import Store, open_store, utc_now
from trunkline import follow, resume
from trunkline.runs import runs_app

RUN = "20260101-000000-abcd"
Began = Callable[..., Store]


@pytest.fixture
def began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Began]:
    """A home with a run that goes on."""
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    opened: list[Store] = []

    def begin(mode: RunMode = "simulation", **settings: ConfigValue) -> Store:
        store = open_store()
        opened.append(store)
        config = RunConfig.from_flower({key.replace("_", "-"): value for key, value in settings.items()})
        store.create_run(RUN, "7", config.to_flower(), mode, "f" * 64)
        return store

    yield begin
    for store in opened:
        store.close()


@pytest.fixture(autouse=True)
def _starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    for name in ("run_simulated", "run_deployed"):
        monkeypatch.setattr(resume, name, started)


def runs(*arguments: str) -> Result:
    return CliRunner().invoke(runs_app, list(arguments))


def test_a_run_is_stopped_with_who_did_it_and_why(began: Began) -> None:
    store = began()
    store.add_adapter_version(RUN, 0, "a" * 64, "b" * 64)
    store.open_round(RUN, 1, ["1", "2"])
    done = runs("stop", "--last", "--yes", "--reason", "wrong data")
    assert done.exit_code == 0, done.output
    row = store.get_run(RUN)
    assert (row.status, row.reason) == ("stopped", "stopped by ada: wrong data")
    assert [one.status for one in store.rounds(RUN)] == ["aborted"]
    again = runs("stop", RUN, "--yes")
    assert again.exit_code == 1
    assert f"run {RUN} has stopped already" in again.stderr


def test_without_a_terminal_a_run_is_not_stopped_unless_yes_is_given(began: Began) -> None:
    store = began()
    done = runs("stop", RUN)
    assert done.exit_code == 2
    assert "there is no terminal to ask at: give --yes" in done.stderr
    assert store.get_run(RUN).status == "running"


@pytest.mark.parametrize(
    ("mode", "settings", "arguments", "told"),
    [
        ("deployment", {}, (), "was deployed: name the SuperLink that it goes on at with --superlink"),
        ("simulation", {}, ("--superlink", "a:1", "--simulate", "2"), "is a simulation, which goes on at no SuperLink"),
        (
            "simulation",
            {},
            ("--simulate", "2", "-c", "learning-rate=1.0"),
            "learning-rate stays what run 20260101-000000-abcd began with; only these may change: model, node-wait-s",
        ),
        ("simulation", {}, (), "does not tell how many clients it simulates: name them with --simulate N"),
        ("simulation", {"cohort_size": 3}, (), "does not tell how many clients it simulates"),
        (
            "simulation",
            {},
            ("--simulate", "2", "--trunk", "nowhere"),
            "trunk-address is 'nowhere'; it must be HOST:PORT",
        ),
    ],
)
def test_what_cannot_be_resumed_is_told_before_anything_starts(
    began: Began, mode: RunMode, settings: dict[str, ConfigValue], arguments: tuple[str, ...], told: str
) -> None:
    began(mode, **settings).finish_run(RUN, "failed", "no quorum")
    done = runs("resume", RUN, *arguments)
    assert done.exit_code == 2, done.output
    assert told in " ".join(done.stderr.split())


def test_a_finished_run_is_not_resumed(began: Began) -> None:
    began().finish_run(RUN, "finished")
    done = runs("resume", "--last", "--simulate", "2")
    assert done.exit_code == 1
    assert f"run {RUN} has finished: there is nothing to resume" in done.stderr


def test_a_run_that_is_heard_again_while_it_is_waited_for_is_left_alone(
    began: Began, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = began()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        threading.Event().wait(0.01)
        store.renew_lease(RUN)

    monkeypatch.setattr(resume.time, "sleep", sleep)
    done = runs("resume", RUN, "--simulate", "2")
    assert done.exit_code == 1, done.output
    assert "waiting whether it is heard again" in done.stderr
    assert f"error: run {RUN} is being driven" in done.stderr
    assert len(waits) == 1
    assert 15 < waits[0] < 21
    assert store.get_run(RUN).flower_run_id == "7"


def test_watching_ends_with_the_run_and_tells_how_it_ended(began: Began, monkeypatch: pytest.MonkeyPatch) -> None:
    store = began(num_rounds=2)
    store.add_adapter_version(RUN, 0, "a" * 64, "b" * 64)
    store.open_round(RUN, 1, ["1", "2"])
    naps = iter(range(3))

    def sleep(seconds: float) -> None:
        if next(naps) == 2:
            store.finish_run(RUN, "failed", "no quorum")

    monkeypatch.setattr(follow.time, "sleep", sleep)
    done = runs("watch", "--last")
    assert done.exit_code == 1, done.output
    assert "round 1/2: 2 clients asked" in done.stderr
    assert f"error: run {RUN} failed: no quorum" in done.stderr


def test_watching_tells_of_an_orchestrator_that_fell_silent(began: Began, monkeypatch: pytest.MonkeyPatch) -> None:
    store = began()
    monkeypatch.setattr(follow, "utc_now", lambda: utc_now() + timedelta(seconds=70))
    monkeypatch.setattr(follow.time, "sleep", lambda seconds: store.finish_run(RUN, "finished"))
    done = runs("watch", RUN)
    assert done.exit_code == 0, done.output
    assert f"was last heard 70 s ago; if it is dead: trunkline runs resume {RUN}" in done.stderr
    assert f"run {RUN} finished" in done.stderr


def test_a_run_is_watched_by_scripts_as_lines_of_json(began: Began, monkeypatch: pytest.MonkeyPatch) -> None:
    store = began(num_rounds=2)
    store.add_adapter_version(RUN, 0, "a" * 64, "b" * 64)
    steps = iter(
        [
            lambda: store.open_round(RUN, 1, ["1", "2"]),
            lambda: None,
            lambda: store.commit_round(RoundCommit(RUN, 1, 1, "c" * 64, "d" * 64, 9, ["1", "2"], 1.0)),
            lambda: store.finish_run(RUN, "failed", "no quorum"),
        ]
    )
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: next(steps)())
    done = runs("watch", "--last", "-o", "jsonl")
    assert done.exit_code == 1
    *lines, error = (json.loads(line) for line in done.stdout.splitlines())
    assert [(one["data"]["status"], one["data"]["committed_rounds"], len(one["data"]["rounds"])) for one in lines] == [
        ("running", 0, 0),
        ("running", 0, 1),
        ("running", 1, 1),
        ("failed", 1, 1),
    ]
    assert error["status"] == "error"


def test_who_stopped_a_run_is_in_the_audit_log(began: Began) -> None:
    store = began()
    assert runs("stop", RUN, "--yes", "--reason", "wrong data", "--operator", "bob").exit_code == 0
    (entry,) = store.audit_log()
    assert (entry.operator, entry.action, entry.target, entry.detail) == (
        *("bob", "run-stopped", RUN),
        {"reason": "wrong data"},
    )


def test_who_resumed_a_run_is_in_the_audit_log_before_anything_is_started(
    began: Began, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = began(secagg="off")
    store.add_adapter_version(RUN, 0, "a" * 64, "b" * 64)
    store.open_round(RUN, 1, ["1", "2"])
    store.finish_run(RUN, "failed", "no quorum")
    with pytest.raises(AssertionError, match="something was started"):
        CliRunner().invoke(runs_app, ["resume", RUN, "--operator", "bob"], catch_exceptions=False)
    (entry,) = store.audit_log()
    assert (entry.operator, entry.action, entry.target) == ("bob", "run-resumed", RUN)
    assert entry.detail == {"was": "failed", "committed_rounds": 0, "superlink": None}
    assert runs("resume", RUN, "--superlink", "127.0.0.1:9").exit_code == 2
    assert len(store.audit_log()) == 1, "what was refused is in the log"


def test_runs_are_listed_from_a_moment_on(began: Began) -> None:
    began()
    for since, found in (("2020-01-01", [RUN]), ("2999-01-01T00:00:00", [])):
        told = runs("list", "--since", since, "-o", "json")
        assert [row["run_id"] for row in json.loads(told.stdout)["data"]] == found
    assert runs("list", "--since", "yesterday").exit_code == 2


def test_a_round_shows_what_each_client_did_in_each_attempt(began: Began) -> None:
    store = began()
    store.add_adapter_version(RUN, 0, "a" * 64, "b" * 64)
    store.add_client("1", "north")
    store.open_round(RUN, 1, ["1", "2"])
    store.record_participation(RUN, 1, 1, "2", "failed", "its data is empty")
    store.abort_round(RUN, 1, 1, "too few")
    store.open_round(RUN, 1, ["1"])
    shown = CliRunner().invoke(rounds_app, ["show", RUN, "--round", "1", "-o", "json"])
    rows = [(row["attempt"], row["client"], row["status"], row["reason"]) for row in json.loads(shown.stdout)["data"]]
    assert rows == [
        (1, "north", "invited", None),
        (1, "2", "failed", "its data is empty"),
        (2, "north", "invited", None),
    ]
    table = CliRunner().invoke(rounds_app, ["show", "--last", "--round", "1"]).stdout
    assert "attempt 1 aborted (too few); attempt 2 open" in " ".join(table.split())
    missing = CliRunner().invoke(rounds_app, ["show", RUN, "--round", "7"])
    assert (missing.exit_code, "never began round 7" in missing.stderr) == (1, True)


def test_the_adapters_of_a_run_are_listed_with_their_hashes(began: Began) -> None:
    store = began()
    store.add_adapter_version(RUN, 0, "a" * 64, "b" * 64)
    store.record_metrics(RUN, 0, None, {"eval_loss": 4.5})
    shown = CliRunner().invoke(adapter_app, ["list", "--last", "-o", "json"])
    (row,) = json.loads(shown.stdout)["data"]
    assert (row["round"], row["held_out_loss"]) == (0, 4.5)
    assert (row["client_sha256"], row["trunk_sha256"]) == ("a" * 64, "b" * 64)
