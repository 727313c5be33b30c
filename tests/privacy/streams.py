"""Streams that come out the same in every run of the tests, and odd ones."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from privacy.stream import Floats, SecretStream, Shape


def stream_of(seed: int) -> SecretStream:
    """Of a key that is no secret."""
    return SecretStream(lambda count: hashlib.shake_256(b"a test's key %d" % seed).digest(count))


class SilentStream(SecretStream):
    """Fails where anything is drawn from it."""

    def __init__(self) -> None:
        super().__init__(bytes)

    def bits(self, count: int) -> npt.NDArray[np.uint64]:
        raise AssertionError(f"{count} numbers were drawn")


class ConstantStream(SecretStream):
    """Every word is the same."""

    def __init__(self, word: int) -> None:
        super().__init__(bytes)
        self._word = word

    def bits(self, count: int) -> npt.NDArray[np.uint64]:
        return np.full(count, self._word, dtype=np.uint64)


class QuietStream(SecretStream):
    """A mutant whose normal numbers are smaller than they should be."""

    def __init__(self, seed: int, divisor: float) -> None:
        super().__init__(lambda count: hashlib.shake_256(b"a mutant's key %d" % seed).digest(count))
        self._divisor = divisor

    def standard_normal(self, shape: Shape) -> Floats:
        return super().standard_normal(shape) / self._divisor
