"""Clipping, and Gaussian noise on what was clipped: the Gaussian mechanism (Dwork and Roth 2014, appendix A).

The noise is the float's as told in privacy/stream.py: what is released lies on a grid, and no finer bits are left.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from contract.errors import ConfigError, NonFiniteError
from contract.privacy_records import PrivacyEvent
from privacy.stream import Floats, SecretStream, grid_step

Rows = TypeVar("Rows", bound=npt.NDArray[np.floating[Any]])

_CHUNK = 1 << 18  # values; bounds the float64 copies of float32 rows
_LARGEST = 2.0**100
_MARGINS = {np.dtype(np.float32): 2.0**-20, np.dtype(np.float64): 2.0**-40}
"""By how much less a row is clipped to, so that rounding cannot leave it over its norm."""


def gaussian_event(noise_multiplier: float, clip: float) -> PrivacyEvent:
    """The event of one release with noise of standard deviation `noise_multiplier` x `clip`.

    Raises ConfigError for numbers with which nothing would be hidden or nothing would be left.
    """
    for name, value in (("the noise multiplier", noise_multiplier), ("the clip", clip)):
        if not 1 / _LARGEST <= value <= _LARGEST:
            raise ConfigError(f"{name} of the Gaussian mechanism is {value}; it must be 2^-100 to 2^100")
    return PrivacyEvent("gaussian", {"noise_multiplier": float(noise_multiplier).hex(), "clip": float(clip).hex()})


def require_finite(values: npt.NDArray[np.floating[Any]], what: str) -> None:
    """Raise NonFiniteError, naming the place of the first bad one, unless all values of `what` are finite."""
    if not np.isfinite(values).all():
        place = [int(index) for index in np.argwhere(~np.isfinite(values))[0]]
        raise NonFiniteError(f"{what}: a NaN or an infinity at {place}")


def clip_rows(rows: Rows, norm: float) -> Rows:
    """Each row of [B, ...], float32 or float64, times min(1, norm / its L2 norm over all but axis 0).

    A clipped row's norm is a hair below `norm`, never over it; the row of zeros stays. Values must be finite.
    """
    flat = rows.reshape(rows.shape[0], -1)
    with np.errstate(over="ignore"):  # an infinite norm gives zeros, which is within any norm
        norms_B = np.linalg.norm(flat.astype(np.float64, copy=False), axis=1)
    shrunk = norm * (1.0 - _MARGINS[rows.dtype])
    factors_B = shrunk / np.maximum(norms_B, shrunk)
    clipped: Rows = (flat * factors_B[:, None]).astype(rows.dtype, copy=False).reshape(rows.shape)
    return clipped


def add_noise(values: Floats, sigma: float, stream: SecretStream) -> None:
    """Adds N(0, sigma^2) to each value in place and rounds to `grid_step(sigma)`."""
    noise = stream.standard_normal(values.shape)
    noise *= sigma
    values += noise
    step = grid_step(sigma)
    values *= 1.0 / step
    np.rint(values, out=values)
    values *= step


class GaussianRows:
    """One unit a row: every row is clipped to `clip` and has noise of standard deviation noise_multiplier x clip."""

    def __init__(self, clip: float, noise_multiplier: float, stream: SecretStream) -> None:
        """Raises ConfigError for a clip or a multiplier that is not above 0."""
        self.event = gaussian_event(noise_multiplier, clip)
        self._clip, self._sigma, self._stream = clip, noise_multiplier * clip, stream

    def apply(self, rows: Rows) -> tuple[Rows, PrivacyEvent]:
        """Rows [B, ...], float32 or float64, as they may leave, same shape and type, and what that costs each row.

        Raises NonFiniteError, naming the place, before any noise is drawn.
        """
        require_finite(rows, "the rows to be noised")
        noised = np.empty_like(rows)
        step = max(1, _CHUNK // max(1, math.prod(rows.shape[1:])))
        for start in range(0, rows.shape[0], step):
            chunk = clip_rows(rows[start : start + step].astype(np.float64), self._clip)
            add_noise(chunk, self._sigma, self._stream)
            noised[start : start + step] = chunk
        return noised, self.event


class GaussianSum:
    """Noise of standard deviation noise_multiplier x clip on a sum in which each unit's part has norm `clip` at most.

    The parts are clipped by whoever sums them; one draw for the whole sum (Abadi et al. 2016, algorithm 1).
    """

    def __init__(self, clip: float, noise_multiplier: float, stream: SecretStream) -> None:
        """Raises ConfigError for a clip or a multiplier that is not above 0."""
        self.event = gaussian_event(noise_multiplier, clip)
        self._sigma, self._stream = noise_multiplier * clip, stream

    def apply(self, sum_d: Floats) -> tuple[Floats, PrivacyEvent]:
        """The noised sum, float64 of shape (d,), and its event. Raises NonFiniteError before any noise is drawn."""
        require_finite(sum_d, "the sum to be noised")
        noised = sum_d.astype(np.float64)
        add_noise(noised, self._sigma, self._stream)
        return noised, self.event
