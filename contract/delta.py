"""int4-delta (after AQ-SGD, arXiv 2206.01299): activations of a sample that was sent before go as a 4-bit difference.

Both ends keep, by place, what the receiver last made of a sample at each cut. A sample goes in full, as int8, the first
time; later as the difference to what is kept, each token by a scale of its own. Both ends keep what the same bytes
decode to, on the CPU, so that they never drift apart; an error that one difference leaves is in the next one. The
bytes, little-endian, of M positions in rows that go as differences and the N - M others:

    scale_M float32 | int8 of the others, as `contract.quantize` lays them out | ceil(D / 2) bytes a position

A byte holds an even channel's level in its low half and the next one's in its high half, each plus 8.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from contract import codec, quantize
from contract.codec import sent_lengths
from contract.errors import FrameError
from contract.records import DELTA_CODEC
from contract.trunk_pb2 import Forward, TensorHeader

Cut = Literal["head", "tail"]
_CUTS: tuple[Cut, ...] = ("head", "tail")
_LEVELS, _SHIFT = 7, 8
_KEPT = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Samples:
    """The rows of one forward in both ends' caches.

    `places`: one a row, 0 for a row that is not kept. `differences`: which rows go as such. `forgotten`: places that
    the client frees before.
    """

    places: tuple[int, ...]
    differences: tuple[bool, ...]
    forgotten: tuple[int, ...] = ()

    @classmethod
    def of(cls, forward: Forward) -> Samples:
        return cls(tuple(forward.samples), tuple(forward.differences), tuple(forward.forgotten))

    def write(self, forward: Forward) -> None:
        forward.samples.extend(self.places)
        forward.differences.extend(self.differences)
        forward.forgotten.extend(self.forgotten)


def place_bytes(length: int, hidden_size: int) -> int:
    """What a sample of that many positions takes in a cache: its activations at both cuts."""
    return len(_CUTS) * length * hidden_size * _KEPT.itemsize


class SampleCache:
    """What one end keeps of a session's samples; never more than `limit_bytes`.

    Requests may be admitted while earlier ones are still decoded, in another thread.
    """

    def __init__(self, limit_bytes: int, hidden_size: int) -> None:
        self._limit_bytes = limit_bytes
        self._hidden_size = hidden_size
        self._lengths: dict[int, int] = {}
        self._kept: dict[tuple[Cut, int], Tensor] = {}  # bfloat16 [length, D]
        self._changing = threading.Lock()

    def admit(self, samples: Samples, lengths: Sequence[int]) -> None:
        """Free and take the places of one forward, whose rows have that many positions without padding.

        Raises FrameError, and changes nothing, for what no client asks that keeps to the rules.
        """
        _check_counts(samples, len(lengths))
        forgotten = set(samples.forgotten)
        if len(forgotten) < len(samples.forgotten) or not forgotten <= self._lengths.keys():
            raise FrameError("forward.forgotten names a place twice, or one that nothing is kept at")
        after = {place: length for place, length in self._lengths.items() if place not in forgotten}
        for place, length, difference in zip(samples.places, lengths, samples.differences, strict=True):
            if difference and after.get(place) != length:
                raise FrameError(
                    f"forward.differences: a row of {length} positions at place {place}, where "
                    f"{after.get(place, 'nothing')} is kept"
                )
            if place and after.setdefault(place, length) != length:
                raise FrameError(f"forward.samples: place {place} is taken by a row of another length")
        taken = sum(place_bytes(length, self._hidden_size) for length in after.values())
        if taken > self._limit_bytes:
            raise FrameError(
                f"forward.samples: {taken} bytes would be kept; the session's limit is {self._limit_bytes}"
            )
        with self._changing:
            self._lengths = after
            for cut, place in itertools.product(_CUTS, forgotten):
                self._kept.pop((cut, place), None)

    def encode(
        self, cut: Cut, tensor_BTD: Tensor, mask_BT: Tensor | None, samples: Samples
    ) -> tuple[TensorHeader, memoryview]:
        """As `codec.encode`, for rows that were admitted; what is sent is kept. Raises FrameError, NonFiniteError."""
        name = codec.dtype_name(tensor_BTD.dtype)
        values_BTD = tensor_BTD.detach().to("cpu", torch.float32)
        differing_BT, full_BT = _parts(values_BTD.shape, mask_BT, samples)
        change_MD = values_BTD[differing_BT] - self._before(cut, samples)
        scale_M1 = quantize.scales(change_MD, _LEVELS)
        full, outlier_channels = quantize.pack(values_BTD[full_BT])
        levels = quantize.rounded(change_MD, scale_M1).to(torch.int16)
        data = torch.cat((scale_M1.reshape(-1).view(torch.uint8), full, _nibbles(levels).reshape(-1))).numpy().data
        header = TensorHeader(
            dtype=name,
            shape=list(tensor_BTD.shape),
            size_bytes=len(data),
            codec=DELTA_CODEC,
            outlier_channels=outlier_channels,
        )
        self.decode(cut, header, data, mask_BT, samples)
        return header, data

    def decode(
        self, cut: Cut, header: TensorHeader, data: memoryview, mask_BT: Tensor | None, samples: Samples
    ) -> Tensor:
        """As `codec.decode`, for rows that were admitted; what comes out is kept. Raises FrameError, NonFiniteError."""
        shape = tuple(header.shape)
        differing_BT, full_BT = _parts(shape, mask_BT, samples)
        differing, full = int(differing_BT.sum()), int(full_BT.sum())
        full_bytes = quantize.size_bytes(full, shape[2], header.outlier_channels)
        tensor_BTD = torch.zeros(shape, dtype=torch.float32)
        if full:
            between = data[4 * differing : 4 * differing + full_bytes]
            tensor_BTD[full_BT] = quantize.unpack(between, full, shape[2], header.outlier_channels)
        if differing:
            scale_M1 = quantize.read_scales(data, differing)
            packed = torch.frombuffer(data, dtype=torch.uint8, offset=4 * differing + full_bytes).view(differing, -1)
            change_MD = _levels(packed, shape[2]).to(torch.float32).mul_(scale_M1)
            tensor_BTD[differing_BT] = (self._before(cut, samples) + change_MD).to(_KEPT).to(torch.float32)
        self._keep(cut, tensor_BTD, differing_BT | full_BT, samples)
        return tensor_BTD.to(codec.DTYPES[header.dtype])

    def _before(self, cut: Cut, samples: Samples) -> Tensor:
        """float32 [M, D]: what is kept of the rows that go as differences. Raises FrameError for what is gone."""
        rows = zip(samples.places, samples.differences, strict=True)
        kept = []
        for place in (place for place, difference in rows if difference):
            if (values_TD := self._kept.get((cut, place))) is None:
                raise FrameError(f"forward.forgotten named place {place}, which an earlier forward still needed")
            kept.append(values_TD)
        return torch.cat(kept).to(torch.float32) if kept else torch.empty(0, self._hidden_size)

    def _keep(self, cut: Cut, tensor_BTD: Tensor, sent_BT: Tensor, samples: Samples) -> None:
        for row, place in enumerate(samples.places):
            if not place:
                continue
            values_TD = tensor_BTD[row][sent_BT[row]].to(_KEPT)
            with self._changing:  # a request that came meanwhile may have given the place up, and its room
                if self._lengths.get(place) == len(values_TD):
                    self._kept[cut, place] = values_TD


def _check_counts(samples: Samples, rows: int) -> None:
    if len(samples.places) != rows or len(samples.differences) != rows:
        raise FrameError(
            f"forward.samples has {len(samples.places)} places and {len(samples.differences)} differences; the batch "
            f"has {rows} rows"
        )
    places = [place for place in samples.places if place]
    if len(set(places)) < len(places):
        raise FrameError("forward.samples names a place twice")
    if any(difference and not place for place, difference in zip(samples.places, samples.differences, strict=True)):
        raise FrameError("forward.differences: a row without a place")


def _parts(shape: Sequence[int], mask_BT: Tensor | None, samples: Samples) -> tuple[Tensor, Tensor]:
    """Which positions [B, T] go as differences, and which in full."""
    lengths_B1 = torch.tensor(sent_lengths(mask_BT, shape)).view(-1, 1)
    sent_BT = torch.arange(shape[1]) < lengths_B1
    differences_B1 = torch.tensor(samples.differences).view(-1, 1)
    return sent_BT & differences_B1, sent_BT & ~differences_B1


def _nibbles(levels_MD: Tensor) -> Tensor:
    """uint8 [M, ceil(D / 2)]."""
    shifted_MD = (levels_MD + _SHIFT).to(torch.uint8)
    if shifted_MD.shape[1] % 2:
        shifted_MD = torch.nn.functional.pad(shifted_MD, (0, 1))
    return shifted_MD[:, ::2] | (shifted_MD[:, 1::2] << 4)


def _levels(packed: Tensor, hidden_size: int) -> Tensor:
    """int8 [M, D]."""
    both = torch.stack((packed & 15, packed >> 4), dim=-1).view(len(packed), -1)
    return both[:, :hidden_size].to(torch.int8) - _SHIFT
