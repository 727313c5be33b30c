"""The commands over a run that was really conducted: what they print, and with which exit code they end."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from safetensors.torch import load_file, save_file
from sqlalchemy import Engine, event
from typer.testing import CliRunner

from orchestrator import verification
from orchestrator.adapter_cli import app as adapter_app
from orchestrator.cli import config_app, rounds_app, runs_app
from orchestrator.export import export_adapter, joined
from storage import schema
from storage.artifacts import ArtifactStore
from storage.leases import LEASE_S
from tests.orchestrator.conftest import Bench, LiveTrunk, inside_a_flower_task, make_bench_at

MakeBench = Callable[..., Bench]
REPOSITORY = Path(__file__).parents[2]


def run(app: typer.Typer, *arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def data(app: typer.Typer, *arguments: str | Path) -> Any:
    done = run(app, *arguments, "-o", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["data"]


@pytest.fixture(scope="module")
def finished_home(tiny_model: Path, live_trunk: LiveTrunk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of one run of three rounds, the second of which has the lowest held-out loss."""
    home = tmp_path_factory.mktemp("finished") / "home"
    made = make_bench_at(home, tiny_model, live_trunk, {1: 100, 2: 60}, {"num_rounds": 3}).tell_shapes_ahead()
    for client in made.clients.values():
        client.lost = lambda number: {0: 4.0, 1: 3.5, 2: 3.0}.get(number, 3.25)
    with inside_a_flower_task():
        made.conduct()
    made.store.close()
    return home


@pytest.fixture
def bench(finished_home: Path, tmp_path: Path, make_bench: MakeBench) -> Bench:
    """That home, the test's own copy of it."""
    shutil.copytree(finished_home, tmp_path / "home")
    return make_bench(num_rounds=3)


def test_runs_are_listed_newest_first_with_how_they_ended(bench: Bench) -> None:
    with pytest.raises(Exception, match="unknown config key"):
        bench.conduct(bogus=1)
    rows = data(runs_app, "list")
    assert [(row["status"], row["rounds"]) for row in rows] == [("failed", "0/3"), ("finished", "3/3")]
    assert "unknown config key 'bogus'" in rows[0]["reason"]
    assert (rows[1]["held_out_loss"], rows[1]["best_round"]) == (3.25, 2)
    assert data(runs_app, "list", "--status", "finished") == rows[1:]
    assert len(data(runs_app, "list", "--limit", "1")) == 1
    assert rows[1]["run_id"] in run(runs_app, "list").stdout


def test_a_run_whose_orchestrator_was_killed_is_told_from_one_that_goes_on(bench: Bench) -> None:
    heard = datetime.now(UTC) - timedelta(minutes=10)
    run_id = data(runs_app, "show", "--last")["run_id"]
    for ago, silent in ((heard, True), (datetime.now(UTC) - timedelta(seconds=30), False)):
        with bench.store._writing("as if killed") as session:
            row = session.get(schema.Run, run_id)
            assert row is not None
            row.status, row.ended_at, row.lease_until = "running", None, ago + timedelta(seconds=LEASE_S)
        since = ago.replace(microsecond=0).isoformat() if silent else None
        assert [data(runs_app, "list")[0]["silent_since"], data(runs_app, "show", run_id)["silent_since"]] == [
            since
        ] * 2
        for told in (run(runs_app, "list"), run(runs_app, "show", run_id)):
            line = rf"run {run_id}: its orchestrator was last heard 6\d\d s ago; .* trunkline runs resume {run_id}"
            assert bool(re.search(line, told.stderr)) == silent


def test_one_run_is_shown_by_its_id_its_flower_id_or_as_the_last(bench: Bench) -> None:
    shown = data(runs_app, "show", "--last")
    assert shown == data(runs_app, "show", shown["run_id"]) == data(runs_app, "show", "flower-1")
    assert shown["held_out_losses"] == {"0": 4.0, "1": 3.5, "2": 3.0, "3": 3.25}
    assert Path(shown["adapter"]).is_dir()
    assert shown["config"]["num-rounds"] == 3
    assert "round 2 has the lowest held-out loss" in shown["reason"]


