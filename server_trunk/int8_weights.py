"""The frozen linear layers in 8 bits: a quarter of float32's memory, for results that are near the un-split ones.

torchao quantises (one scale for each output, weights only) and multiplies. Its product is a graph that keeps the
weights as floats for the backward, in every pass, so that here the backward makes them from the 8 bits again.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from contract.errors import ConfigError, UnsupportedModelError


def quantize_weights_(model: nn.Module) -> None:
    """The weights of all linear layers as int8, in place.

    Raises ConfigError where torchao is not installed, and UnsupportedModelError for weights outside linear layers, as
    those of GPT-2's convolutions and of fused experts are: they would stay as they are, and take most of the memory.
    """
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    others = [name for name, one in model.named_parameters() if one.dim() > 1 and id(one) not in linear]
    if others:
        raise UnsupportedModelError(
            f"weights is 'int8', but {others[0]} and {len(others) - 1} more are no linear layer's: leave --weights out"
        )
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ConfigError("weights is 'int8', which needs torchao: pip install 'trunkline[quantized]'") from None
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Linear))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.requires_grad_(False)
            module.__class__ = Int8Linear
    # PEFT asks for what merging an adapter into the weights would need, which a trunk never does.
    warnings.filterwarnings("ignore", message=".*without `get_apply_tensor_subclass`")


class Int8Linear(nn.Linear):
    """A linear layer whose weight is torchao's and frozen."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = _Product.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return output


class _Product(torch.autograd.Function):
    """input W^T + bias, differentiable in the input alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # frozen: nobody changes it before the backward
        return nn.functional.linear(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight.dequantize().to(grad.dtype), None, None
