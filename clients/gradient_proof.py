"""A way to rows' gradients is tried before it sees a site's rows: on made-up ones, against one backward pass for each.

The client's own layers are run with nothing between head and tail, so that nothing is sent, and with made-up adapter
values, because an adapter that was never trained has gradients of zero. What a wrong reduction of the loss, layers that
mix rows, or a loss that is no mean over a row's own tokens would do to the gradients shows here, before training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from clients.data import IGNORED
from clients.remote_layers import RemoteLayers
from clients.row_gradients import ExampleGradients, Vector
from contract.adapter import adapter_parameters
from contract.architecture import unwrap
from contract.errors import ConfigError

_LENGTHS = (7, 5, 3)
_SPREAD = 0.02
_LARGE = 1e30  # cuts nothing
_TOLERANCE = {torch.float32: 1e-3}
_COARSE_TOLERANCE = 0.1  # in bfloat16 a row alone is rounded otherwise than beside others
_FLOOR = 1e-5


def proved(
    model: nn.Module, layers: Mapping[str, nn.Linear], build: Callable[[], ExampleGradients]
) -> ExampleGradients:
    """What `build` makes, once it agrees with one backward pass a row. Raises ConfigError where it does not."""
    batch = _made_up_rows(model)
    with _on_trial(model):
        expected = [_alone(model, layers, batch, row) for row in range(len(_LENGTHS))]
        norms = [float(np.linalg.norm(row)) for row in expected]
        if not all(0.0 < norm < _LARGE for norm in norms):
            raise ConfigError(f"on made-up rows the client's layers have gradients of norms {norms}; DP-SGD needs some")
        gradients = build()
        try:
            # Where every row is cut, their norms and directions show; where none is, their sizes.
            for clip in (0.5 * min(norms), _LARGE):
                factors = [min(1.0, clip / norm) for norm in norms]
                wanted = np.asarray(sum(row * factor for row, factor in zip(expected, factors, strict=True)))
                _require_close(wanted, gradients.forward(batch).clipped_sum(clip), layers, model)
        except BaseException:
            gradients.close()
            raise
    return gradients


def _made_up_rows(model: nn.Module) -> dict[str, Tensor]:
    vocabulary = unwrap(model).get_input_embeddings().num_embeddings
    shape = (len(_LENGTHS), max(_LENGTHS))
    tokens_BT = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    mask_BT = (torch.arange(shape[1]) < torch.tensor(_LENGTHS)[:, None]).long()
    batch = {
        "input_ids": tokens_BT * mask_BT,
        "attention_mask": mask_BT,
        "labels": torch.where(mask_BT.bool(), tokens_BT, IGNORED),
    }
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


@contextmanager
def _on_trial(model: nn.Module) -> Iterator[None]:
    """Without dropout, trunk or the adapter's own values; all as it was afterwards."""
    training, tensors = model.training, adapter_parameters(model)
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, RemoteLayers):
                stack.enter_context(module.bypassed())
        model.eval()
        try:
            with torch.no_grad():
                for tensor in tensors.values():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * _SPREAD)
            yield
        finally:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(kept[name])
            model.train(training)


def _alone(model: nn.Module, layers: Mapping[str, nn.Linear], batch: Mapping[str, Tensor], row: int) -> Vector:
    """The gradient of the model's own loss on one row, float64 [d]."""
    loss = model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).loss
    weights = [layer.weight for layer in layers.values()]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    parts = [torch.zeros_like(weight) if part is None else part for weight, part in zip(weights, found, strict=True)]
    return np.concatenate([part.double().reshape(-1).cpu().numpy() for part in parts])


def _require_close(wanted: Vector, got: Vector, layers: Mapping[str, nn.Linear], model: nn.Module) -> None:
    tolerance = _TOLERANCE.get(unwrap(model).dtype, _COARSE_TOLERANCE)
    floor, start = _FLOOR * float(np.linalg.norm(wanted)), 0
    for name, layer in layers.items():
        part = slice(start, start := start + layer.weight.numel())
        error, size = float(np.linalg.norm(got[part] - wanted[part])), float(np.linalg.norm(wanted[part]))
        if not error <= tolerance * size + floor:
            raise ConfigError(
                f"{name}: on made-up rows the clipped gradients' sum is off by {error / (size or 1.0):.1e} of its size "
                f"from that of one backward pass a row, where {tolerance:g} is allowed: this model's rows' gradients "
                "cannot be trusted by this dp-gradients"
            )
