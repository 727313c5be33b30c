"""What a batch takes along over the cut beside its hidden states, and how that is asked of the trunk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from contract import codec
from contract.errors import FrameError
from contract.trunk_pb2 import Forward


@dataclass(frozen=True, slots=True)
class Crossing:
    """What goes with hidden_BTD over the cut: the caller's own mask and positions, and how the layers run."""

    attention_mask_BT: Tensor | None
    position_ids: Tensor | None
    autocast_dtype: torch.dtype | None
    training: bool


def without_padding(hidden_BTD: npt.NDArray[np.float32], mask_BT: Tensor | None) -> npt.NDArray[np.float32]:
    """Zeros where the mask says that nothing stands: a row's norm should be that of its text."""
    return hidden_BTD if mask_BT is None else hidden_BTD * mask_BT.to("cpu", torch.float32).numpy()[:, :, None]


def forward_request(hidden_BTD: Tensor, crossing: Crossing, need_grad: bool) -> Forward:
    """Everything of a Forward but the tensor and its number. Raises FrameError for a mask that is not 0/1 [B, T]."""
    request = Forward(training=crossing.training, need_grad=need_grad)
    mask_BT, position_ids = crossing.attention_mask_BT, crossing.position_ids
    if mask_BT is not None:
        if mask_BT.shape != hidden_BTD.shape[:2]:
            raise FrameError(
                f"attention_mask has shape {list(mask_BT.shape)}; the hidden states are {list(hidden_BTD.shape)}"
            )
        request.has_attention_mask = True
        request.attention_mask_bits = codec.pack_mask(mask_BT)
    if position_ids is not None:
        request.position_ids.extend(codec.pack_positions(position_ids))
    if crossing.autocast_dtype is not None:
        request.autocast_dtype = codec.dtype_name(crossing.autocast_dtype)
    return request
