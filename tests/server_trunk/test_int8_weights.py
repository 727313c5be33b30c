"""The frozen weights in 8 bits: torchao's own product and gradient, in less memory, for all lanes at once."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM

from contract.errors import ConfigError, UnsupportedModelError
from server_trunk.engine import Engine
from server_trunk.int8_weights import Int8Linear, quantize_weights_
from server_trunk.server import ServeOptions, TrunkServer
from tests.contract.families import attention, save_model
from tests.server_trunk.conftest import CUT


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("int8") / "llama")


def test_a_layer_multiplies_and_differentiates_as_torchaos_does() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 96).requires_grad_(False)
    torchaos = copy.deepcopy(layer)
    quantize_(torchaos, Int8WeightOnlyConfig())
    quantize_weights_(holder := nn.Sequential(layer))
    assert isinstance(holder[0], Int8Linear)
    inputs = [torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outputs = [torchaos(inputs[0]), holder(inputs[1])]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    (one, other) = (value.grad for value in inputs)
    assert one is not None
    assert other is not None
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_no_pass_keeps_weights_as_floats() -> None:
    layer = nn.Sequential(nn.Linear(64, 96)).requires_grad_(False)
    quantize_weights_(layer)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(2, 8, 64).requires_grad_())
    assert not kept


def test_weights_take_a_quarter_of_the_memory(model_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model_path).requires_grad_(False)
    linear = {name: module.weight.nbytes for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    quantize_weights_(plain.model.layers)
    for name, module in plain.named_modules():
        if isinstance(module, Int8Linear):
            parts = [getattr(module.weight, part) for part in module.weight.__tensor_flatten__()[0]]
            assert sum(part.nbytes for part in parts) < 0.4 * linear[name]  # tiny rows: scales weigh much


def test_the_engine_quantises_what_it_serves_and_lanes_share_it(model_path: Path) -> None:
    engine = Engine(model_path, CUT, dtype="float32", attn_implementation="sdpa", device="cpu", weights="int8")
    assert " int8, " in engine.summary()
    weights = [
        {name: id(module.weight) for name, module in lane._part.model.named_modules() if isinstance(module, Int8Linear)}
        for lane in engine.lanes
    ]
    assert weights[0]
    assert all(one == weights[0] for one in weights)


def test_several_processes_keep_their_weights_as_they_are(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="weights is 'int8'; a trunk of several processes"):
        TrunkServer(ServeOptions(str(model_path), CUT, "127.0.0.1:0", tmp_path, device="cpu", weights="int8"))


def test_a_model_with_other_weights_than_linear_layers_is_refused(tmp_path: Path) -> None:
    gpt2 = save_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(UnsupportedModelError, match=r"weights is 'int8', but .*c_attn.weight and \d+ more"):
        Engine(gpt2, CUT, dtype="float32", attn_implementation=attention("gpt2"), device="cpu", weights="int8")


def test_without_torchao_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match="which needs torchao: pip install"):
        quantize_weights_(nn.Sequential(nn.Linear(4, 4)))
