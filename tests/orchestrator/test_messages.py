"""What a client may tell about itself."""

from __future__ import annotations

import pytest
from flwr.app import MetricRecord, RecordDict

from orchestrator.messages import read_metrics


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eval_loss", -1e15),
        ("eval_loss", 1e4),
        ("eval_tokens", 1e15),
        ("eval_tokens", -1),
        ("train_loss", float("nan")),
        ("train_loss", float("inf")),
        ("mood", 1.0),
        ("steps", [1.0, 2.0]),
    ],
)
def test_a_number_that_no_client_can_have_is_dropped(name: str, value: float) -> None:
    content = RecordDict({"metrics": MetricRecord({name: value, "seconds": 2.5})})
    assert read_metrics(content, "7") == {"seconds": 2.5}


def test_numbers_of_a_sane_size_are_kept() -> None:
    told = {"eval_loss": 0.0, "eval_tokens": 10**9, "train_loss": 12.5, "steps": 3}
    assert read_metrics(RecordDict({"metrics": MetricRecord(told)}), "7") == told
