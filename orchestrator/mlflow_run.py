"""A run's settings and numbers in MLflow, where MLFLOW_TRACKING_URI is set and the extra `mlflow` is installed."""

from __future__ import annotations

import os
from typing import Any

from contract.config import RunConfig
from orchestrator.audience import Listener
from orchestrator.scalars import Point, RunScalars
from storage.records import RoundCommit

EXPERIMENT = "trunkline"
TAG = "trunkline.run"
_BOUNDS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""MLflow's own would hold a round up for minutes where its server is gone."""


class MlflowRun(Listener):
    """One MLflow run for one of ours, found again by its tag when ours is resumed."""

    what = "MLflow"

    def __init__(self, run_id: str, config: RunConfig, scalars: RunScalars) -> None:
        """Raises ImportError without the extra, and whatever MLflow raises."""
        for name, value in _BOUNDS.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient()
        self._scalars = scalars
        self._id, known = self._found(run_id)
        if known:
            self._client.update_run(self._id, status="RUNNING")
        else:
            for key, setting in config.to_flower().items():
                self._client.log_param(self._id, key, setting)
        written = self._written()
        for point in scalars.history():
            self._add(point, written)

    def committed(self, commit: RoundCommit) -> None:
        for point in self._scalars.newest(commit.number):
            self._add(point, frozenset())

    def ended(self, well: bool) -> None:
        for point in self._scalars.judgements():
            self._add(point, frozenset())
        self._client.set_terminated(self._id, "FINISHED" if well else "FAILED")

    def _found(self, run_id: str) -> tuple[str, bool]:
        """The MLflow run that has our run's tag, or a new one; and whether it was there."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
        there = self._client.search_runs([number], filter_string=f"tags.`{TAG}` = '{run_id}'", max_results=1)
        if there:
            return str(there[0].info.run_id), True
        made = self._client.create_run(number, tags={TAG: run_id}, run_name=run_id)
        return str(made.info.run_id), False

    def _written(self) -> frozenset[tuple[str, int]]:
        """Which numbers of which rounds MLflow has already."""
        names = self._client.get_run(self._id).data.metrics
        history = (metric for name in names for metric in self._client.get_metric_history(self._id, name))
        return frozenset((metric.key, metric.step) for metric in history)

    def _add(self, point: Point, written: frozenset[tuple[str, int]]) -> None:
        at_ms = int(point.at.timestamp() * 1000)
        for name, value in point.values.items():
            if (name, point.round) not in written:
                self._client.log_metric(self._id, name, value, timestamp=at_ms, step=point.round)
