"""The split model against the un-split PEFT model: loss, logits and every LoRA gradient, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from contract.adapter import adapter_parameters
from contract.architecture import decoder_layers
from contract.records import CutLayers
from tests.contract.families import FAMILIES, TOKENS, WINDOW, Batch, attention, batch, random_model, save_model
from tests.contract.parity import InProcess, Tensors, differences, reference, run, split, trained_adapter

Checkpoints = Callable[[str], Path]
ALL_LINEAR = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
WINDOWED = ("mistral", "qwen2", "gemma2", "gemma3-text", "phi3", "mixtral", "starcoder2")
NO_HEAD = ("gpt2", "llama", "gemma3-text", "bloom", "opt")
CASES = [(family, cut) for family in FAMILIES for cut in ((1, 1), (2, 0), (0, 1)) if cut != (0, 1) or family in NO_HEAD]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("families")

    def checkpoint(family: str) -> Path:
        directory = root / family
        return directory if directory.exists() else save_model(family, directory)

    return checkpoint


@lru_cache(maxsize=1)
def whole_results(directory: Path, family: str) -> tuple[Tensors, dict[str, Tensors]]:
    """(adapter, what the un-split model gives by padding)."""
    adapter = trained_adapter(directory, ALL_LINEAR)
    whole = reference(directory, ALL_LINEAR, adapter, attention(family))
    return adapter, {
        padding: run(whole, adapter_parameters(whole), batch(padding)) for padding in ("none", "left", "right")
    }


@pytest.mark.parametrize(("family", "cut"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_split_equals_unsplit_bitwise(checkpoints: Checkpoints, family: str, cut: tuple[int, int]) -> None:
    directory = checkpoints(family)
    adapter, expected = whole_results(directory, family)
    parts = split(directory, ALL_LINEAR, adapter, CutLayers(*cut), attention(family))
    for padding, values in expected.items():
        assert differences(values, run(parts.client, parts.parameters(), batch(padding))) == [], f"{padding} padding"
        assert all(bool(value.abs().sum() > 0) for value in values.values())


METHODS = {
    "rslora": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True),
    "dora": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        rank_pattern={r"\.0\..*": 2, r"\.2\..*": 6},
        alpha_pattern={r"\.2\..*": 3, r"\.3\..*": 5},
    ),
    "some-layers": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2]),
    "regex": LoraConfig(r=4, target_modules=r".*\.[12]\..*(q|down)_proj"),
    "trunk-only": LoraConfig(r=4, target_modules=r".*\.2\..*q_proj"),
    "client-only": LoraConfig(r=4, target_modules=r".*\.(0|3)\..*q_proj|lm_head"),
}
METHOD_CASES = [
    *((family, method) for family in ("llama", "gpt2", "gemma3-text", "bloom", "opt") for method in ("rslora", "dora")),
    *((family, "patterns") for family in ("llama", "gpt2", "gemma3-text", "mixtral", "qwen3_moe")),
    *((family, "rslora") for family in ("mixtral", "qwen3_moe")),
    *(("llama", method) for method in ("some-layers", "regex", "trunk-only", "client-only")),
]


@pytest.mark.parametrize(("family", "method"), METHOD_CASES)
def test_every_lora_method_equals_unsplit_bitwise(checkpoints: Checkpoints, family: str, method: str) -> None:
    directory, lora = checkpoints(family), METHODS[method]
    adapter = trained_adapter(directory, lora)
    whole = reference(directory, lora, adapter, attention(family))
    parts = split(directory, lora, adapter, CutLayers(1, 1), attention(family))
    expected = run(whole, adapter_parameters(whole), batch("left"))
    assert differences(expected, run(parts.client, parts.parameters(), batch("left"))) == []


def test_target_parameters_of_fused_experts_equal_unsplit_bitwise(checkpoints: Checkpoints) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    directory = checkpoints("qwen3_moe")
    adapter = trained_adapter(directory, lora)
    assert any("experts" in name for name in adapter)
    whole = reference(directory, lora, adapter, "sdpa")
    parts = split(directory, lora, adapter, CutLayers(2, 0), "sdpa")
    expected = run(whole, adapter_parameters(whole), batch("right"))
    assert differences(expected, run(parts.client, parts.parameters(), batch("right"))) == []


@pytest.mark.parametrize("family", ["llama", "gemma3-text"])
def test_bfloat16_equals_unsplit_bitwise(checkpoints: Checkpoints, family: str) -> None:
    directory = checkpoints(family)
    adapter = trained_adapter(directory, ALL_LINEAR)
    whole = reference(directory, ALL_LINEAR, adapter, "sdpa", dtype="bfloat16")
    parts = split(directory, ALL_LINEAR, adapter, CutLayers(1, 1), "sdpa", dtype="bfloat16")
    expected = run(whole, adapter_parameters(whole), batch("left"))
    assert differences(expected, run(parts.client, parts.parameters(), batch("left"))) == []


def test_packed_positions_equal_unsplit_bitwise(checkpoints: Checkpoints) -> None:
    directory = checkpoints("llama")
    adapter = trained_adapter(directory, ALL_LINEAR)
    whole = reference(directory, ALL_LINEAR, adapter, "sdpa")
    parts = split(directory, ALL_LINEAR, adapter, CutLayers(1, 1), "sdpa")
    given, half = batch(), TOKENS // 2
    positions = torch.arange(half).repeat(2).expand(2, TOKENS)
    packed = run(whole, adapter_parameters(whole), given, position_ids=positions)
    assert differences(packed, run(parts.client, parts.parameters(), given, position_ids=positions)) == []
    plain = run(whole, adapter_parameters(whole), given)
    assert "loss" in differences(packed, plain)


def test_gradient_checkpointing_changes_no_bit(checkpoints: Checkpoints) -> None:
    directory = checkpoints("llama")
    adapter = trained_adapter(directory, ALL_LINEAR)
    whole = reference(directory, ALL_LINEAR, adapter, "sdpa")
    parts = split(directory, ALL_LINEAR, adapter, CutLayers(1, 1), "sdpa")
    for model in (parts.client, parts.trunk):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = run(whole, adapter_parameters(whole), batch("left"))
    assert differences(expected, run(parts.client, parts.parameters(), batch("left"))) == []


def test_layerdrop_never_skips_the_remote_layers(checkpoints: Checkpoints) -> None:
    directory = checkpoints("opt")
    adapter = trained_adapter(directory, ALL_LINEAR)
    parts = split(directory, ALL_LINEAR, adapter, CutLayers(1, 1), "sdpa")
    settled = run(parts.client, parts.parameters(), batch())
    parts.client.train()
    parts.trunk.train()
    for _ in range(4):
        assert differences(settled, run(parts.client, parts.parameters(), batch())) == []


def test_generation_equals_unsplit(checkpoints: Checkpoints) -> None:
    directory = checkpoints("qwen3")
    adapter = trained_adapter(directory, ALL_LINEAR)
    whole = reference(directory, ALL_LINEAR, adapter, "sdpa")
    parts = split(directory, ALL_LINEAR, adapter, CutLayers(1, 1), "sdpa")
    given = batch("left")
    inputs = {"input_ids": given.input_ids, "attention_mask": given.attention_mask}
    asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = whole.generate(**inputs, **asked, use_cache=False)
    assert torch.equal(parts.client.generate(**inputs, **asked), expected)


# ---- the checks above can fail -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lost_mask_or_swapped_layers_would_show(checkpoints: Checkpoints, family: str) -> None:
    directory = checkpoints(family)
    adapter = trained_adapter(directory, ALL_LINEAR)
    parts = split(directory, ALL_LINEAR, adapter, CutLayers(1, 1), attention(family))
    given = batch("left")
    right = _logits(parts.client, given)

    def without_mask(hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        return parts.part(hidden, None, positions)

    stub = decoder_layers(parts.client)[2][1]
    stub.remote = InProcess(without_mask)
    assert not torch.equal(right, _logits(parts.client, given))
    stub.remote = InProcess(parts.part)
    assert torch.equal(right, _logits(parts.client, given))
    _exchange_weights(*decoder_layers(parts.trunk)[2][1:3])
    assert not torch.equal(right, _logits(parts.client, given))


@pytest.mark.parametrize("family", WINDOWED)
def test_a_lost_sliding_window_would_show(family: str) -> None:
    given = batch("none")
    windowed = random_model(family)
    assert windowed.config.sliding_window == WINDOW < TOKENS
    open_model = random_model(family, sliding_window=TOKENS * 2)
    with torch.no_grad():
        assert not torch.equal(windowed(**given.inputs()).logits, open_model(**given.inputs()).logits)


def test_another_attention_implementation_would_show(checkpoints: Checkpoints) -> None:
    directory = checkpoints("llama")
    adapter = trained_adapter(directory, ALL_LINEAR)
    whole = reference(directory, ALL_LINEAR, adapter, "eager")
    parts = split(directory, ALL_LINEAR, adapter, CutLayers(1, 1), "sdpa")
    expected = run(whole, adapter_parameters(whole), batch("left"))
    assert differences(expected, run(parts.client, parts.parameters(), batch("left"))) != []


def _logits(model: torch.nn.Module, given: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**given.inputs()).logits[given.real]


def _exchange_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    """Swap what two layers share; in a mixed model that is the attention and the norms."""
    ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    with torch.no_grad():
        for name in ours.keys() & theirs.keys():
            kept = ours[name].clone()
            ours[name].copy_(theirs[name])
            theirs[name].copy_(kept)
