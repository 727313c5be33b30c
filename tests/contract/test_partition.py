"""What a part holds, what is refused and why, and how the two parts are called."""

from __future__ import annotations

import functools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig
from torch import nn
from torch.func import functional_call
from transformers import AutoConfig
from transformers.models.llama import modeling_llama

from contract.adapter import adapter_parameters, add_lora, load_adapter_, parameter_names, resolve_lora
from contract.architecture import decoder_layers, read_config, whole_on_meta
from contract.errors import ConfigError, ModelError, UnsupportedModelError
from contract.partition import TrunkPart, attach_remote, load_part, present_modules, probe
from contract.records import CutLayers
from tests.contract.families import FAMILIES, attention, batch, family_config, random_model, save_model

CUT = CutLayers(1, 1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def own_llama(tmp_path: Path) -> Path:
    """A checkpoint that the test may spoil."""
    return save_model("llama", tmp_path / "model")


def respell(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Rewrite the weights with `changes` over them; None removes."""
    file = directory / "model.safetensors"
    tensors: dict[str, Any] = {**safetensors.torch.load_file(file), **changes}
    safetensors.torch.save_file({name: value for name, value in tensors.items() if value is not None}, file)


# ---- what a part holds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_in_exactly_one_part(tmp_path: Path, family: str) -> None:
    directory = save_model(family, tmp_path)
    whole = dict(random_model(family).named_parameters())
    found: dict[str, torch.Tensor] = {}
    for side in ("client", "trunk"):
        part = load_part(directory, CUT, side, attn_implementation=attention(family))
        names = dict(part.named_parameters())
        assert not found.keys() & names.keys()
        assert all(parameter.device.type == "cpu" and not parameter.requires_grad for parameter in names.values())
        found.update(names)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_layers_keep_their_numbers(llama: Path) -> None:
    trunk = load_part(llama, CUT, "trunk")
    layers = decoder_layers(trunk)[2]
    assert len(layers) == 4
    assert [layers[index].self_attn.layer_idx for index in (1, 2)] == [1, 2]
    assert {name.split(".")[2] for name, _ in trunk.named_parameters()} == {"1", "2"}


def test_a_tied_head_is_the_clients_alone(tmp_path: Path) -> None:
    directory = save_model("qwen3", tmp_path)
    client, trunk = (load_part(directory, CUT, side) for side in ("client", "trunk"))
    assert client.lm_head.weight is client.model.embed_tokens.weight
    assert all(name.startswith("model.layers.") for name, _ in trunk.named_parameters())


def test_a_backbone_checkpoint_without_the_models_prefix_loads(tmp_path: Path) -> None:
    whole = random_model("gpt2")
    whole.transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    for side in ("client", "trunk"):
        part = load_part(tmp_path, CUT, side)
        assert all(torch.equal(value, whole.get_parameter(name)) for name, value in part.named_parameters())


def test_a_sharded_checkpoint_loads(tmp_path: Path) -> None:
    whole = random_model("llama")
    whole.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    part = load_part(tmp_path, CUT, "trunk")
    assert all(torch.equal(value, whole.get_parameter(name)) for name, value in part.named_parameters())


def test_stubs_are_not_among_the_present_modules(tmp_path: Path) -> None:
    directory = save_model("opt", tmp_path)
    trunk = load_part(directory, CUT, "trunk")
    assert "model.decoder.layers.1.fc1" in present_modules(trunk)
    assert not present_modules(trunk) & {"model.decoder.layers.0", "model.decoder.project_in", "lm_head"}


# ---- what is refused -----------------------------------------------------------------------------------------------

GEMMA3N = {
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "layer_types": ["full_attention"] * 4,
    "num_kv_shared_layers": 0,
    "intermediate_size": [48] * 4,
}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("gemma3n_text", {**SMALL, **GEMMA3N}, "given 'per_layer_input'"),
        ("gemma4_text", {**SMALL, "num_kv_shared_layers": 2, "layer_types": ["full_attention"] * 4}, "given '"),
        ("mixtral", {**SMALL, "num_local_experts": 4, "output_router_logits": True}, "output_router_logits"),
        ("t5", {}, "encoder-decoder"),
        ("gemma3", {}, "wraps several models"),
        ("bert", SMALL, "no inputs_embeds"),
        ("vit", {}, "no causal-LM class"),
    ],
)
def test_an_architecture_is_refused_by_name_with_the_reason(
    tmp_path: Path, model_type: str, settings: dict[str, Any], reason: str
) -> None:
    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason) as raised:
        probe(tmp_path)
    assert model_type in str(raised.value)


def test_layers_that_share_keys_and_values_are_refused(tmp_path: Path) -> None:
    config = family_config("llama")
    config.num_kv_shared_layers = 2
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="num_kv_shared_layers = 2"):
        probe(tmp_path)


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    config = family_config("llama").to_dict()
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quantized"):
        probe(tmp_path)


def test_own_code_is_never_run(tmp_path: Path) -> None:
    config = {"model_type": "nobody-knows", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(UnsupportedModelError):
        probe(tmp_path)


def test_layers_that_are_not_a_plain_chain_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family_config("llama", rms_norm_eps=2e-6).save_pretrained(tmp_path)
    plain = modeling_llama.LlamaDecoderLayer.__call__

    def scaled(self: nn.Module, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return plain(self, hidden_states, **kwargs) * 2

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__call__", scaled)
    with pytest.raises(UnsupportedModelError, match="layer 1 is not given layer 0's output as it is"):
        probe(tmp_path)


def test_layers_that_see_something_learned_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family_config("llama", rms_norm_eps=3e-6).save_pretrained(tmp_path)
    plain = modeling_llama.LlamaModel.forward

    @functools.wraps(plain)
    def with_learned_positions(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        rotary = self.rotary_emb
        hook = rotary.register_forward_hook(
            lambda _, __, output: tuple(value * self.embed_tokens.weight.sum() for value in output)
        )
        try:
            return plain(self, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", with_learned_positions)
    with pytest.raises(UnsupportedModelError, match="'position_embeddings', which is made with weights"):
        probe(tmp_path)


@pytest.mark.parametrize("side", ["client", "trunk"])
def test_a_missing_weight_is_an_error_on_the_side_that_needs_it(own_llama: Path, side: Any) -> None:
    names = {"client": "model.layers.3.mlp.up_proj.weight", "trunk": "model.layers.2.mlp.up_proj.weight"}
    respell(own_llama, {names[side]: None})
    with pytest.raises(ModelError, match=f"lacks {names[side]}"):
        load_part(own_llama, CUT, side)
    load_part(own_llama, CUT, "client" if side == "trunk" else "trunk")


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.extra.weight", "extra.weight", "model.layers.7.mlp.up_proj.weight"]
)
def test_an_unexpected_weight_is_an_error(own_llama: Path, name: str) -> None:
    respell(own_llama, {name: torch.zeros(3)})
    with pytest.raises(ModelError, match=name):
        load_part(own_llama, CUT, "trunk")


def test_a_misshapen_weight_is_an_error(own_llama: Path) -> None:
    respell(own_llama, {"model.layers.2.mlp.up_proj.weight": torch.zeros(3, 3)})
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_part(own_llama, CUT, "trunk")


def test_pickled_weights_are_refused(own_llama: Path) -> None:
    (own_llama / "model.safetensors").rename(own_llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights only"):
        load_part(own_llama, CUT, "client")


def test_a_truncated_file_is_an_error(own_llama: Path) -> None:
    file = own_llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated"):
        load_part(own_llama, CUT, "client")


@pytest.mark.parametrize(
    ("cut", "settings", "message"),
    [
        (CutLayers(2, 2), {}, "leave no layer for the trunk"),
        (CutLayers(-1, 2), {}, "head-layers is -1"),
        (CUT, {"dtype": "float64"}, "dtype is 'float64'"),
        (CUT, {"attn_implementation": "flash"}, "attn-implementation is 'flash'"),
    ],
)
def test_an_impossible_setting_is_a_config_error(
    llama: Path, cut: CutLayers, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_part(llama, cut, "client", **settings)


def test_sdpa_is_refused_where_the_architecture_has_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set it to 'eager'"):
        load_part(save_model("bloom", tmp_path), CUT, "client")


@pytest.mark.parametrize("model", ["/no/such/directory", "./nowhere", "nowhere"])
def test_a_model_that_is_nowhere_is_a_model_error(model: str) -> None:
    with pytest.raises(ModelError, match="is not a directory"):
        load_part(model, CUT, "client")


# ---- calling -------------------------------------------------------------------------------------------------------


class Same(nn.Module):
    def forward(self, hidden: torch.Tensor, *_: object) -> torch.Tensor:
        return hidden


@pytest.fixture
def client(llama: Path) -> Any:
    model = load_part(llama, CUT, "client")
    attach_remote(model, Same())
    return model


def test_a_cache_with_content_is_refused(client: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="use_cache=False"):
        client.generate(batch().input_ids, max_new_tokens=2, use_cache=True)


def test_a_made_mask_is_refused(client: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"of shape \(B, T\)"):
        client(input_ids=batch().input_ids, attention_mask=torch.zeros(2, 1, 12, 12))


def test_router_logits_are_refused_in_a_call(client: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="output_router_logits"):
        client.model(input_ids=batch().input_ids, output_router_logits=True)


def test_remote_layers_get_what_the_caller_gave_and_nothing_stale(llama: Path) -> None:
    seen: list[tuple[Any, Any]] = []

    class Notes(Same):
        def forward(self, hidden: torch.Tensor, *inputs: Any) -> torch.Tensor:
            seen.append(inputs)
            return hidden

    model = load_part(llama, CUT, "client")
    stub = attach_remote(model, Notes())
    given, positions = batch("left"), torch.arange(12).unsqueeze(0)
    model(input_ids=given.input_ids, attention_mask=given.attention_mask, position_ids=positions)
    model(input_ids=given.input_ids)
    assert seen[0][0] is given.attention_mask
    assert seen[0][1] is positions
    assert seen[1] == (None, None)
    with pytest.raises(ModelError, match="outside of the model's own forward"):
        stub(torch.zeros(1, 2, 32))


def test_attaching_to_a_model_without_absent_layers_is_an_error(llama: Path) -> None:
    with pytest.raises(ModelError, match="no absent layer"):
        attach_remote(whole_on_meta(read_config(llama)), Same())


def test_a_trunk_of_another_cut_is_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match="not the trunk of"):
        TrunkPart(load_part(llama, CUT, "trunk"), CutLayers(2, 0))


def trunk_of(directory: Path, family: str) -> tuple[TrunkPart, nn.Module]:
    spec = resolve_lora(directory, LoraConfig(r=4, target_modules="all-linear"))
    model = add_lora(load_part(directory, CUT, "trunk", attn_implementation=attention(family)), spec)
    return TrunkPart(model, CUT), model


def test_threads_do_not_see_each_others_hidden_states(llama: Path) -> None:
    part, _ = trunk_of(llama, "llama")
    inputs = [torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    expected = [part(value) for value in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(10):
            if not torch.equal(part(inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert wrong == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_swapped_in_adapters_keep_their_own_graphs(tmp_path: Path, family: str) -> None:
    part, model = trunk_of(save_model(family, tmp_path), family)
    names = {canonical: f"model.{live}" for canonical, live in parameter_names(model).items()}
    shapes = {name: value.shape for name, value in adapter_parameters(model).items()}
    generator = torch.Generator().manual_seed(3)
    first, second = (
        {name: (torch.randn(shape, generator=generator) * 0.1).requires_grad_() for name, shape in shapes.items()}
        for _ in range(2)
    )
    hidden = torch.randn(2, 12, 32, generator=generator)
    mask = batch("left").attention_mask
    outputs = [
        functional_call(part, {names[name]: value for name, value in own.items()}, (hidden, mask))
        for own in (first, second)
    ]
    for output in outputs:  # the first graph's backward comes after the second's forward
        output.square().sum().backward()
    assert all(parameter.grad is None for parameter in adapter_parameters(model).values())
    for own, output in zip((first, second), outputs, strict=True):
        load_adapter_(model, {name: value.detach() for name, value in own.items()})
        live = adapter_parameters(model)
        for parameter in live.values():
            parameter.grad = None
        alone = part(hidden, mask)
        alone.square().sum().backward()
        assert torch.equal(alone, output)
        assert all(torch.equal(live[name].grad, own[name].grad) for name in own)
