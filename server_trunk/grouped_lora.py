"""LoRA of many sessions in one pass: the frozen layers see all rows at once, each row its own session's A and B.

The idea is that of S-LoRA (Sheng et al. 2023, arXiv 2311.03285) and Punica (Chen et al. 2023, arXiv 2310.18547), here
with gradients: rows are sorted by layout and length, sessions of one layout with equally many rows form a segment, and
a segment's product is one batched matmul over its stacked A and B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from contract.adapter import PREFIX
from server_trunk.session_adapter import Layout, Place, SessionAdapter


@dataclass(frozen=True, slots=True)
class Factors:
    """One target module's A and B within a layout, and what their product is multiplied by."""

    a: Place
    b: Place
    scale: float
    trains_a: bool
    trains_b: bool


def factors(layout: Layout) -> dict[str, Factors]:
    """By the full name of each target module of a layout that batches."""
    found = {}
    for target in layout.spec.target_modules:
        a, b = f"{PREFIX}{target}.lora_A.weight", f"{PREFIX}{target}.lora_B.weight"
        trains = (a in layout.trainable, b in layout.trainable)
        found[target] = Factors(layout.places[a], layout.places[b], layout.spec.scale_of(target), *trains)
    return found


class Segment:
    """G sessions of one layout with equally many rows each, on rows `start` to `stop` of a batch."""

    def __init__(self, adapters: Sequence[SessionAdapter], start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.adapters = tuple(adapters)
        self.targets = factors(adapters[0].layout)
        self.values_GP = torch.stack([adapter.values_P for adapter in adapters])
        self._gradient_GK: Tensor | None = None

    @property
    def gradient_GK(self) -> Tensor:
        """Where one backward pass puts every session's gradient."""
        if self._gradient_GK is None:
            train_values = self.adapters[0].layout.train_values
            self._gradient_GK = self.values_GP.new_zeros(len(self.adapters), train_values)
        return self._gradient_GK

    def rows_of(self, tensor: Tensor, rows: int) -> Tensor:
        """This segment's part of a tensor whose leading sizes hold `rows` rows in all, as [G, N, features]."""
        per_row = tensor.numel() // (rows * tensor.shape[-1])
        flat = tensor.reshape(rows * per_row, tensor.shape[-1])[self.start * per_row : self.stop * per_row]
        return flat.view(len(self.adapters), -1, tensor.shape[-1])


class _Product(torch.autograd.Function):
    """output + scale * (input A^T) B^T for each segment, with the gradients of A and B left in the segments."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, hidden: Tensor, segments: Sequence[tuple[Segment, Factors]], rows: int
    ) -> Tensor:
        device = hidden.device.type
        # PEFT computes LoRA in its own float32, whatever the weights are, and autocast then has its say.
        work = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        adapted = output.clone(memory_format=torch.contiguous_format)
        reduced = []
        with torch.autocast(device, enabled=False):
            for segment, at in segments:
                x_GNI = segment.rows_of(hidden, rows).to(work)
                h_GNR = torch.bmm(x_GNI, at.a.of(segment.values_GP).to(work).transpose(1, 2))
                b_GRO = at.b.of(segment.values_GP).to(work).transpose(1, 2)
                y_GNO = segment.rows_of(adapted, rows)
                if y_GNO.dtype == work:
                    y_GNO.baddbmm_(h_GNR, b_GRO, alpha=at.scale)
                else:
                    y_GNO.add_(torch.bmm(h_GNR, b_GRO), alpha=at.scale)
                reduced.append(h_GNR)
        ctx.save_for_backward(hidden, *reduced)
        ctx.segments, ctx.rows, ctx.work = segments, rows, work
        return adapted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, *reduced = ctx.saved_tensors
        grad = grad.contiguous()
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        for (segment, at), h_GNR in zip(ctx.segments, reduced, strict=True):
            dy_GNO = segment.rows_of(grad, ctx.rows).to(ctx.work)
            dh_GNR = torch.bmm(dy_GNO, at.b.of(segment.values_GP).to(ctx.work)).mul_(at.scale)
            if at.trains_b:
                at.b.of(segment.gradient_GK).add_(torch.bmm(dy_GNO.transpose(1, 2), h_GNR), alpha=at.scale)
            if at.trains_a:
                x_GNI = segment.rows_of(hidden, ctx.rows).to(ctx.work)
                at.a.of(segment.gradient_GK).add_(torch.bmm(dh_GNR.transpose(1, 2), x_GNI))
            dx_GNI = torch.bmm(dh_GNR, at.a.of(segment.values_GP).to(ctx.work))
            segment.rows_of(grad_hidden, ctx.rows).copy_(dx_GNI)
        return grad, grad_hidden, None, None


class GroupedLora:
    """Hooks on the frozen linear layers of one lane, which add the sessions' products within `applied`."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """`modules` by full name, as they are before PEFT wraps them. One thread only."""
        self._modules = modules
        self._hooked: set[str] = set()
        self._segments: Mapping[str, Sequence[tuple[Segment, Factors]]] = {}
        self._rows = 0

    @contextmanager
    def applied(self, segments: Sequence[Segment], rows: int) -> Iterator[None]:
        """Within, each linear layer's output for a batch of `rows` rows has its sessions' products added."""
        by_target: dict[str, list[tuple[Segment, Factors]]] = {}
        for segment in segments:
            for target, at in segment.targets.items():
                by_target.setdefault(target, []).append((segment, at))
        for target in by_target.keys() - self._hooked:
            self._modules[target].register_forward_hook(self._hook(target))
            self._hooked.add(target)
        self._segments, self._rows = by_target, rows
        try:
            yield
        finally:
            self._segments = {}

    def _hook(self, target: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            segments = self._segments.get(target)
            if segments is None:
                return None
            adapted: Tensor = _Product.apply(output, args[0], segments, self._rows)  # type: ignore[no-untyped-call]
            return adapted

        return add
