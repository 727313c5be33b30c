"""A trunk that serves 8-bit weights gives clients the result of the un-split model that torchao quantised there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import clients
from clients.split_model import trunk_state
from contract.adapter import adapter_parameters
from contract.errors import AgreementError
from contract.records import RoundKey
from tests.clients.conftest import ALL_LINEAR, CUT, opened
from tests.conftest import TrunkProcess
from tests.contract.families import batch, save_model
from tests.contract.parity import Tensors, reference, run, trained_adapter

TOLD = "the trunk computes with int8 weights"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("int8") / "llama")


@pytest.fixture(scope="module")
def int8_trunk(trunk_process: Callable[..., TrunkProcess], checkpoint: Path) -> TrunkProcess:
    """Tries out at its start what it gains from, as it does for users."""
    return trunk_process(checkpoint, CUT.head, CUT.tail, weights="int8")


def unsplit(checkpoint: Path, tensors: Tensors, *, int8: bool) -> PeftModel:
    """The un-split model; with `int8` the linear layers that the trunk holds are quantised by torchao alone."""
    model = reference(checkpoint, ALL_LINEAR, tensors, "sdpa")
    kept = CUT.kept(model.config.num_hidden_layers, "trunk")

    def is_in_trunk(module: nn.Module, name: str) -> bool:
        linear = isinstance(module, nn.Linear) and "lora_" not in name
        return linear and any(f"layers.{index}." in name for index in kept)

    if int8:
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_in_trunk)
    return model


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_loss_logits_and_gradients_are_those_of_the_quantised_model(
    checkpoint: Path, int8_trunk: TrunkProcess, padding: str
) -> None:
    tensors = trained_adapter(checkpoint, ALL_LINEAR)
    models = {int8: unsplit(checkpoint, tensors, int8=int8) for int8 in (True, False)}
    expected, plain = (run(models[int8], adapter_parameters(models[int8]), batch(padding)) for int8 in (True, False))
    with opened(checkpoint, int8_trunk.address, CUT, tensors, key=RoundKey(padding, 1, 1)) as model:
        got = run(model, adapter_parameters(model), batch(padding))
        got |= {f"grad {name}": grad for name, grad in trunk_state(model, gradients=True).items()}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (value - got[name]).abs().max() <= 1e-5 * value.abs().max(), name
    # What 8 bits change is far more than rounding, and small all the same.
    assert 1e-6 < abs(float(expected["loss"] / plain["loss"]) - 1) < 0.01


def test_dora_is_refused(checkpoint: Path, int8_trunk: TrunkProcess) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(AgreementError, match="weights are int8, .* use_dora is True"):
        clients.load_split_model(checkpoint, int8_trunk.address, CUT.head, CUT.tail, lora)


def test_clients_are_told(
    checkpoint: Path,
    int8_trunk: TrunkProcess,
    trunk_process: Callable[..., TrunkProcess],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors = trained_adapter(checkpoint, ALL_LINEAR)
    plain = trunk_process(checkpoint, CUT.head, CUT.tail, batch_tokens=512)
    for trunk, told in ((int8_trunk, True), (plain, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING), opened(checkpoint, trunk.address, CUT, tensors):
            assert (TOLD in caplog.text) == told
