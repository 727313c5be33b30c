"""int8 per token, with the channels that stick out kept apart: [N, D] float32 to one run of bytes and back.

A token's values share one scale, so that one large channel would leave no levels for the others, and real models have
such channels. Those that stick out over the whole tensor, at most D / 16 of them, are quantised by a scale of their own
to 16 bits. The bytes, little-endian, K the number of outlier channels:

    scale_N float32 | outlier_scale_N float32 | channel_K uint32 | low_ND int8 | high_NK int8      (K = 0: 1st and 4th)

An outlier's value is (256 high + low) * outlier_scale, any other low * scale. Rounding is half to even.

A randomised Hadamard rotation of each token before quantisation was measured against this (`python -m
benchmarks.codecs`, one thread of a busy machine; relative error of the channels that do not stick out, by how many of
512 are x60 larger):

                      0       1       4      16      encode + decode of (4, 128, 512) and of (2, 512, 768)
    one scale      0.0075  0.138   0.213   0.288
    kept apart     0.0075  0.0075  0.0075  0.0075    0.9 + 0.2 ms, 4.1 + 0.8 ms
    rotation       0.0074  0.0126  0.0252  0.0558    1.9 + 1.6 ms, 4.4 + 3.6 ms
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from contract.errors import FrameError, NonFiniteError

OUTLIER_SHARE = 16
"""At most one channel of this many is kept apart."""
_STICKS_OUT = 6.0  # times the median channel's peak, both over the token's mean magnitude
_LEVELS = 127
_FINE_LEVELS = 127 * 256 + 127  # the largest whose high byte is an int8 too


def size_bytes(positions: int, hidden_size: int, outlier_channels: int) -> int:
    """What `pack` makes of [positions, hidden_size] with that many channels kept apart."""
    apart = positions * (4 + outlier_channels) + 4 * outlier_channels if outlier_channels else 0
    return positions * (4 + hidden_size) + apart if positions else 0


def outlier_limit(hidden_size: int) -> int:
    return hidden_size // OUTLIER_SHARE


def pack(values_ND: Tensor) -> tuple[Tensor, int]:
    """float32 [N, D] -> (uint8 bytes on the CPU, K). Raises NonFiniteError for a NaN or an infinity."""
    channels_K = _outliers(values_ND)
    if not len(channels_K):
        scale_N1 = scales(values_ND, _LEVELS)
        return _bytes(scale_N1, rounded(values_ND, scale_N1).to(torch.int8)), 0
    fine_NK = values_ND[:, channels_K]
    values_ND = values_ND.index_fill(1, channels_K, 0.0)
    scale_N1, fine_scale_N1 = scales(values_ND, _LEVELS), scales(fine_NK, _FINE_LEVELS)
    fine_NK = rounded(fine_NK, fine_scale_N1).to(torch.int32)
    low_ND = rounded(values_ND, scale_N1).to(torch.int8)
    low_NK = ((fine_NK + 128) & 255) - 128
    low_ND[:, channels_K] = low_NK.to(torch.int8)
    high_NK = ((fine_NK - low_NK) >> 8).to(torch.int8)
    data = _bytes(scale_N1, fine_scale_N1, channels_K.to(torch.int32), low_ND, high_NK)
    return data, len(channels_K)


def unpack(data: memoryview, positions: int, hidden_size: int, outlier_channels: int) -> Tensor:
    """What `pack` made of float32 [positions, hidden_size], whose `data` has the size that `size_bytes` says.

    Raises NonFiniteError for a scale that is not finite, FrameError for one below zero and for channels that are not
    in order or not there.
    """
    n, d, k = positions, hidden_size, outlier_channels
    scales = (2 if k else 1) * n
    scale_N1 = _read(data, torch.float32, 0, n).view(n, 1)
    _check_scales(_read(data, torch.float32, 0, scales))
    at = 4 * (scales + k)
    low_ND = _read(data, torch.int8, at, n * d).view(n, d)
    values_ND = low_ND.to(torch.float32).mul_(scale_N1)
    if k:
        channels_K = _read(data, torch.int32, 4 * scales, k).to(torch.int64)
        _check_channels(channels_K, d)
        high_NK = _read(data, torch.int8, at + n * d, n * k).view(n, k).to(torch.int32)
        fine_NK = (high_NK * 256 + low_ND[:, channels_K]).to(torch.float32)
        values_ND[:, channels_K] = fine_NK * _read(data, torch.float32, 4 * n, n).view(n, 1)
    return values_ND


def read_scales(data: memoryview, count: int) -> Tensor:
    """float32 [count, 1] at the start of `data`. Raises NonFiniteError and FrameError as `unpack`."""
    found = _read(data, torch.float32, 0, count)
    _check_scales(found)
    return found.view(count, 1)


def _outliers(values_ND: Tensor) -> Tensor:
    """Ascending numbers of the channels that stick out, at most `outlier_limit` of them: the largest."""
    most = outlier_limit(values_ND.shape[1])
    if not most or not len(values_ND):
        return torch.empty(0, dtype=torch.int64, device=values_ND.device)
    size_ND = values_ND.abs()
    # Tokens differ in magnitude by orders, gradients above all: each counts by its own measure.
    mean_N1 = size_ND.mean(1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    peak_D = size_ND.div_(mean_N1).amax(0)
    peak_K, channel_K = peak_D.topk(most)
    return channel_K[peak_K > _STICKS_OUT * peak_D.median()].sort().values


def scales(values_NC: Tensor, levels: int) -> Tensor:
    """[N, 1] by which each row takes up all of `levels`. Raises NonFiniteError for a NaN or an infinity."""
    scale_N1 = values_NC.abs().amax(1, keepdim=True) / levels
    if not bool(torch.isfinite(scale_N1).all()):
        raise NonFiniteError("a NaN or an infinity cannot be quantised")
    return scale_N1


def rounded(values_NC: Tensor, scale_N1: Tensor) -> Tensor:
    """Half to even. A scale of 0 is that of a row without any value that float32 could tell from 0."""
    return (values_NC / torch.where(scale_N1 > 0, scale_N1, torch.inf)).round_()


def _bytes(*parts: Tensor) -> Tensor:
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]).cpu()


def _read(data: memoryview, dtype: torch.dtype, offset: int, count: int) -> Tensor:
    return torch.frombuffer(data, dtype=dtype, offset=offset, count=count)


def _check_scales(scales: Tensor) -> None:
    if not math.isfinite(float(scales.sum(dtype=torch.float64))):
        raise NonFiniteError("a quantised tensor's scale is a NaN or an infinity")
    if bool((scales < 0).any()):
        raise FrameError("a quantised tensor's scale is negative")


def _check_channels(channels_K: Tensor, hidden_size: int) -> None:
    low, high = int(channels_K[0]), int(channels_K[-1])  # uint32 above 2**31 shows as negative
    if low < 0 or high >= hidden_size or bool((channels_K.diff() <= 0).any()):
        raise FrameError(f"an int8 tensor's outlier channels must ascend, each once, from 0 to {hidden_size - 1}")
