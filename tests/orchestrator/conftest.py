"""What an orchestrator works with, real except for Flower and for time."""

from __future__ import annotations

import pytest
from flwr.supercore.task_identity import TaskIdentity


@pytest.fixture(autouse=True)
def _inside_a_flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower builds messages only inside one of its tasks."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