def test_rounds_are_listed_with_clients_losses_and_bytes(bench: Bench) -> None:
    rows = data(rounds_app, "list", "--last")
    assert [(row["round"], row["status"], row["clients"]) for row in rows] == [
        (number, "committed", "2/2") for number in (1, 2, 3)
    ]
    assert [row["held_out_loss"] for row in rows] == [3.5, 3.0, 3.25]
    assert rows[0]["train_loss"] == 3.0
    assert rows[0]["tokens"] == 160
    assert {row["status"] for row in rows[0]["participations"]} == {"trained"}
    assert "committed" in run(rounds_app, "list", "--last").stdout


def test_rounds_are_listed_with_as_many_queries_however_many_there_are(bench: Bench) -> None:
    def queries() -> int:
        asked: list[str] = []

        def note(_: Any, __: Any, statement: str, *___: Any) -> None:
            asked.append(statement)

        event.listen(Engine, "before_cursor_execute", note)
        try:
            data(rounds_app, "list", "--last")
        finally:
            event.remove(Engine, "before_cursor_execute", note)
        return len(asked)

    three = queries()
    run_id = bench.store.create_run("later", "flower-2", {}, "simulation", "f" * 64).run_id
    bench.store.add_adapter_version(run_id, 0, "a" * 64, "b" * 64)
    for number in range(1, 21):
        attempt = bench.store.open_round(run_id, 1, ["1", "2"])
        bench.store.abort_round(run_id, 1, attempt, f"for the {number}th time")
    assert len(data(rounds_app, "list", "--last")) == 20
    assert queries() == three


