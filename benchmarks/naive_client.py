"""The client of a naive trunk: it waits for every answer before it does anything else."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import grpc
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from benchmarks.naive_trunk import CUT, OPTIONS, norm_of, packed, raw, scale_, tensor_of, unpacked
from benchmarks.workload import Workload
from contract import adapter
from contract.architecture import probe
from contract.partition import attach_remote, load_part

TIMEOUT_S = 600.0


class NaiveLayers(nn.Module):
    """The client's end: hidden_BTD at the head cut to hidden_BTD at the tail cut, a blocking call each way."""

    def __init__(self, address: str, seed: int) -> None:
        super().__init__()
        self.norm = 0.0
        """Of the gradient that this client's adapter at the trunk has accumulated."""
        self.name = f"client-{os.getpid()}-{time.monotonic_ns()}"
        self._channel = grpc.insecure_channel(address, options=[*OPTIONS, ("grpc.enable_http_proxy", 0)])
        self._microbatches = 0
        self.call("Open", {"seed": seed})

    def forward(self, hidden_BTD: Tensor, attention_mask_BT: Tensor | None, position_ids: Tensor | None) -> Tensor:
        output_BTD: Tensor = _NaiveCross.apply(hidden_BTD, self)  # type: ignore[no-untyped-call]
        return output_BTD

    def call(self, method: str, asked: dict[str, Any], data: bytes = b"") -> bytes:
        request = packed({"client": self.name, **asked}, data)
        answer: bytes = self._channel.unary_unary(f"/naive.Trunk/{method}", None, None)(request, timeout=TIMEOUT_S)
        return answer

    def next_microbatch(self) -> int:
        self._microbatches += 1
        return self._microbatches

    def step(self, scale: float) -> None:
        self.call("Step", {"scale": scale})

    def close(self) -> None:
        self._channel.close()


class _NaiveCross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, layers: NaiveLayers) -> Tensor:
        ctx.layers = layers
        ctx.asked = {"microbatch": layers.next_microbatch(), "shape": list(hidden_BTD.shape)}
        answer = layers.call("Forward", ctx.asked, raw(hidden_BTD))
        return tensor_of(memoryview(answer), hidden_BTD.shape).to(hidden_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None]:
        told, data = unpacked(ctx.layers.call("Backward", ctx.asked, raw(grad_BTD)))
        ctx.layers.norm = told["norm"]
        return tensor_of(data, grad_BTD.shape).to(grad_BTD), None


def open_naive_model(
    model_dir: str | Path, address: str, workload: Workload, device: str = "cpu"
) -> tuple[PeftModel, NaiveLayers]:
    """The client's part of the model with a naive trunk in its middle; both adapters are drawn from one seed."""
    spec = adapter.resolve_lora(model_dir, workload.lora())
    shapes = adapter.split_adapter(adapter.adapter_shapes(model_dir, spec), probe(model_dir), CUT)[0]
    model = adapter.add_lora(load_part(model_dir, CUT, "client", dtype=workload.dtype, device=device), spec)
    adapter.load_adapter_(model, adapter.initial_adapter(shapes, workload.seed))
    layers = NaiveLayers(address, workload.seed)
    attach_remote(model, layers)
    return model, layers


def accumulate_naively(
    model: nn.Module,
    layers: NaiveLayers,
    workload: Workload,
    optimizer: torch.optim.Optimizer,
    steps: int,
    microbatches: int = 1,
) -> float:
    """As workload.accumulate, one blocking call after another; clips over client and trunk together."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    batches = [workload.batch_BT(number).to(device) for number in range(microbatches)]
    loss = 0.0
    for _ in range(steps):
        loss = 0.0
        for tokens_BT in batches:
            share = model(input_ids=tokens_BT, labels=tokens_BT).loss / microbatches
            share.backward()
            loss += float(share.detach())
        scale = min(1.0, workload.max_grad_norm / (math.hypot(norm_of(parameters), layers.norm) + 1e-6))
        scale_(parameters, scale)
        optimizer.step()
        layers.step(scale)
        optimizer.zero_grad()
    return loss
