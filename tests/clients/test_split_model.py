"""A split model is used as any PEFT model is; each way of using it is held against the un-split model."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from peft import LoraConfig, PeftModel

import clients
from clients.connection import TrunkConnection
from clients.remote_layers import RemoteLayers
from clients.split_model import adapter_state, remote_layers
from contract.adapter import adapter_parameters, adapter_shapes, initial_adapter, resolve_lora
from contract.errors import (
    CapacityError,
    ConfigError,
    DataError,
    FrameError,
    ModelError,
    NonFiniteError,
    SessionError,
)
from contract.privacy_records import Channel, PrivacyEvent
from tests.clients.conftest import ALL_LINEAR, CUT
from tests.conftest import TrunkProcess
from tests.contract.families import Batch, batch
from tests.contract.parity import Tensors, differences, reference, run

SEED = 11


@pytest.fixture
def whole(llama_dir: Path) -> PeftModel:
    return reference(llama_dir, ALL_LINEAR, first_adapter(llama_dir), "sdpa")


@pytest.fixture
def split(llama_dir: Path, trunk: TrunkProcess) -> Iterator[PeftModel]:
    model = clients.load_split_model(llama_dir, trunk.address, CUT.head, CUT.tail, ALL_LINEAR, seed=SEED, timeout_s=20)
    yield model
    remote_layers(model).trunk.abandon()


def first_adapter(model_dir: Path, lora: LoraConfig = ALL_LINEAR) -> Tensors:
    return initial_adapter(adapter_shapes(model_dir, resolve_lora(model_dir, lora)), SEED)


def trainable(model: PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trained(model: PeftModel, *, clip: float = 0.0, steps: int = 3, accumulate: int = 2, **adamw: Any) -> Tensors:
    """The adapter after some steps of the loop that everybody writes."""
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, **adamw)
    for step in range(steps):
        for part in range(accumulate):
            given = batch("left", rows=2 + part, seed=10 * step + part)
            (model(**given.inputs()).loss / accumulate).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return state(model)


def state(model: PeftModel) -> Tensors:
    """The whole adapter, of a split model or of an un-split one."""
    if any(isinstance(module, RemoteLayers) for module in model.modules()):
        return adapter_state(model)
    return {name: value.detach().clone() for name, value in adapter_parameters(model).items()}


def largest_difference(expected: Tensors, got: Tensors) -> float:
    assert expected.keys() == got.keys()
    return max(float((expected[name] - got[name]).abs().max()) for name in expected)


def whole_gradients(model: PeftModel, given: Batch) -> Tensors:
    return run(model, adapter_parameters(model), given)


def split_gradients(model: PeftModel, given: Batch) -> Tensors:
    model.zero_grad()
    found = run(model, adapter_parameters(model), given)
    return found | {f"grad {name}": grad for name, grad in clients.trunk_state(model, gradients=True).items()}


def test_accumulated_steps_without_clipping_are_bitwise_equal(whole: PeftModel, split: PeftModel) -> None:
    expected = trained(whole, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6)
    assert differences(expected, trained(split, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6)) == []


def test_dora_in_a_session_of_its_own_is_bitwise_equal(llama_dir: Path, trunk: TrunkProcess) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["v_proj", "up_proj"], task_type="CAUSAL_LM")
    whole = reference(llama_dir, lora, first_adapter(llama_dir, lora), "sdpa")
    split = clients.load_split_model(llama_dir, trunk.address, CUT.head, CUT.tail, lora, seed=SEED)
    expected, got = trained(whole), trained(split)
    clients.close(split)
    assert differences(expected, got) == []
    assert sum(name.endswith("lora_magnitude_vector") for name in expected) == 8


def test_clipping_acts_on_the_norm_over_client_and_trunk(whole: PeftModel, split: PeftModel, llama_dir: Path) -> None:
    start = first_adapter(llama_dir)
    expected, got = trained(whole, clip=0.05), trained(split, clip=0.05)
    # The two norms are summed in another order, so the factors may differ in the last bit of a float32.
    assert largest_difference(expected, got) < 1e-6
    assert largest_difference(expected, start) > 1e-3


def test_the_anchor_carries_the_trunks_gradient_norm(whole: PeftModel, split: PeftModel) -> None:
    for seed in (1, 2):
        for model in (whole, split):
            model(**batch("none", seed=seed).inputs()).loss.backward()
    norms = [torch.nn.utils.get_total_norm([p.grad for p in trainable(model)]) for model in (whole, split)]
    assert torch.allclose(norms[0], norms[1], rtol=1e-6)


def test_two_calls_under_one_loss_add_up(whole: PeftModel, split: PeftModel) -> None:
    for model in (whole, split):
        losses = [model(**batch("right", seed=seed).inputs()).loss for seed in (1, 2, 3)]
        (losses[0] + 2 * losses[1]).backward()
        losses[2].backward()
    got = {name: parameter.grad for name, parameter in adapter_parameters(split).items()}
    got |= clients.trunk_state(split, gradients=True)
    expected = {name: parameter.grad for name, parameter in adapter_parameters(whole).items()}
    assert largest_difference(expected, got) < 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_bitwise_equal(whole: PeftModel, split: PeftModel, reentrant: bool) -> None:
    expected = whole_gradients(whole, batch("left"))
    for model in (split, whole):
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert differences(expected, split_gradients(split, batch("left"))) == []
    assert differences(expected, whole_gradients(whole, batch("left"))) == []


def test_bf16_autocast_is_bitwise_equal(whole: PeftModel, split: PeftModel) -> None:
    plain = whole_gradients(whole, batch("left"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = whole_gradients(whole, batch("left"))
        got = split_gradients(split, batch("left"))
    assert differences(expected, got) == []
    assert "loss" in differences(plain, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept_at_the_trunk(whole: PeftModel, split: PeftModel, mode: Any) -> None:
    room = remote_layers(split).trunk.welcome.max_pending
    with mode():
        kept = [split(**batch("right", seed=seed).inputs()).logits for seed in range(room + 2)]
        expected = whole(**batch("right", seed=room + 1).inputs()).logits
    real = batch("right", seed=room + 1).real
    assert torch.equal(kept[-1][real], expected[real])


def test_generate_without_a_cache_equals_the_unsplit_model(whole: PeftModel, split: PeftModel) -> None:
    given = {"input_ids": batch().input_ids[:, :4], "max_new_tokens": 5, "use_cache": False, "do_sample": False}
    assert torch.equal(split.generate(**given), whole.generate(**given))


def test_forwards_that_are_let_go_free_their_graphs(split: PeftModel) -> None:
    room = remote_layers(split).trunk.welcome.max_pending
    for seed in range(room + 2):
        split(**batch(seed=seed).inputs())
    split(**batch().inputs()).loss.backward()


def test_forwards_that_are_held_fill_the_trunk(split: PeftModel) -> None:
    room = remote_layers(split).trunk.welcome.max_pending
    held = [split(**batch(seed=seed).inputs()).loss for seed in range(room)]
    with pytest.raises(CapacityError, match=f"{room} forwards wait"):
        split(**batch().inputs())
    assert len(held) == room


def test_an_overlong_sequence_is_refused_by_name(split: PeftModel) -> None:
    with pytest.raises(DataError, match="65 tokens is longer than the model's max_position_embeddings, 64"):
        split(**batch(tokens=65).inputs())
    split(**batch(tokens=64).inputs()).loss.backward()


def test_a_mask_that_is_not_binary_is_refused_by_name(split: PeftModel) -> None:
    given = batch("left")
    with pytest.raises(FrameError, match="attention_mask .* hold only 0 and 1"):
        split(input_ids=given.input_ids, attention_mask=given.attention_mask * 2)
    split(**given.inputs()).loss.backward()


def test_activations_and_gradients_that_are_not_finite_are_refused_before_sending(split: PeftModel) -> None:
    trunk = remote_layers(split).trunk
    head = adapter_parameters(split)
    name = next(name for name in head if ".layers.0." in name and "lora_B" in name)
    sent = trunk.wire_log.sent_bytes
    with torch.no_grad():
        head[name][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="hidden states at the head cut"):
        split(**batch().inputs())
    assert trunk.wire_log.sent_bytes == sent
    with torch.no_grad():
        head[name].zero_()
    loss = split(**batch().inputs()).loss
    sent = trunk.wire_log.sent_bytes
    with pytest.raises(NonFiniteError, match="gradient at the tail cut"):
        (loss * float("nan")).backward()
    assert trunk.wire_log.sent_bytes == sent
    split(**batch().inputs()).loss.backward()


class Recording:
    """Lets twice the value pass, and remembers what it was given, and of which rows."""

    name, summary = "recording", "a test's"
    events: Mapping[Channel, PrivacyEvent] = {}

    def __init__(self) -> None:
        self.seen: list[tuple[str, npt.NDArray[np.float32], tuple[int, ...]]] = []

    def forward(self, hidden_BTD: npt.NDArray[np.float32], rows: Sequence[int]) -> npt.NDArray[np.float32]:
        self.seen.append(("forward", hidden_BTD.copy(), tuple(rows)))
        return 2 * hidden_BTD

    def backward(self, grad_BTD: npt.NDArray[np.float32], rows: Sequence[int]) -> npt.NDArray[np.float32]:
        self.seen.append(("backward", grad_BTD.copy(), tuple(rows)))
        return 2 * grad_BTD


def test_what_crosses_passes_the_mechanism_as_the_rows_that_were_announced(split: PeftModel) -> None:
    trunk, mechanism, padded = remote_layers(split).trunk, Recording(), batch("right")
    plain = split(**padded.inputs()).logits
    trunk._mechanism = mechanism
    trunk.announce([4, 9])
    loss = split(**padded.inputs()).loss
    trunk.announce([5, 6])
    assert not torch.equal(split(**padded.inputs()).logits, plain)
    loss.backward()
    assert [(way, rows) for way, _, rows in mechanism.seen] == [
        ("forward", (4, 9)),
        ("forward", (5, 6)),
        ("backward", (4, 9)),
    ]
    real_BT = padded.real.numpy()
    assert not real_BT.all()
    assert (mechanism.seen[0][1][~real_BT] == 0).all()
    assert (mechanism.seen[0][1][real_BT] != 0).any(axis=-1).all()


def test_a_second_backward_through_one_graph_is_refused(split: PeftModel) -> None:
    loss = split(**batch().inputs()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(SessionError, match="backward a second time through microbatch 1"):
        loss.backward()


def test_an_optimizer_that_the_trunk_cannot_follow_is_refused_before_it_moves(split: PeftModel) -> None:
    for optimizer, reason in (
        (torch.optim.SGD(trainable(split), lr=0.1), "optimizer is SGD"),
        (torch.optim.AdamW(trainable(split), amsgrad=True), "amsgrad=True"),
    ):
        split(**batch().inputs()).loss.backward()
        before = state(split)
        with pytest.raises(ConfigError, match=reason):
            optimizer.step()
        assert differences(before, state(split)) == []


def test_an_optimizer_that_leaves_the_trunks_half_out_is_refused_before_it_moves(split: PeftModel) -> None:
    named = [parameter for name, parameter in split.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(named, lr=1e-2)
    split(**batch().inputs()).loss.backward()
    before = state(split)
    with pytest.raises(ConfigError, match="not the trunk's, which would never be trained"):
        optimizer.step()
    assert differences(before, state(split)) == []


def test_other_optimizers_in_the_process_are_left_alone(split: PeftModel) -> None:
    other = torch.nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    torch.optim.SGD([other], lr=0.5).step()
    assert other.tolist() == [0.5, 0.5]


def test_an_optimizer_whose_parameters_have_the_ids_of_some_that_are_gone_is_left_alone(split: PeftModel) -> None:
    for module in list(split.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and parameter.dim() == 2:
                setattr(module, name, None)
    del module, parameter
    others = [torch.nn.Parameter(torch.zeros(1)) for _ in range(1000)]
    torch.optim.AdamW(others).step()


def test_gradients_left_over_from_before_a_step_are_refused(split: PeftModel) -> None:
    optimizer = torch.optim.AdamW(trainable(split))
    split(**batch().inputs()).loss.backward()
    optimizer.step()
    loss = split(**batch().inputs()).loss
    with pytest.raises(ConfigError, match="optimizer.zero_grad"):
        loss.backward()


def test_autograd_grad_does_not_spoil_the_next_backward(whole: PeftModel, split: PeftModel) -> None:
    probe = next(iter(adapter_parameters(split).values()))
    torch.autograd.grad(split(**batch(seed=3).inputs()).loss, probe, allow_unused=True)
    expected = whole_gradients(whole, batch("left"))
    assert differences(expected, split_gradients(split, batch("left"))) == []
    loss = split(**batch(seed=4).inputs()).loss
    torch.autograd.grad(split(**batch(seed=3).inputs()).loss, probe, allow_unused=True)
    with pytest.raises(ConfigError, match=r"torch.autograd.grad was called"):
        loss.backward()


def test_a_model_that_is_not_split_is_refused_by_name(whole: PeftModel) -> None:
    with pytest.raises(ModelError, match="is not a split model"):
        clients.trunk_state(whole)


def test_a_model_that_is_let_go_ends_its_session_and_leaves_nothing(llama_dir: Path, trunk: TrunkProcess) -> None:
    connection = TrunkConnection(trunk.address)
    before = connection.describe().open_sessions
    model = clients.load_split_model(llama_dir, trunk.address, CUT.head, CUT.tail, ALL_LINEAR)
    model(**batch().inputs()).loss.backward()
    assert connection.describe().open_sessions == before + 1
    left = [weakref.ref(kept) for kept in (model, remote_layers(model), remote_layers(model).trunk)]
    del model
    gc.collect()
    assert [kept() for kept in left] == [None, None, None]
    deadline = time.monotonic() + 10
    while connection.describe().open_sessions != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert connection.describe().open_sessions == before


def test_close_answers_what_the_trunk_did(llama_dir: Path, trunk: TrunkProcess) -> None:
    model = clients.load_split_model(llama_dir, trunk.address, CUT.head, CUT.tail, ALL_LINEAR)
    model(**batch().inputs()).loss.backward()
    reply = clients.close(model)
    wire_log = remote_layers(model).trunk.wire_log
    assert reply.received_bytes == wire_log.sent_bytes
    with pytest.raises(SessionError, match="session .* is over"):
        model(**batch().inputs())
