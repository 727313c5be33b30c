"""A run in MLflow: its settings, its numbers once each, its tag; and no run that waits for a server that is gone."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.mlflow_run import EXPERIMENT, TAG
from orchestrator.scalars import HELD_OUT_LOSS, TRAIN_LOSS
from tests.orchestrator.conftest import Bench
from tests.orchestrator.test_resume import failed

MakeBench = Callable[..., Bench]


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A tracking store of the test's own, on disk."""
    uri = f"file://{tmp_path / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(uri)


def only_run(mlflow: MlflowClient) -> Any:
    experiment = mlflow.get_experiment_by_name(EXPERIMENT)
    (found,) = mlflow.search_runs([experiment.experiment_id])
    return found


def history(mlflow: MlflowClient, name: str) -> list[tuple[int, float]]:
    run_id = only_run(mlflow).info.run_id
    return sorted((metric.step, metric.value) for metric in mlflow.get_metric_history(run_id, name))


def test_a_run_has_its_settings_its_numbers_and_its_tag(make_bench: MakeBench, mlflow: MlflowClient) -> None:
    bench = make_bench({1: 100, 2: 60}, num_rounds=2).tell_shapes_ahead()
    bench.conduct()
    run, found = bench.store.get_run("last"), only_run(mlflow)
    assert found.data.tags[TAG] == found.info.run_name == run.run_id
    assert found.info.status == "FINISHED"
    assert found.data.params == {name: str(value) for name, value in run.config.items()}
    assert history(mlflow, HELD_OUT_LOSS) == [(0, 5.0), (1, 4.0), (2, 3.0)]
    assert history(mlflow, TRAIN_LOSS) == [(1, 3.0), (2, 3.0)]
    assert history(mlflow, "tokens/trained") == [(1, 160.0), (2, 160.0)]


def test_a_resumed_run_goes_on_in_the_same_one_with_every_number_once(
    make_bench: MakeBench, mlflow: MlflowClient
) -> None:
    bench = make_bench({1: 100, 2: 60}, num_rounds=3).tell_shapes_ahead()
    run_id = failed(bench, 3)
    assert only_run(mlflow).info.status == "FAILED"
    bench.conduct(resume_run=run_id)
    assert only_run(mlflow).info.status == "FINISHED"
    assert only_run(mlflow).data.tags[TAG] == run_id
    assert [step for step, _ in history(mlflow, "tokens/trained")] == [1, 2, 3]
    assert [step for step, _ in history(mlflow, HELD_OUT_LOSS)] == [0, 1, 2, 3]


@pytest.mark.parametrize("there", [True, False])
def test_a_server_that_is_gone_or_a_missing_extra_costs_one_warning(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, there: bool
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: nothing answers there
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada:secret@127.0.0.1:{taken.getsockname()[1]}")
        if not there:
            monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
        bench = make_bench({1: 100, 2: 60}, num_rounds=1).tell_shapes_ahead()
        with caplog.at_level(logging.WARNING, "trunkline"):
            bench.conduct()
    assert bench.store.get_run("last").status == "finished"
    (warning,) = [record.getMessage() for record in caplog.records if "MLflow" in record.getMessage()]
    assert warning.startswith("MLflow: off for this run: ")
    assert "secret" not in warning