@pytest.mark.parametrize(
    ("choice", "number"), [((), 3), (("--round", "1"), 1), (("--best",), 2), (("--round", "0"), 0)]
)
def test_any_committed_adapter_can_be_exported(
    bench: Bench, tmp_path: Path, choice: tuple[str, ...], number: int
) -> None:
    exported = data(adapter_app, "export", "--last", *choice, "--out", tmp_path / "out dir")
    assert exported["round"] == number
    record = json.loads((tmp_path / "out dir" / "trunkline.json").read_text())
    assert record["origin"]["round"] == number
    assert record["adapter_sha256"] == exported["adapter_sha256"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("export",), 2, "name one run: RUN or --last"),
        (("export", "x", "--last"), 2, "not both"),
        (("export", "--last", "--best", "--round", "1"), 2, "--best and --round both choose"),
        (("export", "--last", "--round", "9"), 1, "that round was not committed"),
        (("export", "nope"), 1, "there is no run nope"),
        (("verify", "/nowhere"), 1, "is not a directory; name an exported adapter"),
    ],
)
def test_a_wrong_command_is_one_line_and_its_exit_code(
    bench: Bench, arguments: tuple[str, ...], code: int, told: str
) -> None:
    done = run(adapter_app, *arguments)
    assert done.exit_code == code
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_an_export_does_not_overwrite_what_is_no_export(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = run(adapter_app, "export", "--last", "--out", tmp_path)
    assert done.exit_code == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_changed_artifact_is_never_exported(bench: Bench, tmp_path: Path) -> None:
    version = bench.store.adapter_version(bench.store.get_run("last").run_id, 3)
    path = bench.artifacts.path(version.client_sha256)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    done = run(adapter_app, "export", "--last", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "it was changed or cut short" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_export_is_in_the_audit_log_with_who_asked_for_it(bench: Bench, tmp_path: Path) -> None:
    exported = data(adapter_app, "export", "--last", "--round", "1", "--out", tmp_path / "out", "--operator", "ada")
    (entry,) = bench.store.audit_log()
    assert (entry.operator, entry.action, entry.target) == ("ada", "adapter-exported", exported["run_id"])
    how = {"round": 1, "directory": str(tmp_path / "out"), "adapter_sha256": exported["adapter_sha256"]}
    assert entry.detail == how
    assert run(adapter_app, "export", "--last", "--round", "9", "--out", tmp_path / "none").exit_code == 1
    assert len(bench.store.audit_log()) == 1, "what was not exported is in the log"


# ---- differences -----------------------------------------------------------------------------------------------------


def test_two_rounds_of_a_run_differ_and_a_round_equals_its_export(bench: Bench, tmp_path: Path) -> None:
    run_id = bench.store.get_run("last").run_id
    found = data(adapter_app, "diff", f"{run_id}@0", run_id)
    assert (found["a"], found["b"], found["equal"]) == (f"{run_id}@0", f"{run_id}@3", False)
    first = ArtifactStore(bench.home / "artifacts")
    whole = [joined(first, bench.store.adapter_version(run_id, number)) for number in (0, 3)]
    change = torch.cat([(whole[1][name] - whole[0][name]).double().flatten() for name in sorted(whole[0])])
    assert found["parameters"]["norm_difference"] == pytest.approx(float(change.norm()))
    assert found["products"]["norm_a"] == 0.0, "the first adapter adds nothing"
    assert found["products"]["norm_difference"] > 0
    assert {row["name"] for row in found["by_parameter"]} == set(whole[0])

    data(adapter_app, "export", "--last", "--round", "3", "--out", tmp_path / "out")
    same = data(adapter_app, "diff", "last@3", tmp_path / "out")
    assert same["equal"] is True
    assert same["a_sha256"] == same["b_sha256"]
    assert (same["parameters"]["max_abs"], same["products"]["max_abs"]) == (0.0, 0.0)
    shown = run(adapter_app, "diff", "last@3", tmp_path / "out")
    assert "equal to the bit" in shown.stderr
    assert "total" in shown.stdout


@pytest.mark.parametrize(
    ("a", "code", "told"),
    [
        ("nope", 1, "there is no run nope"),
        ("last@7", 1, "that round was not committed"),
        ("last@x", 2, "it must be a directory, RUN or RUN@ROUND"),
        ("@1", 1, "there is no run"),
    ],
)
def test_an_adapter_that_is_none_is_one_line(bench: Bench, a: str, code: int, told: str) -> None:
    done = run(adapter_app, "diff", a, "last")
    assert (done.exit_code, done.stdout) == (code, "")
    assert told in done.stderr


def test_adapters_are_listed_from_a_moment_on_and_the_newest_only(bench: Bench) -> None:
    assert [row["round"] for row in data(adapter_app, "list", "--last", "--limit", "2")] == [2, 3]
    assert data(adapter_app, "list", "--last", "--since", "2999-01-01") == []


def test_rounds_are_listed_by_how_they_stand_and_the_newest_only(bench: Bench) -> None:
    assert [row["round"] for row in data(rounds_app, "list", "--last", "--limit", "2")] == [2, 3]
    assert data(rounds_app, "list", "--last", "--status", "aborted") == []
    assert len(data(rounds_app, "list", "--last", "--status", "committed", "--since", "2020-01-01")) == 3


@pytest.mark.parametrize(
    ("app", "arguments"),
    [(rounds_app, ("list",)), (rounds_app, ("show", "--round", "2")), (adapter_app, ("list",))],
)
def test_watching_a_run_that_has_ended_tells_what_there_is_once(
    bench: Bench, app: typer.Typer, arguments: tuple[str, ...]
) -> None:
    done = run(app, *arguments, "--last", "--watch")
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["data"] == data(app, *arguments, "--last") != []


# ---- verification ----------------------------------------------------------------------------------------------------


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own costs seconds, and one test has shown that it works."""
    monkeypatch.setattr(verification, "_in_fresh_process", verification._answer)


def test_the_adapter_of_a_run_is_proved_in_a_fresh_process(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    directory = bench.home / "runs" / bench.store.get_run("last").run_id / "adapter"
    found = data(adapter_app, "verify", directory)
    assert found["ok"] is True
    assert found["committed"] is True
    assert {finding["check"] for finding in found["findings"]} == {
        *("parts committed in SQL", "weights hash", "settings hash", "committed hash"),
        *("finite", "changes the model", "equals the split system"),
    }


def failed_checks(directory: Path) -> set[str]:
    done = run(adapter_app, "verify", directory, "-o", "json")
    assert done.exit_code == 1
    assert "is not what was trained" in done.stderr
    return {finding["check"] for finding in json.loads(done.stdout)["data"]["findings"] if not finding["ok"]}


def test_a_tampered_adapter_fails_even_if_its_own_record_was_tampered_too(bench: Bench, in_this_process: None) -> None:
    directory = bench.home / "runs" / bench.store.get_run("last").run_id / "adapter"
    weights = directory / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, weights)
    record_path = directory / "trunkline.json"
    record = json.loads(record_path.read_text())
    record["adapter_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    record_path.write_text(json.dumps(record))
    assert failed_checks(directory) == {"committed hash"}


def test_an_adapter_that_was_not_trained_fails(bench: Bench, tmp_path: Path, in_this_process: None) -> None:
    row = bench.store.get_run("last")
    export_adapter(bench.store, bench.artifacts, row, 0, tmp_path / "untrained")
    assert failed_checks(tmp_path / "untrained") == {"changes the model"}


def test_an_adapter_with_a_nan_fails_and_says_so(bench: Bench, in_this_process: None) -> None:
    directory = bench.home / "runs" / bench.store.get_run("last").run_id / "adapter"
    tensors = load_file(directory / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, directory / "adapter_model.safetensors")
    assert {"finite", "weights hash", "committed hash"} <= failed_checks(directory)


def test_without_the_model_verification_is_one_line(bench: Bench) -> None:
    directory = bench.home / "runs" / bench.store.get_run("last").run_id / "adapter"
    done = run(adapter_app, "verify", directory, "--model", "/nowhere")
    assert done.exit_code == 1
    assert done.stderr.strip().splitlines()[0].startswith("error: model '/nowhere' is not a directory")


def test_who_has_no_database_can_verify_too(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: None
) -> None:
    directory = bench.home / "runs" / bench.store.get_run("last").run_id / "adapter"
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    done = run(adapter_app, "verify", directory, "-o", "json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["data"]["committed"] is False
    assert "does not know the run" in done.stderr


@pytest.mark.parametrize("changed", [{"round": None}, {"head_layers": "one"}, {"tail_layers": None}])
def test_a_changed_record_is_one_line(bench: Bench, changed: dict[str, object], in_this_process: None) -> None:
    path = bench.home / "runs" / bench.store.get_run("last").run_id / "adapter" / "trunkline.json"
    record = json.loads(path.read_text())
    record["origin"] |= changed
    path.write_text(json.dumps(record))
    done = run(adapter_app, "verify", path.parent)
    assert (done.exit_code, done.exception.__class__) in {(0, type(None)), (1, SystemExit)}
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_empty_name_is_not_the_newest_run(bench: Bench) -> None:
    assert run(adapter_app, "export", "").exit_code == 1


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text('[tool.flwr.app.config]\nnum-rounds = 7\ndata = "x.jsonl"\n', "utf-8")
    return tmp_path


def test_resolved_settings_tell_where_each_comes_from(project: Path) -> None:
    rows = data(config_app, "show", project, "--resolved", "-c", "learning-rate=0.01", "--run-config", "num-rounds=8")
    found = {row["key"]: (row["value"], row["origin"]) for row in rows}
    assert found["num-rounds"] == (8, "--run-config")
    assert found["learning-rate"] == (0.01, "--run-config")
    assert found["data"] == ("x.jsonl", "pyproject.toml")
    assert found["quorum"] == (2, "default")


def test_plain_settings_are_those_that_differ_from_the_defaults(project: Path) -> None:
    assert {row["key"]: row["value"] for row in data(config_app, "show", project)} == {
        "num-rounds": 7,
        "data": "x.jsonl",
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--run-config", "num-round=3"), "unknown config key 'num-round'; did you mean 'num-rounds'?"),
        (("--run-config", "num-rounds=0"), "num-rounds is 0; it must be a whole number, >= 1"),
        (("--run-config", "num-rounds=oops"), "num-rounds is 'oops'; it must be a whole number, >= 1"),
        (("--run-config", "num-rounds"), "--run-config has 'num-rounds'; it must be KEY=VALUE pairs"),
    ],
)
def test_wrong_settings_are_refused_as_the_run_would(project: Path, arguments: tuple[str, ...], told: str) -> None:
    done = run(config_app, "show", project, *arguments)
    assert done.exit_code == 2
    assert told in done.stderr


def test_a_directory_that_is_no_project_is_named(tmp_path: Path) -> None:
    done = run(config_app, "show", tmp_path)
    assert done.exit_code == 2
    assert "pyproject.toml" in done.stderr


@pytest.mark.parametrize("content", ["tool = 3", "[tool.flwr]\napp = 3", "[tool.flwr.app]\nconfig = 3", "[tool", "\0"])
def test_a_malformed_project_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "pyproject.toml").write_text(content)
    done = run(config_app, "show", tmp_path)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert "pyproject.toml" in done.stderr


def test_looking_at_runs_imports_neither_torch_nor_flower(tmp_path: Path) -> None:
    code = "import sys, orchestrator.cli; print({'torch', 'flwr', 'transformers'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TRUNKLINE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.strip() == "set()"
    app_code = "import sys, orchestrator.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", app_code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.strip() == "False", done.stderr
