"""Rows' gradients by Opacus (Yousefpour et al. 2021, arXiv 2109.12298), for a microbatch at a time.

Opacus keeps a layer's activations on the layer, so that a second forward before the first's backward would mix the two
microbatches' rows without a word: such a forward is refused.

Ghost clipping (Li et al. 2022, arXiv 2110.05679) has a second backward pass, which the trunk's graph is not there for
any more. It needs none: the trunk treats rows apart, so that a row's loss times c gives c times the gradient at the
head cut that the first pass brought. The second pass runs through tail and head alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from torch import Tensor, nn

from clients.remote_layers import RemoteLayers
from clients.row_gradients import (
    Batch,
    RowGradients,
    Vector,
    row_losses,
    trained_anchors,
    without_bad_rows,
    zero_bad_gradients,
)
from contract.errors import ConfigError

_REDUCTION = "sum"  # of the rows' losses; "mean" would have Opacus multiply each row's gradient by their number


class _OneWaiting:
    """Lets a forward begin when no other waits for its backward."""

    def __init__(self, method: str, layers: Iterable[nn.Linear]) -> None:
        self._method = method
        self._layers = tuple(layers)
        self._waiting = False

    def begin(self) -> None:
        if self._waiting:
            raise ConfigError(
                f"dp-gradients is {self._method}, which can hold one microbatch at a time, and a forward came before "
                "the backward of the last one: use book-keeping, or run one after the other"
            )
        self._waiting = True
        for layer in self._layers:
            layer.train()  # Opacus passes over layers that are not, be the model in training or not

    def end(self) -> None:
        self._waiting = False


class Hooks:
    """Opacus's per-sample gradients (see clients.row_gradients.ExampleGradients)."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
        self._model = model
        self._layers = layers
        self._turn = _OneWaiting("hooks", layers.values())
        with _anchors_aside(model):
            self._opacus = GradSampleHooks(model, loss_reduction=_REDUCTION)

    def forward(self, batch: Batch) -> HookedMicrobatch:
        self._turn.begin()
        return HookedMicrobatch(row_losses(self._model, batch), self._layers, self._turn)

    def close(self) -> None:
        self._opacus.cleanup()


class HookedMicrobatch(RowGradients):
    """The forward that waits."""

    def __init__(self, losses_B: Tensor, layers: Mapping[str, nn.Linear], turn: _OneWaiting) -> None:
        super().__init__(losses_B)
        self._layers = layers
        self._turn = turn

    def rows(self) -> npt.NDArray[np.float32]:
        with _quiet():
            self._graph_B.sum().backward()  # type: ignore[no-untyped-call]
        self._turn.end()
        parts = []
        for name, layer in self._layers.items():
            parameter: Any = layer.weight
            parts.append(self._part(name, parameter))
            parameter.grad = parameter.grad_sample = None
        return np.concatenate(parts, axis=1)

    def _part(self, name: str, parameter: Any) -> npt.NDArray[np.float32]:
        batch, found = len(self.losses_B), parameter.grad_sample
        if found is None:
            return np.zeros((batch, parameter.numel()), dtype=np.float32)
        _require_rows(name, found, batch)
        part: npt.NDArray[np.float32] = found.reshape(batch, -1).float().cpu().numpy()
        return part


