"""The simulation can fail: it finds each fault that is planted in the program, within a stated number of seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.simulation.mutants import MUTANTS, planted
from tests.simulation.world import Surroundings, judged, surroundings

WITHIN = 40

FOUND = {
    "unfenced": (10, "to a run that .* drives|it must be open"),
    "taken_over_alive": (1, "took over a run whose driver had"),
    "refunded": (15, "let round .* go.*VOID"),
    "charged_late": (4, r"in the orchestrator's ledger its charge is \[\]"),
    "site_pays_nothing": (4, r"in its own ledger its charge is \[\]"),
    "overspent": (15, "of its budget"),
    "masks_again": (18, "let two vectors go under the masks of session"),
    "other_survivors": (0, "the trunk's half of round . is not the mean"),
    "commits_again": (0, "the versions of .* were"),
    "forgets_the_last": (0, "comes next"),
    "waits_for_ever": (0, "has waited"),
    "wrong_mean": (0, "the clients' half of round . is not the mean"),
}
"""From which seed on each is looked for, since that one showed it when this was written; and by what it must show."""


@pytest.fixture(scope="module")
def around() -> Iterator[Surroundings]:
    with surroundings() as made:
        yield made


def test_every_planted_fault_is_looked_for() -> None:
    assert FOUND.keys() == MUTANTS.keys()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_found(around: Surroundings, name: str) -> None:
    first, words = FOUND[name]
    with planted(name):
        for seed in range(first, first + WITHIN):
            outcome = judged(around, seed)
            if outcome.wrong:
                break
    assert outcome.wrong, f"not found within {WITHIN} seeds"
    assert re.search(words, outcome.wrong[0]), outcome.wrong
    assert not judged(around, seed).wrong, "without the fault the seed must be sound"
