"""Counts and losses as coordinates of a sum, so that they are told only as totals over all clients.

A value is an integer from 0 to 2^48 - 1, carried as three limbs of 16 bits, a coordinate each: the limbs of up to 2^16
clients add up in Z_2^32 without a wrap. A loss travels as nats times tokens, in steps of 2^-16.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aggregation.ring import RingVector, zeros
from contract.errors import UpdateError

NAMES = ("eval_nats", "eval_tokens", "train_nats", "train_tokens", "steps")
NATS_STEPS = 1 << 16
_LIMB_BITS, _LIMBS = 16, 3
SIZE = len(NAMES) * _LIMBS
"""Coordinates that a tally takes."""


def encode(values: Mapping[str, int], bits: int) -> RingVector:
    """One client's values, of shape (SIZE,). Raises UpdateError, naming the value, where one cannot be carried."""
    encoded = zeros(SIZE, bits)
    for place, name in enumerate(NAMES):
        value = values.get(name, 0)
        if not 0 <= value < 1 << (_LIMB_BITS * _LIMBS):
            raise UpdateError(f"{name} is {value}; a tally carries 0 to 2^{_LIMB_BITS * _LIMBS} - 1")
        for limb in range(_LIMBS):
            encoded[place * _LIMBS + limb] = value >> (_LIMB_BITS * limb) & ((1 << _LIMB_BITS) - 1)
    return encoded


def decode(total: RingVector) -> dict[str, int]:
    """The sums of all clients' values, from the ring sum of their encodings, shape (SIZE,)."""
    if total.shape != (SIZE,):
        raise UpdateError(f"the tally has shape {total.shape}; it must be ({SIZE},)")
    limbs = [int(limb) for limb in total.astype(np.uint64)]
    return {
        name: sum(limbs[place * _LIMBS + limb] << (_LIMB_BITS * limb) for limb in range(_LIMBS))
        for place, name in enumerate(NAMES)
    }
