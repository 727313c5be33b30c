"""Local training against the loop that it stands for, on an un-split model: a split one is trained by the same code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import get_scheduler

from clients.data import TokenRow, collate, row_batches
from clients.trainer import judge, planned_steps, predicted_tokens, train
from contract.adapter import adapter_parameters, adapter_shapes, initial_adapter, resolve_lora
from contract.config import RunConfig
from contract.errors import NonFiniteError
from tests.clients.conftest import ALL_LINEAR
from tests.contract.families import VOCAB
from tests.contract.parity import Tensors, differences, reference


@pytest.fixture
def model(llama_dir: Path) -> PeftModel:
    start = initial_adapter(adapter_shapes(llama_dir, resolve_lora(llama_dir, ALL_LINEAR)), 1)
    return reference(llama_dir, ALL_LINEAR, start, "sdpa")


def token_rows(count: int, seed: int = 0) -> list[TokenRow]:
    """Rows of unlike lengths, the first third of each unlearned."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        tokens = draw.integers(3, VOCAB, size=int(draw.integers(6, 14)), dtype=np.int32)
        labels = tokens.copy()
        labels[: len(tokens) // 3] = -100
        rows.append(TokenRow(number, tokens, labels, truncated=False))
    return rows


def config(**settings: Any) -> RunConfig:
    plain = {"local-steps": 3, "per-device-train-batch-size": 2, "learning-rate": 1e-2, "max-grad-norm": 0.0}
    return RunConfig.from_flower(plain | {name.replace("_", "-"): value for name, value in settings.items()})


def state(model: PeftModel) -> Tensors:
    return {name: value.detach().clone() for name, value in adapter_parameters(model).items()}


def restore(model: PeftModel, tensors: Tensors) -> None:
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(tensors[name])


def test_accumulated_microbatches_weigh_every_predicted_token_alike(model: PeftModel) -> None:
    start, rows = state(model), token_rows(4)
    # One step of AdamW only tells a gradient's sign; a large epsilon keeps its size.
    small = config(local_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4, adam_epsilon=1.0)
    parts = train(model, rows, small, "key")
    got = state(model)
    restore(model, start)
    at_once = train(model, rows, config(local_steps=2, per_device_train_batch_size=4, adam_epsilon=1.0), "key")
    assert parts.trained_tokens == at_once.trained_tokens == 2 * sum(row.targets for row in rows)
    assert parts.loss == pytest.approx(at_once.loss, rel=1e-5)
    for name, expected in state(model).items():
        assert torch.allclose(got[name], expected, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_learning_rate_follows_hugging_faces_schedule(
    model: PeftModel, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *args: Any) -> Any:
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    train(model, token_rows(6), config(local_steps=6, lr_scheduler_type=kind, warmup_ratio=0.3), "key")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, math.ceil(0.3 * 6) + 1, 7)
    expected = []
    for _ in range(7):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert expected[0] == 0
    assert seen == pytest.approx(expected[1:])
    assert 0 < seen[0] < seen[2]


def test_a_warm_up_over_a_single_step_still_learns(model: PeftModel) -> None:
    before = state(model)
    train(model, token_rows(4), config(local_steps=1, warmup_ratio=0.1), "key")
    assert differences(before, state(model)) != []


def test_the_gradient_norm_is_clipped(model: PeftModel) -> None:
    start = state(model)
    # Epsilon far above the gradients makes the update proportional to them.
    free = config(local_steps=1, adam_epsilon=1e3, learning_rate=10.0)
    train(model, token_rows(2), free, "key")
    unclipped = {name: value - start[name] for name, value in state(model).items()}
    restore(model, start)
    train(model, token_rows(2), free.model_copy(update={"max_grad_norm": 0.01}), "key")
    clipped = {name: value - start[name] for name, value in state(model).items()}
    ratios = {name: float(clipped[name].norm() / unclipped[name].norm()) for name in clipped if unclipped[name].any()}
    assert max(ratios.values()) < 0.2
    assert max(ratios.values()) == pytest.approx(min(ratios.values()), rel=1e-3)


def test_training_depends_on_the_key_alone(model: PeftModel) -> None:
    start, rows = state(model), token_rows(9)
    results = []
    for key in ("1/run/1/a", "1/run/1/a", "1/run/2/a"):
        torch.manual_seed(len(results))
        restore(model, start)
        train(model, rows, config(lora_dropout=0.0), key)
        results.append(state(model))
    assert differences(results[0], results[1]) == []
    assert differences(results[0], results[2]) != []


def test_epochs_use_every_row_once_each(model: PeftModel) -> None:
    rows = token_rows(7)
    settings = config(local_steps=0, local_epochs=2, max_tokens=10_000, gradient_accumulation_steps=3)
    done = train(model, rows, settings, "key")
    assert done.steps == planned_steps(7, settings) == 3
    assert done.trained_tokens == 2 * sum(row.targets for row in rows)


def test_optimisers_start_fresh_each_round(model: PeftModel) -> None:
    rows = token_rows(4)
    train(model, rows, config(), "first")
    between = state(model)
    train(model, rows, config(), "second")
    twice = state(model)
    restore(model, between)
    train(model, rows, config(), "second")
    assert differences(twice, state(model)) == []


def test_judging_is_the_mean_loss_per_predicted_token(model: PeftModel) -> None:
    rows = token_rows(5)
    got = judge(model, rows, config())
    total = tokens = 0.0
    with torch.no_grad():
        for batch in map(collate, row_batches(rows, 1)):
            count = predicted_tokens(batch)
            total += float(model(**batch).loss) * count
            tokens += count
    assert got.tokens == tokens == sum(row.targets for row in rows)
    assert got.loss == pytest.approx(total / tokens, rel=1e-6)
    assert judge(model, rows, config(eval_batches=1)).tokens == sum(row.targets for row in rows[:2])
    assert math.isnan(judge(model, [], config()).loss)


def test_every_row_is_announced_before_the_model_gets_it(model: PeftModel) -> None:
    rows, heard = token_rows(5), list[tuple[int, ...]]()
    seen: list[tuple[int, ...]] = []
    numbers = {tuple(row.tokens_T[:5].tolist()): row.number for row in rows}
    model.register_forward_pre_hook(
        lambda _, args, given: seen.append(tuple(numbers[tuple(ids[:5])] for ids in given["input_ids"].tolist())),
        with_kwargs=True,
    )
    train(model, rows, config(gradient_accumulation_steps=2), "key", lambda batch: heard.append(tuple(batch)))
    assert heard == seen
    assert len(heard) == 6
    heard.clear()
    seen.clear()
    judge(model, rows, config(), lambda batch: heard.append(tuple(batch)))
    assert heard == seen == [(0, 1), (2, 3), (4,)]


def test_lengths_that_are_hidden_change_no_loss(model: PeftModel) -> None:
    rows, start = token_rows(6), state(model)
    hidden = config(wire_length_bucket=8, max_length=16)
    masks: list[list[int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: masks.append(given["attention_mask"].sum(dim=1).tolist()), with_kwargs=True
    )
    own = judge(model, rows, config())
    shown = judge(model, rows, hidden)
    lengths = [len(row.tokens_T) for row in rows]
    assert sum(masks[:3], []) == lengths
    assert sum(masks[3:], []) == [8 if length <= 8 else 16 for length in lengths]
    assert len(set(lengths)) > 2
    hook.remove()
    assert shown.loss == pytest.approx(own.loss, rel=1e-6)
    trained = []
    for settings in (config(), hidden):
        restore(model, start)
        trained.append((train(model, rows, settings, "key"), state(model)))
    assert trained[0][0].loss == pytest.approx(trained[1][0].loss, rel=1e-5)
    for name, expected in trained[0][1].items():
        assert torch.allclose(trained[1][1][name], expected, atol=1e-4), name


def test_a_loss_that_is_not_finite_names_the_step(model: PeftModel) -> None:
    with torch.no_grad():
        next(iter(adapter_parameters(model).values())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="loss of training step 1 is nan: lower learning-rate"):
        train(model, token_rows(4), config(), "key")
