"""The simulation can fail: it finds each fault that is planted in the program, within a stated number of seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.simulation.mutants import MUTANTS, planted
from tests.simulation.world import Surroundings, judged, surroundings

WITHIN = 40

FOUND_BY = {
    "unfenced": "drives",
    "taken_over_alive": "took over a run whose driver had",
    "refunded": "let round .* go.*VOID",
    "charged_late": r"in the orchestrator's ledger its charge is \[\]",
    "site_pays_nothing": r"in its own ledger its charge is \[\]",
    "overspent": "of its budget",
    "masks_again": "let two vectors go under the masks of session",
    "other_survivors": "the trunk's half of round . is not the mean",
    "commits_again": "the versions of .* were",
    "forgets_the_last": "comes next",
    "waits_for_ever": "has waited",
    "wrong_mean": "the clients' half of round . is not the mean",
}
"""What is said of each; a fault that shows by something else first may be another one."""


@pytest.fixture(scope="module")
def around() -> Iterator[Surroundings]:
    with surroundings() as made:
        yield made


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_found(around: Surroundings, name: str) -> None:
    with planted(name):
        for seed in range(WITHIN):
            outcome = judged(around, seed)
            if outcome.wrong:
                break
    assert outcome.wrong, f"not found within {WITHIN} seeds"
    assert re.search(FOUND_BY[name], outcome.wrong[0]), outcome.wrong
    assert not judged(around, seed).wrong, "without the fault the seed must be sound"
