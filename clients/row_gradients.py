"""What the ways to rows' gradients share: what one is, a row's loss, and which layers are proved for it.

A row's loss is the mean over its own predicted tokens, so that it depends on no other row. What cannot be proved to be
one row's gradient is refused: LoRA on embeddings and on fused experts, DoRA, layers that take part twice.

A row whose loss or gradient is not finite here is left out of the sum, as if it had been cut to nothing, and stops
nothing: a round that failed for it would tell of that one row what no noise covers. What the trunk answers must be
finite all the same (clients/remote_trunk.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from clients.data import IGNORED
from clients.remote_layers import RemoteLayers
from contract.adapter import adapter_parameters
from contract.errors import ConfigError
from privacy.gaussian import clip_rows

Batch = Mapping[str, Tensor]
Vector = npt.NDArray[np.float64]


class Microbatch(Protocol):
    """A forward that waits for its backward; `clipped_sum` may be called once."""

    left_out: int
    """How many rows `clipped_sum` left out; known once it answered."""

    @property
    def losses_B(self) -> Tensor:
        """Each row's mean loss over its own predicted tokens, without a graph."""

    def clipped_sum(self, clip: float) -> Vector:
        """The sum of the rows' gradients, each cut to an L2 norm of `clip` over all trained parameters together.

        float64, finite, in the order of the sorted names, without the rows whose loss or gradient is not finite.
        """


class ExampleGradients(Protocol):
    """A way to get at rows' gradients, installed in a model until it is closed."""

    def forward(self, batch: Batch) -> Microbatch:
        """Call the model with `batch` (as of clients.data.collate).

        Raises ConfigError where rows' gradients cannot be told apart, or more forwards wait than this way can bear.
        """

    def close(self) -> None:
        """Leave the model as it was."""


class RowGradients(ABC):
    """A microbatch whose rows' gradients are all in memory at once: B x d numbers."""

    def __init__(self, losses_B: Tensor) -> None:
        self._graph_B = losses_B
        self.losses_B = losses_B.detach()
        self.left_out = 0

    @abstractmethod
    def rows(self) -> npt.NDArray[np.float32]:
        """[B, d], the caller's own: each row's gradient over the trained parameters, by their sorted names."""

    def clipped_sum(self, clip: float) -> Vector:
        rows = self.rows()
        sound_B = np.isfinite(rows).all(axis=1) & np.isfinite(self.losses_B.cpu().numpy())
        self.left_out = int(np.count_nonzero(~sound_B))
        rows[~sound_B] = 0.0
        total: Vector = clip_rows(rows, clip).sum(axis=0, dtype=np.float64)
        return total


def row_losses(model: nn.Module, batch: Batch) -> Tensor:
    """losses_B of `model` on `batch`, each the mean over the row's own predicted tokens, as the model's own loss is."""
    output: Any = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits_BTV, targets_BT = output.logits[:, :-1], batch["labels"][:, 1:]
    losses_BT = F.cross_entropy(
        logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets_BT.shape)
    return losses_BT.sum(dim=1) / (targets_BT != IGNORED).sum(dim=1)


def without_bad_rows(values: Tensor) -> Tensor:
    """`values` [B, ...] with zeros for each row that holds a NaN or an infinity; itself where none does."""
    sound_B = torch.isfinite(values.detach()).flatten(1).all(dim=1)
    if sound_B.all():
        return values
    return torch.where(sound_B.view(-1, *[1] * (values.dim() - 1)), values, torch.zeros_like(values))


@contextmanager
def sound_crossing(model: nn.Module) -> Iterator[None]:
    """Within, a row whose activations or gradient at a cut are not finite goes to the trunk as zeros.

    The wire takes no such row: the session, and with it the round, would end there.
    """
    handles = []
    for layers in (module for module in model.modules() if isinstance(module, RemoteLayers)):
        handles.append(layers.register_forward_pre_hook(lambda _, args: (without_bad_rows(args[0]), *args[1:])))
        handles.append(layers.register_forward_hook(lambda _, args, output_BTD: zero_bad_gradients(output_BTD)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def zero_bad_gradients(output: Tensor) -> None:
    """Have the backward go on from `output` [B, ...] with zeros for each row whose gradient is not finite there."""
    if output.requires_grad:
        output.register_hook(without_bad_rows)  # type: ignore[no-untyped-call]


def trained_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layer of each trained LoRA parameter, by the parameter's canonical name, sorted.

    Raises ConfigError where something is trained of which rows' gradients are not proved, or nothing is.
    """
    _refuse_kinds(model)
    trained = {name: parameter for name, parameter in adapter_parameters(model).items() if parameter.requires_grad}
    owners = {id(module.weight): module for module in model.modules() if type(module) is nn.Linear}
    known = {id(parameter) for parameter in (*trained.values(), *trained_anchors(model))}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise ConfigError(f"{name} is trained and no part of the adapter; it would be released without DP-SGD")
    for name, parameter in trained.items():
        if id(parameter) not in owners:
            raise ConfigError(f"{name} is no linear layer's weight; rows' gradients are proved for those alone")
    if not trained:
        raise ConfigError(
            "the client's layers hold nothing that is trained, so that DP-SGD would protect nothing: choose "
            "head-layers, tail-layers and target-modules so that they do"
        )
    return {name: owners[id(parameter)] for name, parameter in trained.items()}


def _refuse_kinds(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or not any(part.requires_grad for part in module.parameters()):
            continue
        if isinstance(module, ParamWrapper):
            kind = "a bare parameter, as fused experts are,"
        elif module.lora_embedding_A:
            kind = "an embedding"
        elif any(module.use_dora.values()):
            kind = "DoRA"
        else:
            continue
        raise ConfigError(f"{name}: LoRA on {kind} cannot be trained by DP-SGD; choose other target-modules")


def trained_anchors(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that stand for the trunk's half where that is trained (see clients.remote_layers)."""
    layers = [module for module in model.modules() if isinstance(module, RemoteLayers)]
    return [each.anchor for each in layers if each.anchor.requires_grad]
