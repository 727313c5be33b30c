"""DP-SGD's loop: what it sums, when it draws, how often it sends; and, without noise to speak of, plain training."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import Phi3Config, get_scheduler

from clients import private_training
from clients.bookkeeping import KeptMicrobatch
from clients.data import TokenRow, collate
from clients.private_training import train_privately
from clients.sampling import RowSampler
from clients.split_model import remote_layers, trunk_state
from clients.trainer import train
from contract.adapter import adapter_parameters
from contract.config import RunConfig
from contract.errors import ConfigError
from privacy.gaussian import GaussianSum
from privacy.stream import SecretStream
from privacy.wire import WireDp
from tests.clients.conftest import ALL_LINEAR, CUT, opened
from tests.clients.test_trainer import restore, state, token_rows
from tests.conftest import TrunkProcess
from tests.contract.parity import differences, reference, trained_adapter

STEPS = 3
NO_NOISE = 1e-12
HUGE = 1e3


def config(**settings: Any) -> RunConfig:
    plain: dict[str, Any] = {
        "dp": "example",
        "trunk-adapter": "frozen",
        "local-steps": STEPS,
        "per-device-train-batch-size": 3,
        "learning-rate": 1e-2,
        "adam-epsilon": 1e-3,  # AdamW must not tell a gradient's sign alone
        "dp-sample-rate": 1.0,
        "dp-clip": HUGE,
        "dp-noise-multiplier": NO_NOISE,
        "lora-dropout": 0.0,
    }
    return RunConfig.from_flower(plain | {name.replace("_", "-"): value for name, value in settings.items()})


def secret() -> SecretStream:
    return SecretStream(os.urandom)


def unheard(rows: Sequence[int]) -> None:
    """Nobody listens."""


@pytest.fixture
def model(llama_dir: Path) -> PeftModel:
    return reference(llama_dir, ALL_LINEAR, trained_adapter(llama_dir, ALL_LINEAR), "sdpa")


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What was noised, step by step."""
    seen: list[np.ndarray] = []

    class Watched(GaussianSum):
        def apply(self, sum_d: Any) -> Any:
            seen.append(sum_d.copy())
            return super().apply(sum_d)

    monkeypatch.setattr(private_training, "GaussianSum", Watched)
    return seen


def plainly_trained(model: PeftModel, rows: Sequence[TokenRow], settings: RunConfig) -> float:
    """Full-batch AdamW on the mean over rows of each row's mean loss; the mean loss of a token over all steps."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, eps=settings.adam_epsilon, weight_decay=settings.weight_decay
    )
    scheduler = get_scheduler(settings.lr_scheduler_type, optimizer, 0, settings.local_steps)
    nats = 0.0
    for _ in range(settings.local_steps):
        for row in rows:
            loss = model(**collate([row])).loss
            (loss / len(rows)).backward()
            nats += loss.item() * row.targets
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return nats / (settings.local_steps * sum(row.targets for row in rows))


@pytest.mark.parametrize("method", ["book-keeping", "ghost"])
def test_without_noise_or_clipping_it_is_plain_training_on_the_mean_over_rows(model: PeftModel, method: str) -> None:
    rows, start = token_rows(7), state(model)
    settings = config(dp_gradients=method)
    loss = plainly_trained(model, rows, settings)
    expected = state(model)
    restore(model, start)
    done = train_privately(model, rows, settings, secret(), unheard)
    for name, value in state(model).items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name
        assert not torch.equal(value, start[name]), name
    assert done.loss == pytest.approx(loss, rel=1e-5)
    assert (done.steps, done.trained_tokens) == (STEPS, STEPS * sum(row.targets for row in rows))
    assert not model.training


def test_the_step_sums_rows_that_are_each_cut_to_the_clip(model: PeftModel, sums: list[np.ndarray]) -> None:
    rows = token_rows(6)
    alone = []
    for row in rows:
        model(**collate([row])).loss.backward()
        alone.append(np.concatenate([value.grad.double().flatten() for value in adapter_parameters(model).values()]))
        model.zero_grad()
    norms = [float(np.linalg.norm(gradient)) for gradient in alone]
    clip = float(np.median(norms))
    train_privately(model, rows, config(dp_clip=clip, local_steps=1), secret(), unheard)
    expected = sum(gradient * min(1.0, clip / norm) for gradient, norm in zip(alone, norms, strict=True))
    assert np.linalg.norm(sums[0] - expected) < 1e-5 * np.linalg.norm(expected)
    assert sum(norm > clip for norm in norms) == 3


@pytest.mark.parametrize("method", ["book-keeping", "hooks", "ghost"])
def test_no_row_moves_a_sum_by_more_than_the_clip(model: PeftModel, sums: list[np.ndarray], method: str) -> None:
    rows, start, clip = token_rows(5), state(model), 1e-3
    settings = config(dp_clip=clip, local_steps=1, dp_gradients=method)
    for left_out in (None, 0, 4):
        restore(model, start)
        train_privately(model, [row for row in rows if row.number != left_out], settings, secret(), unheard)
    # Ghost norms are float32 products and may be off in the seventh digit.
    assert [np.linalg.norm(sums[0] - other) <= clip * (1 + 1e-5) for other in sums[1:]] == [True, True]
    assert np.linalg.norm(sums[0] - sums[1]) > 0.99 * clip  # the bound is met, and not by leaving rows out


def test_a_row_changes_no_other_rows_part(model: PeftModel, sums: list[np.ndarray]) -> None:
    """Microbatches fall otherwise and are padded otherwise with one more row; the others' sum must stay."""
    rows, start = token_rows(5), state(model)
    long = TokenRow(5, np.arange(3, 43, dtype=np.int32), np.arange(3, 43, dtype=np.int32), truncated=False)
    for given in (rows, [long], [long, *rows]):
        restore(model, start)
        train_privately(model, given, config(local_steps=1, dp_clip=0.5), secret(), unheard)
    assert np.linalg.norm(sums[2] - sums[1] - sums[0]) < 1e-5 * np.linalg.norm(sums[0])


