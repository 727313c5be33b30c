"""What the start-up probe concludes from the times it takes, and that it takes few."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from server_trunk import probe as probing
from server_trunk.engine import Engine
from server_trunk.probe import Findings, Timings, probe
from tests.server_trunk.conftest import CUT


class Costs:
    """Stands for the lanes' passes: seconds by tokens, lanes, threads and type."""

    def __init__(self, per_token: dict[int, float], together: float = 1.0, cast: float = 1.0) -> None:
        self.per_token, self.together, self.cast = per_token, together, cast
        self.asked: list[int] = []

    def __call__(
        self, timings: Timings, lanes: Sequence[Any], tokens: int, threads: int, autocast_dtype: str = ""
    ) -> float:
        self.asked.append(tokens)
        seconds = tokens * self.per_token[tokens]
        if len(lanes) > 1:
            return seconds * len(lanes) * self.together
        return seconds * (self.cast if autocast_dtype else 1.0)


FALLING = {64: 16e-6, 128: 13e-6, 256: 11.5e-6, 512: 11e-6, 1024: 10.9e-6, 2048: 10.9e-6}


def found(costs: Costs, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Findings:
    monkeypatch.setattr(Timings, "seconds", lambda *args, **kwargs: costs(*args, **kwargs))
    lanes: Any = [object(), object()]
    return probe(lanes, 2, **options)


def test_a_pass_is_as_large_as_gains_something(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(Costs(FALLING), monkeypatch).batch_tokens == 512
    assert found(Costs(dict.fromkeys(FALLING, 1e-5)), monkeypatch).batch_tokens == 64


@pytest.mark.parametrize(("together", "lanes"), [(0.9, 2), (1.04, 2), (1.2, 1)])
def test_several_lanes_are_used_unless_they_lose(together: float, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(Costs(FALLING, together=together), monkeypatch).lanes == lanes


@pytest.mark.parametrize(("cast", "dtype"), [(0.7, "bfloat16"), (0.97, ""), (1.3, "")])
def test_bfloat16_is_told_where_it_gains(cast: float, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(Costs(FALLING, cast=cast), monkeypatch).autocast_dtype == dtype


def test_a_model_too_large_to_try_is_taken_on_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = Costs(dict.fromkeys(FALLING, 1.0))
    assert found(costs, monkeypatch) == Findings(probing.DEFAULT_BATCH_TOKENS, 2, "")
    assert costs.asked == [64]


def test_sizes_that_would_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = Costs(dict.fromkeys(FALLING, 0.001))
    assert found(costs, monkeypatch, patience_s=2.0).batch_tokens == 64
    assert max(costs.asked) < 512


def test_real_lanes_are_tried_and_their_threads_are_their_own(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model_dir, CUT, dtype="float32", attn_implementation="sdpa", device="cpu", lanes=1)
    monkeypatch.setattr(probing, "SIZES", (64, 128))
    findings = probe(engine.lanes, engine.threads)
    assert findings.batch_tokens in (64, 128)
    assert findings.lanes == 1
    assert str(findings.batch_tokens) in findings.summary()
    import torch

    before, seen = torch.get_num_threads(), []

    def other() -> None:
        engine.lanes[0].use_threads(before + 1)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
