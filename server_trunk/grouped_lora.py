"""LoRA of many sessions in one pass: the frozen layers see all rows at once, each row its own session's A and B.

The idea is that of S-LoRA (Sheng et al. 2023, arXiv 2311.03285) and Punica (Chen et al. 2023, arXiv 2310.18547), here
with gradients: rows are sorted by layout and number, sessions of one layout with equally many rows form a segment, and
a segment's product is one batched matmul over its stacked A and B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Share:
    """What of a linear layer this process computes, where several hold a trunk: some inputs, some outputs, or all.

    The factor whose side is parted is each process's own part; the other one is the same at all of them, and so is its
    gradient, once what stands between the two has been added up.
    """

    inputs: slice | None = None
    outputs: slice | None = None
    sum: Callable[[Tensor], object] | None = None
    """Adds up a tensor over all processes, in place; None where there is only one, or this layer is whole at each."""
    counts_whole: bool = True
    """Whether the gradient of a factor that is the same everywhere is to be this process's, as it is at one of them."""

    @property
    def counts_a(self) -> bool:
        return self.counts_whole or self.inputs is not None

    @property
    def counts_b(self) -> bool:
        return self.counts_whole or self.outputs is not None

    def a(self, a_GRI: Tensor) -> Tensor:
        return a_GRI if self.inputs is None else a_GRI[..., self.inputs]

    def b(self, b_GOR: Tensor) -> Tensor:
        return b_GOR if self.outputs is None else b_GOR[:, self.outputs]

    def sum_inputs(self, reduced_GNR: Tensor) -> Tensor:
        """The product with A, where each process has some of the inputs."""
        if self.sum is not None and self.inputs is not None:
            self.sum(reduced_GNR)
        return reduced_GNR

    def sum_outputs(self, grad_GNR: Tensor) -> Tensor:
        """The gradient in front of B, where each process has some of the outputs."""
        if self.sum is not None and self.outputs is not None:
            self.sum(grad_GNR)
        return grad_GNR


WHOLE = Share()


class Segment:
    """G sessions of one layout with equally many rows each, on rows `start` to `stop` of a batch."""

    def __init__(
        self, targets: Mapping[str, Factors], train_values: int, values_GP: Tensor, start: int, stop: int
    ) -> None:
        """`targets` are the layout's `factors`; `train_values` its K."""
        self.start, self.stop = start, stop
        self.targets = targets
        self.train_values = train_values
        self.values_GP = values_GP
        self._gradient_GK: Tensor | None = None

    @classmethod
    def of(cls, adapters: Sequence[SessionAdapter], start: int, stop: int) -> Segment:
        layout = adapters[0].layout
        values_GP = torch.stack([adapter.values_P for adapter in adapters])
        return cls(factors(layout), layout.train_values, values_GP, start, stop)

    @property
    def gradient_GK(self) -> Tensor:
        """Where one backward pass puts every session's gradient."""
        if self._gradient_GK is None:
            self._gradient_GK = self.values_GP.new_zeros(len(self.values_GP), self.train_values)
        return self._gradient_GK

    def rows_of(self, tensor: Tensor, rows: int) -> Tensor:
        """This segment's part of a tensor whose leading sizes hold `rows` rows in all, as [G, N, features]."""
        per_row = tensor.numel() // (rows * tensor.shape[-1])
        flat = tensor.reshape(rows * per_row, tensor.shape[-1])[self.start * per_row : self.stop * per_row]
        return flat.view(len(self.values_GP), -1, tensor.shape[-1])


class _Product(torch.autograd.Function):
    """output + scale * (input A^T) B^T for each segment, with the gradients of A and B left in the segments."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, hidden: Tensor, segments: Sequence[tuple[Segment, Factors]], rows: int, share: Share
    ) -> Tensor:
        device = hidden.device.type
        # PEFT computes LoRA in its own float32, whatever the weights are, and autocast then has its say.
        work = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        adapted = output.clone(memory_format=torch.contiguous_format)
        reduced = []
        with torch.autocast(device, enabled=False):
            for segment, at in segments:
                x_GNI = segment.rows_of(hidden, rows).to(work)
                a_GRI, b_GOR = share.a(at.a.of(segment.values_GP)), share.b(at.b.of(segment.values_GP))
                h_GNR = share.sum_inputs(torch.bmm(x_GNI, a_GRI.to(work).transpose(1, 2)))
                b_GRO = b_GOR.to(work).transpose(1, 2)
                y_GNO = segment.rows_of(adapted, rows)
                if y_GNO.dtype == work:
                    y_GNO.baddbmm_(h_GNR, b_GRO, alpha=at.scale)
                else:
                    y_GNO.add_(torch.bmm(h_GNR, b_GRO), alpha=at.scale)
                reduced.append(h_GNR)
        ctx.save_for_backward(hidden, *reduced)
        ctx.segments, ctx.rows, ctx.work, ctx.share = segments, rows, work, share
        return adapted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, *reduced = ctx.saved_tensors
        share: Share = ctx.share
        grad = grad.contiguous()
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        for (segment, at), h_GNR in zip(ctx.segments, reduced, strict=True):
            a_GRI, b_GOR = share.a(at.a.of(segment.values_GP)), share.b(at.b.of(segment.values_GP))
            dy_GNO = segment.rows_of(grad, ctx.rows).to(ctx.work)
            dh_GNR = share.sum_outputs(torch.bmm(dy_GNO, b_GOR.to(ctx.work)).mul_(at.scale))
            if at.trains_b and share.counts_b:
                db_GOR = torch.bmm(dy_GNO.transpose(1, 2), h_GNR)
                share.b(at.b.of(segment.gradient_GK)).add_(db_GOR, alpha=at.scale)
            if at.trains_a and share.counts_a:
                x_GNI = segment.rows_of(hidden, ctx.rows).to(ctx.work)
                share.a(at.a.of(segment.gradient_GK)).add_(torch.bmm(dh_GNR.transpose(1, 2), x_GNI))
            dx_GNI = torch.bmm(dh_GNR, a_GRI.to(ctx.work))
            segment.rows_of(grad_hidden, ctx.rows).copy_(dx_GNI)
        return grad, grad_hidden, None, None, None


class GroupedLora:
    """Hooks on the frozen linear layers of one lane, which add the sessions' products within `applied`."""

    def __init__(self, modules: Mapping[str, nn.Module], shares: Mapping[str, Share] | None = None) -> None:
        """`modules` by full name, as they are before PEFT wraps them; those that are not whole here have `shares`.

        One thread only.
        """
        self._modules = modules
        self._shares = shares or {}
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
        share = self._shares.get(target, WHOLE)

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            segments = self._segments.get(target)
            if segments is None:
                return None
            adapted: Tensor = _Product.apply(output, args[0], segments, self._rows, share)  # type: ignore[no-untyped-call]
            return adapted

        return add