# ---- noise and chance ----------------------------------------------------------------------------------------------


def first_step(model: PeftModel, monkeypatch: pytest.MonkeyPatch, rows: Sequence[TokenRow], **settings: Any) -> Any:
    """The gradient over all trained parameters that the optimizer is given in the only step."""
    given: list[np.ndarray] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *args: Any) -> Any:
        given.append(np.concatenate([value.grad.double().flatten() for value in adapter_parameters(model).values()]))
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", noted)
        train_privately(model, rows, config(local_steps=1, **settings), secret(), unheard)
    return given[0]


def test_an_empty_draw_still_makes_a_noised_step_over_the_expected_batch(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch, sums: list[np.ndarray]
) -> None:
    rows = token_rows(8)
    heard: list[Sequence[int]] = []
    monkeypatch.setattr(RowSampler, "draw", lambda self: np.zeros(0, dtype=np.intp))
    noise = first_step(model, monkeypatch, rows, dp_sample_rate=0.25, dp_clip=3.0, dp_noise_multiplier=2.0)
    assert not sums[0].any()
    assert noise.std() * math.sqrt(noise.size) == pytest.approx(3.0 * 2.0 / (0.25 * 8) * math.sqrt(noise.size), rel=0.1)
    before = state(model)
    done = train_privately(model, rows, config(dp_noise_multiplier=1.0, dp_clip=1.0), secret(), heard.append)
    assert (done.loss, done.trained_tokens, done.steps, heard) == (0.0, 0, STEPS, [])
    assert len(differences(before, state(model))) == len(before)


def test_the_sum_is_divided_by_the_expected_batch_whoever_joined(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch, sums: list[np.ndarray]
) -> None:
    gradient = first_step(model, monkeypatch, token_rows(9), dp_sample_rate=0.5)
    assert np.allclose(gradient, sums[0] / 4.5, rtol=1e-5, atol=1e-7)


def test_rows_and_noise_differ_between_runs_with_the_same_settings(model: PeftModel) -> None:
    start, rows, found = state(model), token_rows(20), []
    for _ in range(2):
        restore(model, start)
        heard: list[int] = []
        train_privately(model, rows, config(dp_sample_rate=0.5, dp_clip=1.0, seed=0), secret(), heard.extend)
        found.append((heard, state(model)))
    assert found[0][0] != found[1][0]
    assert differences(found[0][1], found[1][1]) != []


def test_dropout_is_drawn_from_the_secret_stream(model: PeftModel) -> None:
    seeds = []
    for _ in range(2):
        torch.manual_seed(0)
        train_privately(model, token_rows(1), config(local_steps=1), secret(), unheard)
        seeds.append(torch.initial_seed())
    assert seeds[0] != seeds[1]
    assert 0 not in seeds


# ---- the wire ------------------------------------------------------------------------------------------------------


def wire_dp(**settings: Any) -> RunConfig:
    return config(wire="dp", metrics="off", trunk_adapter="trained", **settings)


