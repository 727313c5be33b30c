"""Totals over clients, and none of one client's numbers beside them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import tally
from aggregation.ring import zeros
from contract.errors import UpdateError

values = st.fixed_dictionaries({name: st.integers(0, 2**48 - 1) for name in tally.NAMES})


@given(st.lists(values, min_size=1, max_size=40), st.sampled_from([32, 64]))
def test_the_sum_of_tallies_is_the_tally_of_sums(told: list[dict[str, int]], bits: int) -> None:
    total = zeros(tally.SIZE, bits)
    for one in told:
        total += tally.encode(one, bits)
    assert tally.decode(total) == {name: sum(one[name] for one in told) for name in tally.NAMES}


def test_as_many_clients_as_a_session_may_have_do_not_wrap() -> None:
    largest = tally.encode(dict.fromkeys(tally.NAMES, 2**48 - 1), 32).astype(np.uint64) * (1 << 14)
    assert int(largest.max()) < 2**32
    assert tally.decode(largest.astype(np.uint32)) == dict.fromkeys(tally.NAMES, (2**48 - 1) << 14)


@pytest.mark.parametrize("value", [-1, 2**48])
def test_a_value_that_cannot_be_carried_is_named(value: int) -> None:
    with pytest.raises(UpdateError, match="eval_nats is "):
        tally.encode({"eval_nats": value}, 32)


def test_a_tally_of_another_length_is_refused() -> None:
    with pytest.raises(UpdateError, match="the tally has shape"):
        tally.decode(zeros(tally.SIZE - 1, 32))
