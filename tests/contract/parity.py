"""One un-split PEFT model and the same model in two parts, and what bitwise equality between them means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM

from contract.adapter import (
    adapter_parameters,
    adapter_shapes,
    add_lora,
    initial_adapter,
    is_factor,
    load_adapter_,
    resolve_lora,
    split_adapter,
)
from contract.architecture import probe
from contract.partition import TrunkPart, attach_remote, load_part
from contract.records import CutLayers
from tests.contract.families import Batch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Split:
    """A client part that calls a trunk part of the same process."""

    client: PeftModel
    trunk: PeftModel
    part: TrunkPart

    def parameters(self) -> dict[str, nn.Parameter]:
        return {**adapter_parameters(self.client), **adapter_parameters(self.trunk)}


def trained_adapter(model_dir: Path, lora: LoraConfig, seed: int = 5) -> Tensors:
    """An adapter in which B is not zero, so that every factor has a gradient."""
    tensors = initial_adapter(adapter_shapes(model_dir, resolve_lora(model_dir, lora)), seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.05 if is_factor(name, "B") else tensor
        for name, tensor in tensors.items()
    }


def reference(model_dir: Path, lora: LoraConfig, adapter: Tensors, attention: str, dtype: str = "float32") -> PeftModel:
    """The un-split model, wrapped and filled by stock PEFT alone, without a cache, as the HF Trainer trains it."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    wrapped = get_peft_model(model, LoraConfig(**{**lora.to_dict(), "task_type": "CAUSAL_LM"}))
    result = set_peft_model_state_dict(wrapped, dict(adapter))
    assert not result.unexpected_keys
    return wrapped.eval()


def split(
    model_dir: Path, lora: LoraConfig, adapter: Tensors, cut: CutLayers, attention: str, dtype: str = "float32"
) -> Split:
    spec = resolve_lora(model_dir, lora)
    client, trunk = (
        add_lora(load_part(model_dir, cut, side, dtype=dtype, attn_implementation=attention), spec).eval()
        for side in ("client", "trunk")
    )
    halves = split_adapter(adapter, probe(model_dir), cut)
    load_adapter_(client, halves[0])
    load_adapter_(trunk, halves[1])
    part = TrunkPart(trunk, cut)
    attach_remote(client, InProcess(part))
    return Split(client, trunk, part)


class InProcess(nn.Module):
    """Calls a trunk part without making it a child of the client."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self._part = (part,)

    def forward(self, *inputs: Any) -> torch.Tensor:
        return self._part[0](*inputs)


def run(model: nn.Module, parameters: dict[str, nn.Parameter], batch: Batch, **more: Any) -> Tensors:
    """Loss, logits where there is a token, and every adapter gradient of one backward pass."""
    for parameter in parameters.values():
        parameter.grad = None
    output = model(**batch.inputs(), **more)
    output.loss.backward()
    found = {"loss": output.loss.detach(), "logits": output.logits.detach()[batch.real]}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[f"grad {name}"] = parameter.grad.clone()
    return found


def differences(expected: Tensors, got: Tensors) -> list[str]:
    """Names of what is not bitwise equal, or is on one side only."""
    both = expected.keys() & got.keys()
    unequal = {name for name in both if not torch.equal(expected[name], got[name])}
    return sorted(unequal | (expected.keys() ^ got.keys()))


EXPERTS = ("mixtral", "qwen3_moe")
"""Families whose layers sort the tokens of all rows by expert: how padding is sorted shows in the others' last bits."""


def unsent_padding_differences(family: str, padding: str, expected: Tensors, got: Tensors) -> list[str]:
    """As `differences`; where padding is not sent and its values reach the arithmetic of experts, beyond rounding."""
    unequal = differences(expected, got)
    if family not in EXPERTS or padding != "right" or expected.keys() != got.keys():
        return unequal
    return [name for name in unequal if not torch.allclose(expected[name], got[name], rtol=1e-5, atol=1e-7)]