class Ghost:
    """Opacus's norms without gradients, and a second backward pass for the clipped sum."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
        self._model = model
        self._layers = layers
        self._turn = _OneWaiting("ghost", layers.values())
        self._cut: _Cut | None = None
        with _anchors_aside(model):
            self._opacus = GradSampleHooksFastGradientClipping(model, loss_reduction=_REDUCTION)
        remotes = [module for module in model.modules() if isinstance(module, RemoteLayers)]
        self._hooks = [remote.register_forward_hook(self._cut_here) for remote in remotes]
        for layer in layers.values():
            self._hooks += [layer.register_forward_pre_hook(_sound_input), layer.register_forward_hook(_sound_gradient)]

    def forward(self, batch: Batch) -> GhostMicrobatch:
        self._turn.begin()
        self._cut = None
        losses_B = row_losses(self._model, batch)
        cut, self._cut = self._cut, None
        return GhostMicrobatch(losses_B, self._layers, self._opacus, self._turn, cut)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._opacus.cleanup()

    def _cut_here(self, remote: nn.Module, args: tuple[Any, ...], output_BTD: Tensor) -> Tensor:
        """Let the tail's graph begin at the trunk's answer, so that it can be gone through alone."""
        if not (torch.is_grad_enabled() and output_BTD.requires_grad):
            return output_BTD
        self._cut = _Cut(args[0], output_BTD)
        return self._cut.tail_input_BTD


class _Cut:
    """Both sides of the trunk in one forward."""

    def __init__(self, head_output_BTD: Tensor, answer_BTD: Tensor) -> None:
        self.head_output_BTD = head_output_BTD
        self.answer_BTD = answer_BTD
        self.tail_input_BTD = answer_BTD.detach().requires_grad_()
        if head_output_BTD.requires_grad:
            head_output_BTD.retain_grad()

    def through_the_trunk(self) -> None:
        """The first pass goes on from the tail, over the wire, to the head."""
        torch.autograd.backward([self.answer_BTD], [self.tail_input_BTD.grad], retain_graph=True)

    def through_the_head(self, factors_B: Tensor) -> None:
        """The second pass in the head, from the first one's gradient times `factors_B`."""
        if self.head_output_BTD.grad is not None:
            torch.autograd.backward([self.head_output_BTD], [factors_B[:, None, None] * self.head_output_BTD.grad])


class GhostMicrobatch:
    """The forward that waits."""

    def __init__(
        self,
        losses_B: Tensor,
        layers: Mapping[str, nn.Linear],
        opacus: Any,
        turn: _OneWaiting,
        cut: _Cut | None,
    ) -> None:
        self._graph_B = losses_B
        self.losses_B = losses_B.detach()
        self.left_out = 0
        self._parameters: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
        self._opacus = opacus
        self._turn = turn
        self._cut = cut

    def clipped_sum(self, clip: float) -> Vector:
        with _quiet():
            factors_B = self._factors(clip)
            self._opacus.disable_hooks()
            (factors_B * self._graph_B).sum().backward()  # type: ignore[no-untyped-call]
            if self._cut is not None:
                self._cut.through_the_head(factors_B)
            self._opacus.enable_hooks()
        self._turn.end()
        total = [
            np.zeros(parameter.numel()) if parameter.grad is None else parameter.grad.double().reshape(-1).cpu().numpy()
            for parameter in self._parameters.values()
        ]
        self._forget()
        return np.concatenate(total)

    def _factors(self, clip: float) -> Tensor:
        """What each row's loss is to be multiplied by, from the norms of the first pass."""
        for parameter in self._parameters.values():
            # A layer that takes no part leaves none; one of the last microbatch's must not stand in for it.
            parameter._norm_sample = torch.zeros_like(self.losses_B)
        self._graph_B.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        if self._cut is not None:
            self._cut.through_the_trunk()
        for name, parameter in self._parameters.items():
            _require_rows(name, parameter._norm_sample, len(self.losses_B))
        self._forget()
        self._opacus.max_grad_norm = clip
        factors_B: Tensor = self._opacus.get_clipping_coef().to(self.losses_B)
        norms_B = self._opacus.get_norm_sample().to(self.losses_B)
        sound_B = torch.isfinite(norms_B) & torch.isfinite(self.losses_B)
        self.left_out = int((~sound_B).sum())
        return torch.where(sound_B, factors_B, torch.zeros_like(factors_B))

    def _forget(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None


def _sound_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A second pass forms all rows' sum at once, in which a NaN times the factor 0 would still be one."""
    return (without_bad_rows(args[0]), *args[1:])


def _sound_gradient(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """See _sound_input. Opacus's hook comes before this one on the way back, and finds what is not finite."""
    zero_bad_gradients(output)


def _require_rows(name: str, found: Tensor, batch: int) -> None:
    if found.shape[0] != batch:
        raise ConfigError(
            f"the layer of {name} sees rows and tokens as one, and Opacus cannot tell them apart: use "
            "dp-gradients=book-keeping"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch warns of full backward hooks on layers whose input needs no gradient, as the first layer's does not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


@contextmanager
def _anchors_aside(model: nn.Module) -> Iterator[None]:
    """Opacus would take the trunk's anchor for a layer of its own."""
    anchors = trained_anchors(model)
    for anchor in anchors:
        anchor.requires_grad_(False)
    try:
        yield
    finally:
        for anchor in anchors:
            anchor.requires_grad_(True)
