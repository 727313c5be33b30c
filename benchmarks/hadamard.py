"""A randomised Hadamard rotation before int8: the road not taken, as `contract.quantize`'s yardstick.

Each token [D] is multiplied by fixed random signs and by a normalised Hadamard matrix of the largest power of two that
divides D, block by block, so that one large channel is spread over its block; then it is quantised by one scale.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_LEVELS = 127


def pack(values_ND: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [N, D] -> (float32 scales [N, 1], int8 [N, D])."""
    rotated_ND = _blocks(values_ND * _signs_D(values_ND.shape[1]))
    scale_N1 = rotated_ND.abs().amax(1, keepdim=True) / _LEVELS
    return scale_N1, (rotated_ND / scale_N1).round_().to(torch.int8)


def unpack(scale_N1: Tensor, levels_ND: Tensor) -> Tensor:
    return _blocks(levels_ND.to(torch.float32).mul_(scale_N1)).mul_(_signs_D(levels_ND.shape[1]))


def _blocks(values_ND: Tensor) -> Tensor:
    width = values_ND.shape[1] & -values_ND.shape[1]
    return (values_ND.reshape(-1, width) @ _matrix(width)).view_as(values_ND)


@functools.cache
def _matrix(width: int) -> Tensor:
    """[width, width], its own inverse."""
    if width == 1:
        return torch.ones(1, 1)
    half = _matrix(width // 2) / math.sqrt(2)
    return torch.cat((torch.cat((half, half), 1), torch.cat((half, -half), 1)))


@functools.cache
def _signs_D(hidden_size: int) -> Tensor:
    drawn = torch.randint(2, (hidden_size,), generator=torch.Generator().manual_seed(0))
    return (2 * drawn - 1).to(torch.float32)
