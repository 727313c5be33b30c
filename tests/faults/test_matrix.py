"""A sample of the fault matrix, from a seed that is printed; `make faults` plays all of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from tests.faults.life import SCENARIOS
from tests.faults.matrix import Case, Surroundings, available_engines, faults_of, play, play_whole, surroundings

SAMPLE = 12


@pytest.fixture(scope="module")
def around() -> Iterator[Surroundings]:
    with surroundings() as made:
        yield made


@pytest.mark.timeout(600)
def test_an_orchestrator_killed_anywhere_comes_to_what_it_would_have_come_to(around: Surroundings) -> None:
    seed = int(os.environ.get("TRUNKLINE_FAULT_SEED", secrets.randbits(32)))
    assert play(around, available_engines(), tuple(SCENARIOS), SAMPLE, seed) == [], f"TRUNKLINE_FAULT_SEED={seed}"


def test_two_runs_of_one_deterministic_scenario_are_equal(around: Surroundings) -> None:
    first, second = (play_whole(around, "secure", "sqlite") for _ in range(2))
    assert first.told["versions"] == second.told["versions"]
    assert first.places == second.places


def test_the_matrix_sees_a_kill_that_never_came(around: Surroundings) -> None:
    whole = play_whole(around, "plain", "sqlite")
    case = Case("plain", "sqlite", "sql.commit_round.after#99")
    assert faults_of(around, case, whole) == ["the place was not come by a second time: nothing was killed"]


def test_every_durable_write_and_every_message_of_a_round_is_in_the_matrix(around: Surroundings) -> None:
    names = {place.split("#")[0] for place in play_whole(around, "private", "sqlite").places}
    for write in ("create_run", "add_adapter_version", "open_round", "record_participation", "commit_round"):
        assert {f"sql.{write}.{moment}" for moment in ("before", "uncommitted", "after")} <= names
    assert {"ledger.before", "ledger.uncommitted", "ledger.after"} <= names
    assert {"file.write", "file.rename", "file.written"} <= names
    assert {"flower.push.before", "flower.push.after", "flower.reply", "trunk.call.before", "trunk.call.after"} <= names
