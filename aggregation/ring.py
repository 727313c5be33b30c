"""Fixed point: weighted float vectors become elements of Z_2^32 or Z_2^64, where sums are exact in any order.

A client with integer weight w and update delta sends round(scale * w * delta) for each coordinate and w itself as the
last one. Sums wrap at the ring's size; negative numbers are two's complement. The mean is sum(w * delta) / sum(w).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from contract.errors import ConfigError, UpdateError
from contract.records import LARGEST_CLIP, MOST_TOKENS, SMALLEST_CLIP

RingVector = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]
FloatVector = npt.NDArray[np.floating[Any]]
Dither = Callable[[int], npt.NDArray[np.float64]]
"""As many independent numbers as asked for, uniform in [0, 1)."""

RING = MOST_TOKENS
_COARSEST_CLIP, _COARSEST_TOKEN = 1 << 16, 1 << 4
"""In steps, at the largest weight and at weight 1: below either Z_2^32 is too coarse, and Z_2^64 is taken."""
_FINEST_CLIP = 1 << 52
"""In steps: float64 tells no more of them apart."""
_MAX_CLIENTS = 1 << 20
_CHUNK = 1 << 16  # coordinates; keeps the float64 intermediates in cache


def zeros(size: int, bits: int) -> RingVector:
    """The neutral vector of shape (size,) over Z_2^bits, 32 or 64."""
    return np.zeros(size, dtype=np.uint32) if bits == 32 else np.zeros(size, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """How `clients` parties with weights up to `max_weight` encode updates of at most `clip` a coordinate.

    `scale` is a power of two: steps per unit of weight * delta. A FixedPoint in which some sum could wrap cannot be
    made: it raises ConfigError, so that both sides refuse such settings before anything is encoded.

    Bound: with N contributions whose weights sum to W, the decoded mean of a coordinate is within `error_bound(N, W)`
    = N / (2 * scale * W) of the exact weighted mean, float64's own rounding (2^-52 of the value) aside; twice that
    where the encoding was dithered.
    """

    scale: float
    clip: float
    clients: int
    max_weight: int
    bits: int = 32

    def __post_init__(self) -> None:
        _check_inputs(self.clients, self.max_weight, self.clip)
        if not math.isfinite(self.scale) or math.frexp(self.scale)[0] != 0.5:
            raise ConfigError(f"scale is {self.scale}; fixed point needs a power of two")
        if not _fits(self.scale, self.clients, self.max_weight, self.clip, self.bits):
            raise ConfigError(
                f"{self.clients} clients of up to {self.max_weight} trained tokens and updates of up to {self.clip} "
                f"wrap in Z_2^{self.bits} at scale {self.scale}: use a smaller scale or update-clip"
            )

    def encode(self, delta: FloatVector, weight: int, dither: Dither | None = None) -> RingVector:
        """Encode one client's update, shape (d,), float32 or float64, as shape (d + 1,); the last element is `weight`.

        Rounds to the nearest step, or with `dither` up or down by chance, so that the mean is the value itself. Raises
        UpdateError, naming the coordinate and its value, when one is not finite or exceeds `clip`, and when
        `weight` is not within 1..max_weight. Nothing is clipped in silence.
        """
        if delta.ndim != 1:
            raise UpdateError(f"the update has shape {delta.shape}; it must be one flat vector")
        if not 1 <= weight <= self.max_weight:
            raise UpdateError(f"the weight is {weight} trained tokens; this round takes 1 to {self.max_weight}")
        encoded = zeros(delta.size + 1, self.bits)
        factor = self.scale * weight
        for start in range(0, delta.size, _CHUNK):
            chunk = np.asarray(delta[start : start + _CHUNK], dtype=np.float64)
            self._refuse_unusable(chunk, start)
            steps = chunk * factor
            codes = np.rint(steps) if dither is None else np.floor(steps + dither(steps.size))
            encoded[start : start + chunk.size] = codes.astype(np.int64).astype(encoded.dtype)
        encoded[-1] = weight
        return encoded

    def require_resolved(self, delta: FloatVector, weight: int) -> None:
        """Raise UpdateError where nothing of a client's update would be left by the encoding."""
        largest = _largest(delta)
        steps = largest * self.scale * weight
        if 0 < steps < 0.5:
            raise UpdateError(
                f"the update would be lost: its largest change, {largest:.3g}, is {steps:.2g} steps of a fixed point "
                f"made for up to {self.max_weight} trained tokens, of which this client has {weight}, and changes of "
                f"up to {self.clip:g}: lower max-tokens or update-clip"
            )

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
        if total.ndim != 1 or total.size < 1 or total.dtype != zeros(0, self.bits).dtype:
            raise UpdateError(
                f"the sum has shape {total.shape} and type {total.dtype}; it must be flat uint{self.bits}"
            )
        weight_sum = int(total[-1])
        if not 1 <= weight_sum <= self.clients * self.max_weight:
            raise UpdateError(f"the weights sum to {weight_sum}; it must be 1 to {self.clients * self.max_weight}")
        mean: npt.NDArray[np.float64] = total[:-1].view(f"i{self.bits // 8}") / (self.scale * weight_sum)
        largest = _largest(mean)
        if largest > (self.clip + 2 * self.error_bound(self.clients, weight_sum)) * (1 + 2**-40):
            raise UpdateError(f"the mean update has a coordinate of size {largest}; it must be at most {self.clip}")
        return mean, weight_sum

    def error_bound(self, contributions: int, weight_sum: int) -> float:
        """Largest distance of a decoded mean's coordinate from the exact weighted mean.

        Half a step for each contribution, and what float64 rounds off: once as a value becomes a code, twice on the way
        back, each time at most 2^-53 of the clip.
        """
        return contributions / (2 * self.scale * weight_sum) + self.clip * 2.0**-51


