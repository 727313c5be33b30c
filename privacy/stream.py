"""Secret chance for noise: AES-256 in counter mode under a key that is drawn once and told to nobody.

Floating point. A real number's Gaussian noise has no gaps; a float's has, and Mironov, "On Significance of the Least
Significant Bits for Differential Privacy" (CCS 2012), reads the secret out of which low-order bits can and cannot come
up. What is done about it, and what is left:

- A normal number is the quantile of a uniform one that has 53 significant bits wherever it lies, down to 2^-129. It is
  within 2^-49 of the ideal one in the tails too, which reach 13 standard deviations: samplers of plain 53-bit numbers
  stop at 8 and leave wide gaps long before.
- Whoever releases a value plus noise rounds it to `grid_step(sigma)`, at least 2^-13 sigma, which adds less than 2^-27
  of the noise's variance. Rounding is post-processing; afterwards no finer bits are there to be read.
- Left over: the chance of each grid point is the ideal one's times 1 +- 2^-34, for values of up to 16 sigma. If every
  error fell the worst way, d coordinates would add d 2^-33 to an epsilon (1e-4 at a million); it is not charged.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Floats = npt.NDArray[np.float64]
Shape = int | tuple[int, ...]

_KEY_BYTES = 32
_WORD = np.dtype("<u8")
_CHUNK = 1 << 16  # numbers; keeps the intermediates in cache
_SIGN, _REST = np.uint64(1 << 63), np.uint64((1 << 63) - 1)
_EXACT = np.uint64(1 << 53)
_GRID_BITS = 12


def grid_step(sigma: float) -> float:
    """The step to which a value with noise of standard deviation `sigma` is rounded: a power of two <= sigma 2^-12."""
    return math.ldexp(1.0, math.frexp(sigma)[1] - 1 - _GRID_BITS)


class SecretStream:
    """Numbers that nobody can tell from independent uniform ones without the key.

    For one thread of one process: a copy, such as a fork makes, would give the same noise twice.
    """

    def __init__(self, entropy: Callable[[int], bytes]) -> None:
        """`entropy(n)` gives n secret random bytes; it is asked once, for the key."""
        self._stream = Cipher(algorithms.AES(entropy(_KEY_BYTES)), modes.CTR(bytes(16))).encryptor()

    def bits(self, count: int) -> npt.NDArray[np.uint64]:
        """`count` words of 64 bits; read-only."""
        return np.frombuffer(self._stream.update(bytes(count * _WORD.itemsize)), dtype=_WORD)

    def uniform(self, shape: Shape) -> Floats:
        """The odd multiples of 2^-53 in (0, 1), all as likely: never 0 or 1."""
        return self._filled(shape, self._coarse)

    def fine_uniform(self, shape: Shape) -> Floats:
        """Uniform in (0, 1], with 53 significant bits also where it is small, down to 2^-129: for tails."""
        return self._filled(shape, lambda count: self._fine(self.bits(count)))

    def standard_normal(self, shape: Shape) -> Floats:
        """Independent N(0, 1), as said in this module's docstring; about 20 ns each."""
        return self._filled(shape, self._normal)

    def _filled(self, shape: Shape, draw: Callable[[int], Floats]) -> Floats:
        out = np.empty(shape, dtype=np.float64)
        flat = out.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            chunk[:] = draw(chunk.size)
        return out

    def _coarse(self, count: int) -> Floats:
        value = (self.bits(count) >> np.uint64(12)).astype(np.float64)
        return (value + 0.5) * 2.0**-52

    def _fine(self, words: npt.NDArray[np.uint64]) -> Floats:
        """(words + a fraction) 2^-64; the fraction is drawn where a float has bits for it."""
        value = words.astype(np.float64) + 0.5
        small = np.flatnonzero(words < _EXACT)
        value[small] = words[small] + (self.bits(small.size) + 0.5) * 2.0**-64
        return value * 2.0**-64

    def _normal(self, count: int) -> Floats:
        from scipy.special import ndtri

        words = self.bits(count)
        below: Floats = ndtri(self._fine(words & _REST))
        below.view(np.uint64)[:] ^= words & _SIGN
        return below
