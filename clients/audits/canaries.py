"""Canaries: rows of random tokens among the training rows, which nothing but training could make likelier.

After Carlini et al., "The Secret Sharer" (USENIX Security 2019): each canary is ranked by its loss among random rows of
the same kind that nobody trained on. No text has them, so that what is found has been learned from that one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clients.data import TokenRow

INSERTED, UNSEEN = 32, 500
_TOKENS = 32
_NUMBERS_FROM = 1 << 40
"""Canaries' row numbers start above those of any data."""


def draw_canaries(vocabulary: int, longest: int, seed: int) -> tuple[list[TokenRow], list[TokenRow]]:
    """(to be inserted, never trained on): rows of at most 32 tokens, drawn uniformly."""
    generator = np.random.default_rng([seed, _TOKENS])
    shape = (INSERTED + UNSEEN, min(_TOKENS, longest))
    drawn = generator.integers(vocabulary, size=shape, dtype=np.int32)
    rows = [TokenRow(_NUMBERS_FROM + place, tokens_T, tokens_T, False) for place, tokens_T in enumerate(drawn)]
    return rows[:INSERTED], rows[INSERTED:]


def insert(rows: Sequence[TokenRow], canaries: Sequence[TokenRow], times: int, seed: int) -> list[TokenRow]:
    """`rows` with each canary `times` times among them, in an order drawn from `seed`."""
    together = [*rows, *(canary for canary in canaries for _ in range(times))]
    order = np.random.default_rng([seed, times]).permutation(len(together))
    return [together[place] for place in order]
