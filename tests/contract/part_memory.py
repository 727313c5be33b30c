"""Run as a process of its own: load a part (or load all, then delete), use it once, print the peak RSS in bytes."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from contract.adapter import add_lora, resolve_lora
from contract.architecture import decoder_layers
from contract.partition import AbsentLayer, TrunkPart, attach_remote, load_part
from contract.records import CutLayers

CUT = CutLayers(2, 2)
TOKENS = 8


class Same(nn.Module):
    def forward(self, hidden: torch.Tensor, *_: object) -> torch.Tensor:
        return hidden


def peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def load_then_delete(directory: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    layers = decoder_layers(model)[2]
    for index in CUT.kept(len(layers), "trunk"):
        layers[index] = AbsentLayer(False, layers[index])
    gc.collect()
    return model.requires_grad_(False)


def use_client(model: PreTrainedModel, directory: str) -> int:
    wrapped = add_lora(model, resolve_lora(directory, LoraConfig(r=4, target_modules="all-linear")))
    attach_remote(wrapped, Same())
    ids = torch.arange(TOKENS).unsqueeze(0)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    return sum(parameter.numel() * 2 for parameter in model.parameters() if not parameter.requires_grad)


def use_trunk(model: PreTrainedModel, directory: str) -> int:
    wrapped = add_lora(model, resolve_lora(directory, LoraConfig(r=4, target_modules="all-linear")))
    hidden = torch.randn(1, TOKENS, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    TrunkPart(wrapped, CUT)(hidden).sum().backward()
    return sum(parameter.numel() * 2 for parameter in model.parameters() if not parameter.requires_grad)


if __name__ == "__main__":
    way, checkpoint = sys.argv[1:3]
    if way == "load-then-delete":
        share = use_client(load_then_delete(checkpoint), checkpoint)
    elif way == "client":
        share = use_client(load_part(checkpoint, CUT, "client", dtype="bfloat16"), checkpoint)
    else:
        share = use_trunk(load_part(checkpoint, CUT, "trunk", dtype="bfloat16"), checkpoint)
    sys.stdout.write(f"{peak_rss_bytes()} {share}\n")
