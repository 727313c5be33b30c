"""Sums of updates that carry their noise already: whole steps of one fixed point, uniform weights, a fixed denominator.

A client's codes are its clipped update in steps of 1 / scale plus its share of the noise; the last coordinate is the
weight, 1, so that the sum also says how many clients it holds. The mean divides by the clients of the session, not by
those that stayed: who drops out then moves a sum by no more than its own update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aggregation.ring import RingVector, zeros
from contract.errors import ConfigError, UpdateError
from contract.records import LARGEST_CLIP, SMALLEST_CLIP

_MAX_CLIENTS = 1 << 20
_COARSEST_CLIP, _FINEST_CLIP = 2.0**16, 2.0**40
"""In steps. Below the first rounding shows; up to the second, codes and their sums are exact in int64."""
_SMALLEST_SHARE, _LARGEST_SHARE = 2.0**-4, 2.0**29
"""Standard deviation of one client's noise, in steps: what can be drawn exactly."""
_LEAST_MULTIPLIER, _MOST_MULTIPLIER = 2.0**-20, 2.0**24
_ROOM = 8.0
"""Standard deviations of the whole noise that the ring has room for: a coordinate wraps with a chance below 2^-49."""
_REACH = 12.0
"""Standard deviations beyond which noise does not come up (2^-107): whoever shows more is not honest."""


@dataclass(frozen=True, slots=True)
class NoisySum:
    """How up to `clients` parties encode noised updates of norm `clip`, in Z_2^bits, at `scale` steps per unit.

    The noise of any `fewest` shares has standard deviation noise_multiplier x scale x clip; all shares' is larger by
    sqrt(clients / fewest). A NoisySum whose sums could wrap cannot be made: it raises ConfigError, so that both sides
    refuse such settings before anything is encoded.
    """

    bits: int
    scale: float
    clients: int
    fewest: int
    clip: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        _check_inputs(self.clients, self.fewest, self.clip, self.noise_multiplier)
        if not 0.0 < self.scale < math.inf or math.frexp(self.scale)[0] != 0.5:
            raise ConfigError(f"scale is {self.scale}; fixed point needs a power of two")
        if not _fits(self.bits, self.scale, self.clients, self.fewest, self.clip, self.noise_multiplier):
            raise ConfigError(
                f"noised updates of {self.clients} clients do not fit Z_2^{self.bits} at scale {self.scale} with "
                f"dp-clip {self.clip:g} and dp-noise-multiplier {self.noise_multiplier:g}"
            )
        if self.share_sigma < _SMALLEST_SHARE:
            raise ConfigError(
                f"dp-noise-multiplier is {self.noise_multiplier:g}; a client's share of that noise has a standard "
                f"deviation of {self.share_sigma:.2g} steps: it must be at least {_SMALLEST_SHARE}"
            )

    @property
    def share_sigma(self) -> float:
        """Standard deviation of one client's share of the noise, in steps."""
        return self.noise_multiplier * self.scale * self.clip / math.sqrt(self.fewest)

    def encode(self, codes_d: npt.NDArray[np.int64]) -> RingVector:
        """One client's codes, int64 of shape (d,), as ring elements of shape (d + 1,), the weight last.

        Raises UpdateError for codes of another kind and for one that no clipped update with honest noise gives.
        """
        if codes_d.ndim != 1 or codes_d.dtype != np.int64:
            raise UpdateError(f"the codes have shape {codes_d.shape} and type {codes_d.dtype}; they must be flat int64")
        _require_within(codes_d, self._reach(1), "a client's code")
        encoded = zeros(codes_d.size + 1, self.bits)
        encoded[:-1] = codes_d.astype(encoded.dtype)
        encoded[-1] = 1
        return encoded

    def decode(self, total: RingVector) -> tuple[npt.NDArray[np.float64], int]:
        """A ring sum of encodings, shape (d + 1,), as (sum / (scale x clients) of shape (d,), clients in the sum).

        Raises UpdateError when the sum is none that up to `clients` honest encodings can give.
        """
        if total.ndim != 1 or total.size < 1 or total.dtype != zeros(0, self.bits).dtype:
            raise UpdateError(
                f"the sum has shape {total.shape} and type {total.dtype}; it must be flat uint{self.bits}"
            )
        survivors = int(total[-1])
        if not 1 <= survivors <= self.clients:
            raise UpdateError(f"the sum holds {survivors} clients; it must be 1 to {self.clients}")
        steps_d: npt.NDArray[np.signedinteger[Any]] = total[:-1].view(f"i{self.bits // 8}")
        _require_within(steps_d, self._reach(survivors), f"the sum of {survivors} clients")
        mean_d: npt.NDArray[np.float64] = steps_d / (self.scale * self.clients)
        return mean_d, survivors

    def _reach(self, clients: int) -> float:
        """The largest coordinate that a sum over `clients` can have."""
        return clients * (self.scale * self.clip + 1.0) + _REACH * self.share_sigma * math.sqrt(clients)