def _largest(vector: FloatVector) -> float:
    """The largest absolute value, without a copy of the vector."""
    return max(float(vector.max(initial=0.0)), -float(vector.min(initial=0.0)))


def plan(clients: int, max_weight: int, clip: float) -> FixedPoint:
    """The finest FixedPoint in which no sum of `clients` updates can wrap; every party computes the same one.

    `max_weight` is the most tokens that one client can train on in a round. The ring is Z_2^32, or Z_2^64 where in the
    smaller one a clip would be less than 2^16 steps for a client of the largest weight, or 2^4 for a weight of 1.
    Raises ConfigError, naming the number at fault, where there is none.
    """
    _check_inputs(clients, max_weight, clip)
    for bits, finest in ((32, math.inf), (64, _FINEST_CLIP)):
        exponent = math.ceil(math.log2(min(2 ** (bits - 1) / clients, finest) / (max_weight * clip)))
        while not _fits(2.0**exponent, clients, max_weight, clip, bits):
            exponent -= 1
        fixed = FixedPoint(scale=2.0**exponent, clip=clip, clients=clients, max_weight=max_weight, bits=bits)
        if fixed.scale * max_weight * clip >= _COARSEST_CLIP and fixed.scale * clip >= _COARSEST_TOKEN:
            break
    return fixed


def _check_inputs(clients: int, max_weight: int, clip: float) -> None:
    for name, value, limit in (("clients", clients, _MAX_CLIENTS), ("max_weight", max_weight, RING - 1)):
        if not 1 <= value <= limit:
            raise ConfigError(f"{name} is {value}; fixed point takes 1 to {limit}")
    if not SMALLEST_CLIP <= clip <= LARGEST_CLIP:
        raise ConfigError(f"update-clip is {clip}; fixed point needs {SMALLEST_CLIP:.0e} to {LARGEST_CLIP:.0e}")
    if clients * max_weight >= RING:
        raise ConfigError(
            f"{clients} clients of up to {max_weight} trained tokens can sum to {clients * max_weight}, which wraps in "
            f"Z_2^32: for {clients} clients at most {(RING - 1) // clients} tokens each fit"
        )


def _fits(scale: float, clients: int, max_weight: int, clip: float, bits: int) -> bool:
    """Whether `clients` codes of the largest size, |round(scale * weight * clip)|, stay inside half the ring."""
    return clients * (math.ceil(scale * max_weight * clip) + 1) < 1 << (bits - 1)
