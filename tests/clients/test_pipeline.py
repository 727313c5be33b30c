"""Several microbatches under way at once come to what one after the other does, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer

import clients
from clients.data import TokenRow
from clients.pipeline import accumulate, backward_all
from clients.split_model import adapter_state, remote_layers
from clients.trainer import train
from contract.config import RunConfig
from tests.clients.pipelined import (
    DEPTHS,
    WEIGHTS,
    Loader,
    Outcome,
    accumulated,
    assert_equal,
    at_width,
    in_turn,
    loading,
    microbatches,
    trained,
)
from tests.conftest import TrunkProcess
from tests.contract.families import VOCAB, batch
from tests.contract.parity import Tensors, differences


@pytest.fixture
def load(llama_dir: Path, trunk: TrunkProcess) -> Iterator[Loader]:
    with loading(llama_dir, trunk.address) as loader:
        yield loader


def test_clipped_steps_are_bitwise_those_of_a_plain_loop(load: Loader) -> None:
    expected = in_turn(load())
    assert len(set(expected[0])) == len(expected[0])
    for width in (1, *DEPTHS):
        assert_equal(expected, accumulated(load(), width))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(load: Loader, reentrant: bool) -> None:
    expected = in_turn(load())
    for width in (2, 8):
        model = load()
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert_equal(expected, accumulated(model, width))


def test_a_callers_autocast_and_threads_hold_in_the_lanes(load: Loader) -> None:
    plain = load()
    given = microbatches()
    exact = [float(plain(**one).loss.detach()) for one in given]
    seen: set[int] = set()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        models = [load() for _ in range(3)]
        for model in models:
            remote_layers(model).register_forward_pre_hook(lambda *_: seen.add(torch.get_num_threads()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outcomes = []
            for model, width in zip(models, (1, 4, 8), strict=True):
                at_width(model, width)
                losses = accumulate(model, given, WEIGHTS, depth=width)
                outcomes.append((losses, gradients(model)))
    finally:
        torch.set_num_threads(before)
    for outcome in outcomes[1:]:
        assert_equal(outcomes[0], outcome)
    assert seen == {2}
    assert outcomes[0][0] != exact
    assert outcomes[0][0] == pytest.approx(exact, rel=0.05)


def gradients(model: PeftModel) -> Tensors:
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return found | clients.trunk_state(model, gradients=True)


def with_dropout(model: PeftModel) -> PeftModel:
    """On the client's half only: the trunk draws its own."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_dropout:
                module.lora_dropout[name] = torch.nn.Dropout(0.3)
    return model.train()


def test_dropout_draws_the_same_however_many_are_under_way(load: Loader) -> None:
    def drawn(seed: int, width: int) -> Outcome:
        model = with_dropout(load())
        torch.manual_seed(seed)
        return accumulated(model, width)

    outcomes = []
    for width in (1, *DEPTHS):
        outcomes.append(drawn(7, width))
        assert torch.equal(torch.rand(()), torch.rand((), generator=_after_three_draws(7)))
    for outcome in outcomes[1:]:
        assert_equal(outcomes[0], outcome)
    assert differences(outcomes[0][1], drawn(8, 4)[1]) != []
    assert differences(outcomes[0][1], in_turn(load())[1]) != []


def _after_three_draws(seed: int) -> torch.Generator:
    """The caller's own generator is moved on by one number a step, whatever the microbatches drew."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        torch.randint(2**62, (), generator=generator)
    return generator


def test_a_frozen_half_of_the_client_changes_nothing(load: Loader) -> None:
    """With nothing trained before the cut no gradient comes back, and a microbatch ends at the trunk."""
    tail = LoraConfig(r=4, lora_alpha=8, target_modules=r".*layers\.[123]\.self_attn\.q_proj", task_type="CAUSAL_LM")
    assert_equal(in_turn(load(tail)), accumulated(load(tail), 4))


def test_other_backward_passes_of_the_same_step_add_up(load: Loader) -> None:
    def mixed(model: PeftModel, width: int) -> Outcome:
        def add(step: int) -> list[float]:
            model(**batch(seed=91 + step).inputs()).loss.backward()
            at_width(model, width)
            losses = accumulate(model, microbatches(step), WEIGHTS, depth=width)
            model(**batch(seed=81 + step).inputs()).loss.backward()
            return losses

        return trained(model, add)

    assert_equal(mixed(load(), 1), mixed(load(), 4))


def token_rows(count: int) -> list[TokenRow]:
    draw = np.random.default_rng(4)
    tokens = [draw.integers(3, VOCAB, size=int(draw.integers(6, 14)), dtype=np.int32) for _ in range(count)]
    return [TokenRow(number, row, row.copy(), truncated=False) for number, row in enumerate(tokens)]


def test_a_clients_training_is_the_same_at_every_depth(load: Loader, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"local-steps": 3, "per-device-train-batch-size": 2, "gradient-accumulation-steps": 6}
    outcomes = []
    for depth in (1, 2, 0):
        config = RunConfig.from_flower({**settings, "pipeline-depth": depth, "learning-rate": 1e-2})
        model, heard = with_dropout(load()), list[tuple[int, ...]]()
        done = train(model, token_rows(30), config, "key", lambda rows, heard=heard: heard.append(tuple(rows)))
        outcomes.append((done.loss, done.trained_tokens, heard, adapter_state(model)))
    for outcome in outcomes[1:]:
        assert outcome[:3] == outcomes[0][:3]
        assert differences(outcome[3], outcomes[0][3]) == []


def test_rows_stay_with_their_own_microbatch(load: Loader) -> None:
    """Announced one by one, each just before its own forward, whatever else is under way."""

    class Noting:
        name, summary, events = "noting", "a test's", {}

        def __init__(self) -> None:
            self.forwards: list[tuple[tuple[int, ...], int]] = []
            self.backwards: list[tuple[int, ...]] = []

        def forward(self, hidden_BTD: Any, rows: Sequence[int]) -> Any:
            self.forwards.append((tuple(rows), len(hidden_BTD)))
            return hidden_BTD

        def backward(self, grad_BTD: Any, rows: Sequence[int]) -> Any:
            self.backwards.append(tuple(rows))
            return grad_BTD

    model = load()
    trunk, noting = remote_layers(model).trunk, Noting()
    trunk._mechanism = noting
    given = microbatches()

    def share(index: int) -> torch.Tensor:
        rows = len(given[index]["input_ids"])
        trunk.announce(range(10 * index, 10 * index + rows))
        loss: torch.Tensor = model(**given[index]).loss
        return loss

    at_width(model, 4)
    backward_all(model, [lambda index=index: share(index) for index in range(8)], list(range(8)), 4)
    expected = [(tuple(range(10 * index, 10 * index + 1 + index % 3)), 1 + index % 3) for index in range(8)]
    assert noting.forwards == expected
    assert noting.backwards == [rows for rows, _ in expected]
