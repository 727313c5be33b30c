"""The fixed workloads that both sides of a training benchmark share. The plain one: 33 M parameters, 4 x 128 tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig


@dataclass(frozen=True, slots=True)
class Workload:
    """A model's shape, its LoRA, and a batch. `kv_heads` 0 is as many as `heads`."""

    layers: int = 10
    hidden_size: int = 512
    ffn_size: int = 1376
    heads: int = 8
    kv_heads: int = 0
    vocab_size: int = 2048
    dtype: str = "float32"
    batch_size: int = 4
    tokens: int = 128
    lora_rank: int = 8
    learning_rate: float = 1e-3
    max_grad_norm: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"Llama-class, {self.layers} layers, hidden {self.hidden_size}, ffn {self.ffn_size}, vocabulary "
            f"{self.vocab_size}, {self.dtype}, LoRA r={self.lora_rank} on all linear layers, "
            f"batch {self.batch_size} x {self.tokens}, AdamW, clipping at {self.max_grad_norm:g}, seed {self.seed}"
        )

    def write_model(self, directory: Path, device: str = "cpu") -> None:
        """Write a randomly initialised checkpoint, made on `device`; speed does not depend on what the weights are."""
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.ffn_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))
        model.save_pretrained(directory)

    def lora(self) -> LoraConfig:
        return LoraConfig(
            r=self.lora_rank, lora_alpha=2 * self.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )

    def batch_BT(self, microbatch: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + microbatch)
        return torch.randint(self.vocab_size, (self.batch_size, self.tokens), generator=generator)


_LARGE = {"vocab_size": 32000, "heads": 32}
SHAPES: Mapping[str, Workload] = {
    "30m": Workload(),
    "1b": Workload(layers=16, hidden_size=2048, ffn_size=8192, kv_heads=8, dtype="float32", **_LARGE),
    "7b": Workload(layers=32, hidden_size=4096, ffn_size=11008, dtype="bfloat16", **_LARGE),
}
"""By name. The large ones need a GPU: the layers of Llama 3.2 1B and of Llama 2 7B, with 32 000 words."""


def one_by_one(
    model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
) -> list[float]:
    """As anyone would write it."""
    losses = []
    for batch, weight in zip(batches, weights, strict=True):
        loss = model(**batch).loss
        (loss * weight).backward()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


Backward = Callable[[nn.Module, Sequence[Mapping[str, torch.Tensor]], Sequence[float]], list[float]]
"""Adds the gradients of the weighted losses of some batches; answers the losses."""


def accumulate(
    model: nn.Module,
    workload: Workload,
    optimizer: torch.optim.Optimizer,
    steps: int,
    microbatches: int = 1,
    backward: Backward = one_by_one,
) -> float:
    """Take `steps` optimiser steps over `microbatches` batches each; answers the last step's mean loss."""
    device = next(model.parameters()).device
    tokens = [workload.batch_BT(number).to(device) for number in range(microbatches)]
    batches = [{"input_ids": tokens_BT, "labels": tokens_BT} for tokens_BT in tokens]
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = [0.0]
    for _ in range(steps):
        losses = backward(model, batches, [1 / microbatches] * microbatches)
        torch.nn.utils.clip_grad_norm_(parameters, workload.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return sum(losses) / len(losses)
