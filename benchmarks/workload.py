"""The fixed workload that both sides of a training benchmark share: 33 M parameters, 10 layers, 4 x 128 tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Workload:
    layers: int = 10
    hidden_size: int = 512
    ffn_size: int = 1376
    heads: int = 8
    vocab_size: int = 2048
    batch_size: int = 4
    tokens: int = 128
    lora_rank: int = 8
    learning_rate: float = 1e-3
    max_grad_norm: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"Llama-class, {self.layers} layers, hidden {self.hidden_size}, ffn {self.ffn_size}, vocabulary "
            f"{self.vocab_size}, float32, LoRA r={self.lora_rank} on all linear layers, "
            f"batch {self.batch_size} x {self.tokens}, AdamW, clipping at {self.max_grad_norm:g}, seed {self.seed}"
        )

    def write_model(self, directory: Path) -> None:
        """Write a randomly initialised checkpoint; speed does not depend on what the weights are."""
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.ffn_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(directory)

    def lora(self) -> LoraConfig:
        return LoraConfig(
            r=self.lora_rank, lora_alpha=2 * self.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )

    def batch_BT(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(self.vocab_size, (self.batch_size, self.tokens), generator=generator)


def train(model: PreTrainedModel, workload: Workload, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Take `steps` optimiser steps and return the last loss."""
    tokens_BT = workload.batch_BT()
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = torch.zeros(())
    for _ in range(steps):
        loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, workload.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())
