"""200 seeds of whole runs in bad weather, from a base seed that is printed; `make simulate` plays more."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from tests.simulation.seeds import Tally, told
from tests.simulation.weather import plan_of
from tests.simulation.world import Surroundings, judged, play, surroundings

CHUNKS, SEEDS_EACH = 8, 25
BASE = int(os.environ.get("TRUNKLINE_SIMULATION_SEED") or secrets.randbits(31))


@pytest.fixture(scope="module")
def around() -> Iterator[Surroundings]:
    with surroundings() as made:
        yield made


@pytest.fixture(scope="module")
def tally() -> Tally:
    return Tally()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_whatever_fails_what_is_committed_and_charged_is_as_a_small_model_says(
    around: Surroundings, tally: Tally, chunk: int
) -> None:
    for seed in range(BASE + chunk * SEEDS_EACH, BASE + (chunk + 1) * SEEDS_EACH):
        outcome = judged(around, seed)
        tally.add(outcome)
        assert not outcome.wrong, f"TRUNKLINE_SIMULATION_SEED={BASE}\n{told(outcome)}"


def test_the_weather_of_these_seeds_brought_all_that_comes_up_often(tally: Tally) -> None:
    if tally.seeds < CHUNKS * SEEDS_EACH:
        pytest.skip("only with all of the seeds")
    assert tally.missing == [], f"TRUNKLINE_SIMULATION_SEED={BASE}"


@pytest.mark.parametrize("seed", [3, 9, 13])
def test_a_seed_is_played_again_to_the_same_trace(around: Surroundings, seed: int) -> None:
    first, second = (play(around, plan_of(seed)) for _ in range(2))
    assert first == second
    assert first.trace_sha256 != play(around, plan_of(seed + 1)).trace_sha256


def test_where_nothing_fails_one_orchestrator_commits_every_round_over_everybody(around: Surroundings) -> None:
    plan = plan_of(3, calm=True)
    outcome = play(around, plan)
    assert (outcome.wrong, outcome.lives, outcome.whole) == ((), 1, True)
    assert outcome.commits == plan.settings["num-rounds"]
    assert len(outcome.versions) == outcome.commits + 1