def test_every_row_is_announced_with_its_microbatch_and_none_oftener_than_it_may_be_sent(model: PeftModel) -> None:
    rows = [TokenRow(row.number + 100, row.tokens_T, row.labels_T, truncated=False) for row in token_rows(7)]
    heard: list[tuple[int, ...]] = []
    sizes: list[int] = []
    train_privately(
        model, rows, wire_dp(wire_releases=2, local_steps=4), secret(), lambda given: heard.append(tuple(given))
    )
    sizes = [len(given) for given in heard]
    assert sizes == [3, 3, 1] * 2
    assert Counter(number for given in heard for number in given) == {row.number: 2 for row in rows}
    heard.clear()
    train_privately(model, rows, config(local_steps=4), secret(), lambda given: heard.append(tuple(given)))
    assert Counter(number for given in heard for number in given) == {row.number: 4 for row in rows}


def test_a_private_step_goes_through_a_frozen_trunk(llama_dir: Path, trunk: TrunkProcess) -> None:
    """And equals the un-split model's, the trunk's half of which is held still."""
    rows, start = token_rows(4), trained_adapter(llama_dir, ALL_LINEAR)
    with opened(llama_dir, trunk.address, CUT, start, trunk_frozen=True) as split:
        announced: list[int] = []
        train_privately(split, rows, config(), secret(), announced.extend)
        got = state(split)
        assert announced == [0, 1, 2, 3] * STEPS
        assert differences({name: value for name, value in start.items() if name not in got}, trunk_state(split)) == []
    whole = reference(llama_dir, ALL_LINEAR, start, "sdpa")
    for name, value in adapter_parameters(whole).items():
        value.requires_grad_(name in got)
    train_privately(whole, rows, config(), secret(), unheard)
    expected = state(whole)
    for name, value in got.items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name


def test_a_trained_trunk_steps_on_the_mean_over_the_expected_batch(llama_dir: Path, trunk: TrunkProcess) -> None:
    rows, start = token_rows(4), trained_adapter(llama_dir, ALL_LINEAR)
    with opened(llama_dir, trunk.address, CUT, start) as split:
        train_privately(split, rows, wire_dp(local_steps=2, wire_releases=2), secret(), unheard)
        got = {**state(split), **trunk_state(split)}
        assert "trunk.step" in remote_layers(split).trunk.wire_log.summary()
    whole = reference(llama_dir, ALL_LINEAR, start, "sdpa")
    plainly_trained(whole, rows, config(local_steps=2))
    for name, value in state(whole).items():
        assert torch.allclose(got[name], value, rtol=1e-4, atol=2e-6), name
        assert not torch.equal(got[name], start[name]), name


@pytest.mark.parametrize("method", ["book-keeping", "hooks", "ghost"])
def test_a_noised_wire_gets_every_row_as_often_as_it_may_and_not_once_more(
    llama_dir: Path, trunk: TrunkProcess, method: str
) -> None:
    """The mechanism itself counts, each way, and would end the round."""
    rows, start = token_rows(4), trained_adapter(llama_dir, ALL_LINEAR)
    settings = wire_dp(dp_gradients=method, local_steps=4, wire_releases=2, dp_clip=1.0, dp_noise_multiplier=1.0)
    mechanism = WireDp(1.0, 0.01, 1.0, settings.wire_releases, secret())
    with opened(llama_dir, trunk.address, CUT, start, mechanism=mechanism) as split:
        train_privately(split, rows, settings, secret(), remote_layers(split).trunk.announce)
    numbers = {row.number: 2 for row in rows}
    assert mechanism._sent == {"wire_forward": numbers, "wire_backward": numbers}


def test_lengths_are_shown_as_the_bucket_says(model: PeftModel) -> None:
    masks: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, given: masks.extend(given["attention_mask"].sum(dim=1).tolist()), with_kwargs=True
    )
    train_privately(model, token_rows(5), config(wire_length_bucket=8, max_length=16, local_steps=1), secret(), unheard)
    made_up = 3 * 2 + 3  # the proof's, which are nobody's
    assert set(masks[made_up:]) <= {8, 16}
    assert len(masks[made_up:]) == 5


# ---- what ends it --------------------------------------------------------------------------------------------------


LEFT_OUT = "times in this round a row's loss or gradient was not finite"


