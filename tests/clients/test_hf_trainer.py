"""Hugging Face's Trainer, unchanged, on a split model and on the un-split one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import clients
from clients.split_model import adapter_state
from contract.adapter import adapter_parameters, adapter_shapes, initial_adapter, resolve_lora
from tests.clients.conftest import ALL_LINEAR, CUT
from tests.conftest import TrunkProcess
from tests.contract.families import batch
from tests.contract.parity import Tensors, differences, reference

SEED = 3


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    given = batch("left", rows=count, seed=7)
    return [
        {"input_ids": given.input_ids[row], "attention_mask": given.attention_mask[row], "labels": given.labels[row]}
        for row in range(count)
    ]


def train(model: PeftModel, output: Path, **arguments: Any) -> list[float]:
    """The logged losses, of training and of evaluation."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        "optim": "adamw_torch",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": SEED,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(output), **(settings | arguments)),
        train_dataset=rows(12),
        eval_dataset=rows(4),
    )
    trainer.train()
    return [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_grad_norm": 0},
        {"max_grad_norm": 0, "gradient_checkpointing": True},
        {"max_grad_norm": 0, "bf16": True},
        {"max_grad_norm": 0.1},
        {"max_grad_norm": 0.1, "optim": "adamw_torch_fused"},
    ],
    ids=["plain", "checkpointing", "bf16", "clipped", "fused"],
)
def test_trainer_learns_the_same_adapter(
    llama_dir: Path, trunk: TrunkProcess, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    start = initial_adapter(adapter_shapes(llama_dir, resolve_lora(llama_dir, ALL_LINEAR)), SEED)
    whole = reference(llama_dir, ALL_LINEAR, start, "sdpa")
    split = clients.load_split_model(llama_dir, trunk.address, CUT.head, CUT.tail, ALL_LINEAR, seed=SEED)
    expected_losses, got_losses = (train(model, tmp_path / "out", **arguments) for model in (whole, split))
    expected: Tensors = {name: value.detach() for name, value in adapter_parameters(whole).items()}
    got = adapter_state(split)
    clients.close(split)
    assert len(expected_losses) == 6
    assert expected.keys() == got.keys()
    assert max(float((start[name] - got[name]).abs().max()) for name in expected) > 1e-2
    largest = max(float((expected[name] - got[name]).abs().max()) for name in expected)
    if arguments["max_grad_norm"]:
        # The norms over all parameters are summed in another order, and the trunk's AdamW is not the fused one.
        assert got_losses == pytest.approx(expected_losses, rel=1e-5)
        assert largest < 1e-5
    else:
        assert got_losses == expected_losses
        assert largest == 0.0


def test_a_checkpoint_that_trainer_saves_holds_the_clients_half(
    llama_dir: Path, trunk: TrunkProcess, tmp_path: Path
) -> None:
    split = clients.load_split_model(llama_dir, trunk.address, CUT.head, CUT.tail, ALL_LINEAR, seed=SEED)
    train(split, tmp_path / "out", save_strategy="steps", save_steps=4)
    held = {name: value.detach().clone() for name, value in adapter_parameters(split).items()}
    clients.close(split)
    assert differences(held, load_file(tmp_path / "out" / "checkpoint-4" / "adapter_model.safetensors")) == []
