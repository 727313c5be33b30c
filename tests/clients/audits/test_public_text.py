"""What attackers make of public text."""

from __future__ import annotations

import numpy as np
import pytest

from clients.audits.public_text import swap_tokens, token_odds
from clients.data import TokenRow
from tests.clients.audits.test_wire_attacks import rows_of
from tests.contract.families import VOCAB


def test_tokens_that_were_never_seen_count_as_half_a_time() -> None:
    tokens_T = np.array([2, 2, 0], dtype=np.int32)
    assert np.exp(token_odds([TokenRow(0, tokens_T, tokens_T, False)], 4)) == pytest.approx(
        np.array([1.5, 0.5, 2.5, 0.5]) / 5
    )


def test_every_token_is_put_into_text_several_times() -> None:
    rows = rows_of(10, seed=8)
    swapped = swap_tokens(rows, VOCAB, seed=0)
    counts = np.bincount(np.concatenate([row.tokens_T for row in swapped]), minlength=VOCAB)
    assert counts.min() >= 1
    assert len(swapped) > len(rows)
    kept = [np.mean(row.tokens_T == rows[place % 10].tokens_T) for place, row in enumerate(swapped)]
    assert np.mean(kept) == pytest.approx(0.7, abs=0.05)
    assert all(np.array_equal(row.tokens_T, row.labels_T) for row in swapped)