def test_a_model_that_diverged_adds_nothing_and_ends_no_round(
    model: PeftModel, sums: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error would tell the orchestrator of rows what no noise covers; the site's own log is told."""
    step = torch.optim.AdamW.step

    def broken(self: torch.optim.AdamW, *args: Any) -> Any:
        step(self, *args)
        with torch.no_grad():
            next(iter(adapter_parameters(model).values())).fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    rows = token_rows(2)
    done = train_privately(model, rows, config(), secret(), unheard)
    assert [bool(sum_d.any()) for sum_d in sums] == [True, False, False]
    assert (done.steps, done.trained_tokens) == (STEPS, sum(row.targets for row in rows))
    assert math.isfinite(done.loss)
    (told,) = [line for line in caplog.messages if LEFT_OUT in line]
    assert told.startswith(f"{(STEPS - 1) * len(rows)} {LEFT_OUT}")


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_row_whose_gradient_is_not_finite_is_left_out(
    model: PeftModel, sums: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    rows, start = token_rows(2), state(model)
    train_privately(model, rows[:1], config(local_steps=1), secret(), unheard)
    restore(model, start)
    rows_of = KeptMicrobatch.rows

    def broken(self: KeptMicrobatch) -> Any:
        found = rows_of(self)
        if model.training:  # the proof's stay whole
            found[-1, 3] = value
        return found

    monkeypatch.setattr(KeptMicrobatch, "rows", broken)
    train_privately(model, rows, config(local_steps=1), secret(), unheard)
    assert np.linalg.norm(sums[1] - sums[0]) < 1e-5 * np.linalg.norm(sums[0])


MARK = 20
"""The first token of the row that is spoilt."""


def spoil(model: PeftModel, where: str, value: float) -> None:
    """Makes what a layer gets or gives, or the gradient that comes back to it, `value` for the row that MARK begins."""
    layers, marked = model.get_base_model().model.layers, []

    def noted(_: Any, args: Any, given: Any) -> None:
        marked[:] = [model.training & (given["input_ids"][:, 0] == MARK)]

    def spoilt(values_BTD: torch.Tensor) -> torch.Tensor:
        return values_BTD.masked_fill(marked[0][:, None, None], value)

    def spoil_gradient(_: Any, args: Any, output_BTD: torch.Tensor) -> None:
        if output_BTD.requires_grad:
            output_BTD.register_hook(spoilt)  # type: ignore[no-untyped-call]

    model.register_forward_pre_hook(noted, with_kwargs=True)
    layer = layers[0 if "head" in where else -1]
    if "input" in where:
        layer.register_forward_pre_hook(lambda _, args: (spoilt(args[0]), *args[1:]))
    elif "output" in where:
        layer.register_forward_hook(lambda _, args, output_BTD: spoilt(output_BTD))
    else:
        layer.register_forward_hook(spoil_gradient)


@pytest.mark.parametrize("method", ["book-keeping", "hooks", "ghost"])
@pytest.mark.parametrize("where", ["head input", "head output", "head gradient", "tail input", "tail gradient"])
def test_a_spoilt_row_goes_over_the_wire_and_spoils_no_other(
    llama_dir: Path, trunk: TrunkProcess, sums: list[np.ndarray], where: str, method: str
) -> None:
    start, rows = trained_adapter(llama_dir, ALL_LINEAR), token_rows(3)
    tokens = np.array([MARK, 5, 6, 7, 8, 9, 10], dtype=np.int32)
    marked = [rows[0], TokenRow(9, tokens, tokens, truncated=False), *rows[1:]]
    settings = wire_dp(dp_gradients=method, local_steps=1, dp_sample_rate=1.0, dp_clip=0.5)
    heard: list[int] = []
    trunks = []
    for given, value in ((rows, 0.0), (marked, math.nan), (marked, math.inf)):
        with opened(llama_dir, trunk.address, CUT, start) as split:
            if value:
                spoil(split, where, value)
            train_privately(split, given, settings, secret(), heard.extend)
            trunks.append(trunk_state(split))
    # One row more is expected, by which the trunk's mean is divided.
    assert all(np.linalg.norm(got - sums[0]) < 1e-5 * np.linalg.norm(sums[0]) for got in sums[1:])
    assert differences(trunks[1], trunks[2]) == []
    assert all(torch.isfinite(value).all() for value in trunks[1].values())
    assert len(heard) == len(rows) + 2 * len(marked)


def test_positions_that_depend_on_the_longest_row_are_refused(model: PeftModel) -> None:
    short = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = Phi3Config(
        hidden_size=32, num_attention_heads=4, rope_scaling=short, original_max_position_embeddings=16
    ).rope_parameters
    model.get_base_model().config.rope_parameters = {"full_attention": dict(rope)}
    with pytest.raises(ConfigError, match="max-length is 32; .* longer than 16 tokens"):
        train_privately(model, token_rows(2), config(max_length=32), secret(), unheard)
    train_privately(model, token_rows(2), config(max_length=16, local_steps=1), secret(), unheard)


def test_plain_training_is_left_as_it_was(model: PeftModel) -> None:
    """Nothing of DP-SGD stays in a model that it has trained."""
    start, rows = state(model), token_rows(4)
    plain = RunConfig.from_flower({"local-steps": 1})
    train(model, rows, plain, "key")
    expected = state(model)
    for method in ("book-keeping", "hooks", "ghost"):
        restore(model, start)
        train_privately(model, rows, config(local_steps=1, dp_gradients=method), secret(), unheard)
        restore(model, start)
        train(model, rows, plain, "key")
        assert differences(expected, state(model)) == [], method