def plan_noisy_sum(clients: int, fewest: int, clip: float, noise_multiplier: float) -> NoisySum:
    """The finest NoisySum in which no sum of `clients` noised updates can wrap; every party computes the same one.

    `fewest` is the smallest number of survivors that keep their noise to themselves. The ring is Z_2^32, or Z_2^64
    where a clip would be less than 2^16 steps in the smaller one. Raises ConfigError, naming the number at fault.
    """
    _check_inputs(clients, fewest, clip, noise_multiplier)
    for bits in (32, 64):
        exponent = math.floor(math.log2(min(2.0 ** (bits - 1) / clients, _FINEST_CLIP) / clip))
        while not _fits(bits, 2.0**exponent, clients, fewest, clip, noise_multiplier):
            exponent -= 1
        if 2.0**exponent * clip >= _COARSEST_CLIP:
            return NoisySum(bits, 2.0**exponent, clients, fewest, clip, noise_multiplier)
    raise ConfigError(
        f"dp-noise-multiplier is {noise_multiplier:g}; with shares of the noise for {fewest} of {clients} clients, "
        f"dp-clip has less than 2^16 steps in any ring: it must be about {math.sqrt(fewest) * 2**12:.0f} at most"
    )


def _check_inputs(clients: int, fewest: int, clip: float, noise_multiplier: float) -> None:
    if not 1 <= clients <= _MAX_CLIENTS:
        raise ConfigError(f"clients is {clients}; a noisy sum takes 1 to {_MAX_CLIENTS}")
    if not 1 <= fewest <= clients:
        raise ConfigError(
            f"the fewest clients whose noise stays secret (secagg-threshold less dp-colluders) are {fewest}; it must "
            f"be 1 to {clients}, the clients of the sum"
        )
    if not SMALLEST_CLIP <= clip <= LARGEST_CLIP:
        raise ConfigError(f"dp-clip is {clip}; fixed point needs {SMALLEST_CLIP:.0e} to {LARGEST_CLIP:.0e}")
    if not _LEAST_MULTIPLIER <= noise_multiplier <= _MOST_MULTIPLIER:
        raise ConfigError(f"dp-noise-multiplier is {noise_multiplier}; it must be 2^-20 to 2^24")


def _fits(bits: int, scale: float, clients: int, fewest: int, clip: float, noise_multiplier: float) -> bool:
    """Whether all clients' codes and `_ROOM` standard deviations of their noise stay inside half the ring."""
    steps = scale * clip
    share = noise_multiplier * steps / math.sqrt(fewest)
    largest = clients * (steps + 1.0) + _ROOM * share * math.sqrt(clients)
    return largest < 2.0 ** (bits - 1) and steps <= _FINEST_CLIP and share <= _LARGEST_SHARE


def _require_within(values: npt.NDArray[np.signedinteger[Any]], reach: float, what: str) -> None:
    """Raise UpdateError where a value is further from 0 than `reach`."""
    lowest, highest = int(values.min(initial=0)), int(values.max(initial=0))
    if max(highest, -lowest) > reach:
        raise UpdateError(f"{what} has a coordinate of {max(highest, -lowest)} steps; at most {reach:.0f} can come up")
