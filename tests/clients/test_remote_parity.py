"""Seven families with the trunk in another process: loss, logits and every LoRA gradient, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig

from clients.split_model import trunk_state
from contract.adapter import adapter_parameters
from contract.checkpoint import write_parts
from contract.records import CutLayers
from tests.clients.conftest import ALL_LINEAR, opened
from tests.contract.families import Batch, attention, batch, save_model
from tests.contract.parity import (
    Tensors,
    differences,
    reference,
    run,
    trained_adapter,
    unsent_padding_differences,
)

FAMILIES = ("llama", "gpt2", "gemma3-text", "bloom", "opt", "mixtral", "qwen3_moe", "starcoder2")
CUTS = {"1-1": CutLayers(1, 1), "2-0": CutLayers(2, 0), "0-1": CutLayers(0, 1)}
OTHER_CUTS = ("llama", "bloom")
CELLS = [(family, "1-1") for family in FAMILIES] + [(family, cut) for family in OTHER_CUTS for cut in ("2-0", "0-1")]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save_model(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def addresses(checkpoints: dict[str, Path], trunk_host: Callable[..., dict[str, str]]) -> dict[str, str]:
    """A trunk for each cell, from the whole checkpoint where the client has its part, and the other way round."""
    trunks: dict[str, dict[str, object]] = {}
    for family, cut in CELLS:
        model = part_or_whole(checkpoints[family], CUTS[cut], "trunk", part=cut != "1-1" or family == "mixtral")
        settings = {"model": str(model), "attn_implementation": attention(family)}
        trunks[f"{family} {cut}"] = {**settings, "head": CUTS[cut].head, "tail": CUTS[cut].tail}
    return trunk_host(trunks)


def part_or_whole(checkpoint: Path, cut: CutLayers, side: str, *, part: bool) -> Path:
    if not part:
        return checkpoint
    out = checkpoint.parent / f"{checkpoint.name} parts {cut.head}-{cut.tail}"
    if not out.exists():
        write_parts(checkpoint, out, cut)
    return out / side


def split_run(model: object, given: Batch) -> Tensors:
    found = run(model, adapter_parameters(model), given)
    return found | {f"grad {name}": grad for name, grad in trunk_state(model, gradients=True).items()}


@pytest.mark.parametrize(("family", "cut"), CELLS)
def test_the_split_model_equals_the_unsplit_one_bitwise(
    checkpoints: dict[str, Path], addresses: dict[str, str], family: str, cut: str
) -> None:
    whole_dir = checkpoints[family]
    client_dir = part_or_whole(whole_dir, CUTS[cut], "client", part=cut == "1-1" and family != "llama")
    tensors = trained_adapter(whole_dir, ALL_LINEAR)
    whole = reference(whole_dir, ALL_LINEAR, tensors, attention(family))
    address = addresses[f"{family} {cut}"]
    implementation = attention(family)
    with opened(client_dir, address, CUTS[cut], tensors, attn_implementation=implementation) as model:
        for padding in ("none", "left", "right"):
            model.zero_grad()
            expected = run(whole, adapter_parameters(whole), batch(padding))
            got = split_run(model, batch(padding))
            assert unsent_padding_differences(family, padding, expected, got) == [], padding


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules="all-linear",
            rank_pattern={"v_proj": 2, "layers.2.mlp.up_proj": 8},
            alpha_pattern={"o_proj": 3},
            task_type="CAUSAL_LM",
        ),
    ],
    ids=["rslora", "patterns"],
)
def test_other_adapters_are_equal_bitwise_too(
    checkpoints: dict[str, Path], addresses: dict[str, str], lora: LoraConfig
) -> None:
    tensors = trained_adapter(checkpoints["llama"], lora)
    whole = reference(checkpoints["llama"], lora, tensors, attention("llama"))
    with opened(checkpoints["llama"], addresses["llama 1-1"], CUTS["1-1"], tensors, lora) as model:
        expected = run(whole, adapter_parameters(whole), batch("left"))
        assert differences(expected, split_run(model, batch("left"))) == []


def test_the_comparison_would_see_a_trunk_without_the_mask(
    checkpoints: dict[str, Path], addresses: dict[str, str]
) -> None:
    tensors = trained_adapter(checkpoints["llama"], ALL_LINEAR)
    whole = reference(checkpoints["llama"], ALL_LINEAR, tensors, attention("llama"))
    expected = run(whole, adapter_parameters(whole), batch("left"))
    unmasked = Batch(batch("left").input_ids, None, batch("left").labels)
    with opened(checkpoints["llama"], addresses["llama 1-1"], CUTS["1-1"], tensors) as model:
        assert "loss" in differences(expected, split_run(model, unmasked))
