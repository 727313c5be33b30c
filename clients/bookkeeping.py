"""Rows' gradients from what a backward pass has anyway: each layer's input and the gradient at its output.

Book-keeping after Bu, Wang, Zha and Karypis, "Differentially Private Optimization on Large Foundation Models" (ICML
2023): no second backward pass, and autograd computes no gradient of a weight. Of their two ways to a layer's norm,
which they choose between by size, the one that makes the rows' gradients is taken throughout. It is the cheaper one for
LoRA, whose layers are thin, and the norm is that of the very numbers that are summed: a norm from products of
activations loses to cancellation what a bound must not lose.

What is kept belongs to one forward and is reached through its microbatch alone, so that several may wait for their
backward, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clients.row_gradients import Batch, RowGradients, row_losses, trained_anchors
from contract.errors import ConfigError


class _Use(NamedTuple):
    """One call of a layer: what went in, and what came out, in the graph."""

    input: Tensor
    output: Tensor


class BookKeeping:
    """Notes the trained layers' uses in each forward (see clients.row_gradients.ExampleGradients)."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
        self._model = model
        self._layers = layers
        self._anchors = trained_anchors(model)
        self._uses: dict[str, _Use] | None = None
        self._hooks = [layer.register_forward_hook(partial(self._note, name)) for name, layer in layers.items()]

    def forward(self, batch: Batch) -> KeptMicrobatch:
        uses: dict[str, _Use] = {}
        self._uses = uses
        try:
            losses_B = row_losses(self._model, batch)
        finally:
            self._uses = None
        return KeptMicrobatch(losses_B, self._layers, uses, self._anchors)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._uses is None:
            return
        if name in self._uses:
            raise ConfigError(f"the layer of {name} takes part twice in one pass; such rows' gradients are not proved")
        if not output.requires_grad:
            raise ConfigError(f"the layer of {name} ran without a graph; DP-SGD cannot use gradient checkpointing")
        self._uses[name] = _Use(args[0].detach(), output)


class KeptMicrobatch(RowGradients):
    """A forward and its own layers' uses."""

    def __init__(
        self,
        losses_B: Tensor,
        layers: Mapping[str, nn.Linear],
        uses: Mapping[str, _Use],
        anchors: list[nn.Parameter],
    ) -> None:
        super().__init__(losses_B)
        self._layers = layers
        self._uses = uses
        self._anchors = anchors

    def rows(self) -> npt.NDArray[np.float32]:
        batch = len(self.losses_B)
        wanted = [*(use.output for use in self._uses.values()), *self._anchors]
        if wanted:  # a model may leave layers out by chance
            torch.autograd.backward([self._graph_B.sum()], inputs=wanted)
        sizes = [layer.weight.numel() for layer in self._layers.values()]
        found = np.zeros((batch, sum(sizes)), dtype=np.float32)
        start = 0
        for name, size in zip(self._layers, sizes, strict=True):
            use = self._uses.get(name)
            if use is not None and use.output.grad is not None:
                row_gradients = _by_row(use.output.grad, batch, name).mT @ _by_row(use.input, batch, name)
                found[:, start : start + size] = row_gradients.reshape(batch, -1).float().cpu().numpy()
                use.output.grad = None
            start += size
        return found


def _by_row(values: Tensor, batch: int, name: str) -> Tensor:
    """[B, T, D] of [B, ..., D], or of [B T, D] as some models flatten it, row after row."""
    if values.shape[0] % batch:
        # No figure: an orchestrator is told this text, and how many rows a step drew is the site's secret.
        raise ConfigError(f"the layer of {name} did not see as much of each row: its rows cannot be told apart")
    return values.reshape(batch, -1, values.shape[-1])
