"""Chance for stochastic rounding: AES-256 in counter mode under a key that is drawn once and told to nobody."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from aggregation.keys import KEY_BYTES
from aggregation.shamir import Entropy

_WORD = np.dtype("<u4")


class SecretDither:
    """Independent numbers, uniform over the multiples of 2^-32 in [0, 1)."""

    def __init__(self, entropy: Entropy) -> None:
        self._stream = Cipher(algorithms.AES(entropy(KEY_BYTES)), modes.CTR(bytes(16))).encryptor()

    def __call__(self, count: int) -> npt.NDArray[np.float64]:
        words = np.frombuffer(self._stream.update(bytes(count * _WORD.itemsize)), dtype=_WORD)
        return words.astype(np.float64) * 2.0**-32
