"""Masks: AES-256 in counter mode as a generator of ring elements, added in place a cache-sized piece at a time."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from aggregation.ring import RingVector

_PIECE_BYTES = 1 << 18
_ZERO_NONCE = bytes(16)
_ZEROS = bytes(_PIECE_BYTES)


def add_mask(vector: RingVector, key: bytes, *, negative: bool = False) -> None:
    """Add the mask of `key` to `vector` in place, or take it away. A key MUST make one mask only: the nonce is zero."""
    stream = Cipher(algorithms.AES(key), modes.CTR(_ZERO_NONCE)).encryptor()
    combine = np.subtract if negative else np.add
    word = vector.dtype.newbyteorder("<")
    buffer = bytearray(_PIECE_BYTES)
    step = _PIECE_BYTES // word.itemsize
    for start in range(0, vector.size, step):
        piece = vector[start : start + step]
        wanted_bytes = piece.size * word.itemsize
        stream.update_into(memoryview(_ZEROS)[:wanted_bytes], memoryview(buffer)[:wanted_bytes])
        combine(piece, np.frombuffer(buffer, dtype=word, count=piece.size), out=piece)
