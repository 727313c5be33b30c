"""A sample of the fault matrix, from a seed that is printed; `make faults` plays all of it."""

from __future__ import annotations

import os
import random
import secrets
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.forking import begun, ended
from tests.faults.matrix import Case, Surroundings, available_engines, faults_of, play, play_whole, surroundings
from tests.faults.scenarios import SCENARIOS
from tests.faults.state import half_written

KILLS = {"orchestrator": 2, "trunk": 1, "site": 1}


def scenarios_of(party: str) -> list[str]:
    return [name for name, scenario in SCENARIOS.items() if scenario.party == party]


@pytest.fixture(scope="module")
def around() -> Iterator[Surroundings]:
    with surroundings() as made:
        yield made


@pytest.mark.timeout(900)
def test_orchestrator_trunk_or_site_killed_anywhere_the_run_comes_to_what_it_would_have_come_to(
    around: Surroundings,
) -> None:
    seed = int(os.environ.get("TRUNKLINE_FAULT_SEED", secrets.randbits(32)))
    draw = random.Random(seed)
    those = [name for party, kills in KILLS.items() for name in draw.sample(scenarios_of(party), kills)]
    assert play(around, available_engines(), those, len(those), seed) == [], f"TRUNKLINE_FAULT_SEED={seed}"


def test_two_runs_of_one_deterministic_scenario_are_equal(around: Surroundings) -> None:
    first, second = (play_whole(around, "secure", "sqlite") for _ in range(2))
    assert first.told["versions"] == second.told["versions"]
    assert first.places == second.places
    case = Case("secure", "sqlite", "sql.commit_round.after#99")
    (fault,) = faults_of(around, case, first)
    assert "killed 0 times" in fault, "a kill that never came is no success"


def test_threads_side_by_side_hear_the_exit_code_of_each_of_their_processes() -> None:
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda code: ended(begun(sys.exit, code)), range(100)))
    assert codes == list(range(100))


def test_every_durable_write_and_every_message_of_a_round_is_in_the_orchestrators_matrix(around: Surroundings) -> None:
    names = {place.split("#")[0] for place in around.whole("private", "sqlite").places}
    for write in ("create_run", "add_adapter_version", "open_round", "record_participation", "commit_round"):
        assert {f"sql.{write}.{moment}" for moment in ("before", "uncommitted", "after")} <= names
    assert {"ledger.before", "ledger.uncommitted", "ledger.after"} <= names
    assert {"file.write", "file.rename", "file.written"} <= names
    assert {"flower.push.before", "flower.push.after", "flower.reply", "trunk.call.before", "trunk.call.after"} <= names


@pytest.mark.timeout(600)
def test_every_write_and_every_message_of_a_round_is_in_the_trunks_matrix(around: Surroundings) -> None:
    names = {place.split("#")[0] for place in around.whole("trunk-plain", "sqlite").places}
    assert {"file.write", "file.rename", "file.written", "spill.write", "spill.written"} <= names
    assert {"evict.write", "evict.written"} <= names
    assert {"leftovers.remove", "leftovers.unnamed", "leftovers.removed"} <= names
    for call in ("describe", "put_adapter", "commit_round", "get_adapter"):
        assert {f"serve.{call}", f"serve.{call}.reply"} <= names
    for kind in ("forward", "backward", "step", "close"):
        assert {f"serve.{kind}", f"serve.{kind}.reply", f"serve.{kind}.replied"} <= names
    assert {"serve.hello", "serve.welcome.reply", "serve.welcome.replied"} <= names


@pytest.mark.timeout(600)
def test_every_write_and_every_message_of_a_round_is_in_the_sites_matrix(around: Surroundings) -> None:
    names = {place.split("#")[0].split("/")[-1] for place in around.whole("site-private", "sqlite").places}
    assert {"file.write", "file.rename", "file.written"} <= names
    assert {"ledger.before", "ledger.uncommitted", "ledger.after", "sql.upgrade.uncommitted"} <= names
    assert {"site.asked", "site.reply", "flower.answer.send", "flower.answer.sent"} <= names
    for kind in ("hello", "forward", "backward", "close"):
        assert {f"site.{kind}.send", f"site.{kind}.sent"} <= names


def test_a_half_written_file_that_a_trunk_would_believe_is_found(tmp_path: Path) -> None:
    artifacts, attempt = tmp_path / "artifacts", tmp_path / "rounds" / "run" / "1" / "1"
    for folder in (artifacts, attempt):
        folder.mkdir(parents=True)
    (artifacts / f"{'0' * 64}.safetensors").write_bytes(b"half of")
    (attempt / "client.json").write_text('{"adapter_sha256": "')
    assert len(half_written(tmp_path)) == 2
