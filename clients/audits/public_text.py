"""Public text as an attacker uses it: to know how common tokens are, and to try what is not in it.

It lacks most tokens, as inputs and as labels. An attacker makes its own text, so that it can put them in.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from clients.data import TokenRow

_UNSEEN = 0.5  # times that a token is taken to occur which never does
_SWAPPED = 0.3
_SIGHTINGS, _MOST_TOKENS = 8, 200_000


def swap_tokens(rows: Sequence[TokenRow], vocabulary: int, seed: int) -> list[TokenRow]:
    """`rows` again and again with some of their tokens drawn anew, until each token was drawn about 8 times."""
    generator = np.random.default_rng(seed)
    wanted = min(_SIGHTINGS * vocabulary / _SWAPPED, _MOST_TOKENS)
    swapped: list[TokenRow] = []
    for row in itertools.cycle(rows):
        if wanted <= 0:
            break
        wanted -= len(row.tokens_T)
        drawn_T = generator.integers(vocabulary, size=len(row.tokens_T), dtype=np.int32)
        tokens_T = np.where(generator.random(len(row.tokens_T)) < _SWAPPED, drawn_T, row.tokens_T)
        swapped.append(TokenRow(row.number, tokens_T, tokens_T, row.truncated))
    return swapped


def token_odds(rows: Sequence[TokenRow], vocabulary: int) -> npt.NDArray[np.float64]:
    """Log probability of each token by how often it occurs in `rows`; of those that never do as half a time, [V]."""
    counts_V = np.full(vocabulary, _UNSEEN)
    for row in rows:
        np.add.at(counts_V, row.tokens_T, 1.0)
    return np.asarray(np.log(counts_V / counts_V.sum()))
