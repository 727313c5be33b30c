"""Fixed point: weighted float vectors become elements of Z_2^32, where sums are exact and order does not matter.

A client with integer weight w and update delta sends round(scale * w * delta) for each coordinate and w itself as the
last one. Sums are taken modulo 2^32; negative numbers are two's complement. The mean is sum(w * delta) / sum(w).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from contract.errors import ConfigError, UpdateError

RingVector = npt.NDArray[np.uint32]
AnyRingVector = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]
FloatVector = npt.NDArray[np.floating[Any]]

RING = 1 << 32
_HALF_RING = 1 << 31
_MAX_CLIENTS = 1 << 20
_CLIP_RANGE = (2.0**-40, 2.0**40)
_CHUNK = 1 << 16  # coordinates; keeps the float64 intermediates in cache


def zeros(size: int, bits: int) -> AnyRingVector:
    """The neutral vector of shape (size,) over Z_2^bits, 32 or 64."""
    return np.zeros(size, dtype=np.uint32) if bits == 32 else np.zeros(size, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """How `clients` parties with weights up to `max_weight` encode updates of at most `clip` a coordinate.

    `scale` is a power of two: steps per unit of weight * delta. A FixedPoint in which some sum could wrap cannot be
    made: it raises ConfigError, so that both sides refuse such settings before anything is encoded.

    Bound: with N contributions whose weights sum to W, the decoded mean of a coordinate is within `error_bound(N, W)`
    = N / (2 * scale * W) of the exact weighted mean, float64's own rounding (2^-52 of the value) aside.
    """

    scale: float
    clip: float
    clients: int
    max_weight: int

    def __post_init__(self) -> None:
        _check_inputs(self.clients, self.max_weight, self.clip)
        if not math.isfinite(self.scale) or math.frexp(self.scale)[0] != 0.5:
            raise ConfigError(f"scale is {self.scale}; fixed point needs a power of two")
        if not _fits(self.scale, self.clients, self.max_weight, self.clip):
            raise ConfigError(
                f"{self.clients} clients of up to {self.max_weight} trained tokens and updates of up to {self.clip} "
                f"wrap in Z_2^32 at scale {self.scale}: use a smaller scale or update-clip"
            )

    def encode(self, delta: FloatVector, weight: int) -> RingVector:
        """Encode one client's update, shape (d,), float32 or float64, as shape (d + 1,); the last element is `weight`.

        Raises UpdateError, naming the coordinate and its value, when one is not finite or exceeds `clip`, and when
        `weight` is not within 1..max_weight. Nothing is clipped in silence.
        """
        if delta.ndim != 1:
            raise UpdateError(f"the update has shape {delta.shape}; it must be one flat vector")
        if not 1 <= weight <= self.max_weight:
            raise UpdateError(f"the weight is {weight} trained tokens; this round takes 1 to {self.max_weight}")
        encoded = np.empty(delta.size + 1, dtype=np.uint32)
        factor = self.scale * weight
        for start in range(0, delta.size, _CHUNK):
            chunk = np.asarray(delta[start : start + _CHUNK], dtype=np.float64)
            self._refuse_unusable(chunk, start)
            encoded[start : start + chunk.size] = np.rint(chunk * factor).astype(np.int64).astype(np.uint32)
        encoded[-1] = weight
        return encoded

    def _refuse_unusable(self, chunk: npt.NDArray[np.float64], offset: int) -> None:
        usable = np.abs(chunk) <= self.clip  # False for NaN too
        if usable.all():
            return
        index = int(np.argmin(usable))
        value = float(chunk[index])
        wanted = f"at most {self.clip} in size (update-clip)" if math.isfinite(value) else "finite"
        raise UpdateError(f"coordinate {offset + index} of the update is {value}; it must be {wanted}")

    def decode(self, total: RingVector) -> tuple[npt.NDArray[np.float64], int]:
        """Turn a ring sum of encodings, shape (d + 1,), into (mean of shape (d,), sum of weights).

        Raises UpdateError when the sum is none that up to `clients` honest encodings can give.
        """
        if total.ndim != 1 or total.size < 1 or total.dtype != np.uint32:
            raise UpdateError(f"the sum has shape {total.shape} and type {total.dtype}; it must be flat uint32")
        weight_sum = int(total[-1])
        if not 1 <= weight_sum <= self.clients * self.max_weight:
            raise UpdateError(f"the weights sum to {weight_sum}; it must be 1 to {self.clients * self.max_weight}")
        mean: npt.NDArray[np.float64] = total[:-1].view(np.int32) / (self.scale * weight_sum)
        largest = float(np.abs(mean).max(initial=0.0))
        if largest > (self.clip + self.error_bound(self.clients, weight_sum)) * (1 + 2**-40):
            raise UpdateError(f"the mean update has a coordinate of size {largest}; it must be at most {self.clip}")
        return mean, weight_sum

    def error_bound(self, contributions: int, weight_sum: int) -> float:
        """Largest distance of a decoded mean's coordinate from the exact weighted mean."""
        return contributions / (2 * self.scale * weight_sum)


def plan(clients: int, max_weight: int, clip: float) -> FixedPoint:
    """The finest FixedPoint in which no sum of `clients` updates can wrap; every party computes the same one.

    `max_weight` is the most tokens that one client can train on in a round. Raises ConfigError, naming the number at
    fault, where there is none.
    """
    _check_inputs(clients, max_weight, clip)
    exponent = math.ceil(math.log2(_HALF_RING / (clients * max_weight * clip)))
    while not _fits(2.0**exponent, clients, max_weight, clip):
        exponent -= 1
    return FixedPoint(scale=2.0**exponent, clip=clip, clients=clients, max_weight=max_weight)


def _check_inputs(clients: int, max_weight: int, clip: float) -> None:
    for name, value, limit in (("clients", clients, _MAX_CLIENTS), ("max_weight", max_weight, RING - 1)):
        if not 1 <= value <= limit:
            raise ConfigError(f"{name} is {value}; fixed point takes 1 to {limit}")
    if not _CLIP_RANGE[0] <= clip <= _CLIP_RANGE[1]:
        raise ConfigError(f"update-clip is {clip}; fixed point needs {_CLIP_RANGE[0]:.0e} to {_CLIP_RANGE[1]:.0e}")
    if clients * max_weight >= RING:
        raise ConfigError(
            f"{clients} clients of up to {max_weight} trained tokens can sum to {clients * max_weight}, which wraps in "
            f"Z_2^32: for {clients} clients at most {(RING - 1) // clients} tokens each fit"
        )


def _fits(scale: float, clients: int, max_weight: int, clip: float) -> bool:
    """Whether `clients` codes of the largest size, |round(scale * weight * clip)|, stay inside half the ring."""
    return clients * (math.ceil(scale * max_weight * clip) + 1) < _HALF_RING
