"""What a trunk's state directory keeps no longer, what it must keep, and what a kill in between leaves."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contract import failpoint
from contract import trunk_pb2 as pb
from contract.adapter import to_bytes
from contract.errors import SessionError
from contract.records import RoundKey
from server_trunk.contributions import Candidate, Contributions
from server_trunk.leftovers import KEPT_S, UNNAMED_S
from tests.server_trunk.conftest import RunningTrunk
from tests.server_trunk.test_rounds import RUN, adapter, contribute, everything, first_adapter
from tests.server_trunk.wire_client import WireClient

CLIENTS = {"1": 3, "2": 5}
PLACES = ("leftovers.remove", "leftovers.unnamed", "leftovers.removed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def state(folder: Path) -> Contributions:
    return Contributions(folder)


@pytest.fixture
def first(state: Contributions) -> str:
    return state.adapters.put(to_bytes(adapter(0)))


class KilledError(BaseException):
    """Stands in for a SIGKILL."""


@pytest.fixture
def kill_at() -> Iterator[Callable[[str], None]]:
    """Ends, by KilledError, whatever comes by the place next."""

    def arm(place: str) -> None:
        def visit(here: str) -> None:
            if here == place:
                failpoint.watch(None)
                raise KilledError(here)

        failpoint.watch(visit)

    yield arm
    failpoint.watch(None)


def train(state: Contributions, base: str, number: int, run: str = RUN, attempt: int = 1) -> RoundKey:
    """Contributions to a round, whatever adapters they come to: of the same in each run, other ones in each round."""
    key = RoundKey(run, number, attempt)
    for client, tokens in CLIENTS.items():
        state.add(key, client, base, tokens, to_bytes(adapter(100 * number + int(client))))
    return key


def play(state: Contributions, base: str, rounds: range, run: str = RUN) -> list[Candidate]:
    """What each round commits, each from the one before."""
    committed = []
    for number in rounds:
        committed.append(state.commit(train(state, base, number, run), base, list(CLIENTS)))
        base = committed[-1].adapter_sha256
    return committed


def age(path: Path, by_s: float = KEPT_S + 3600) -> None:
    for one in [path, *path.rglob("*")]:
        os.utime(one, (time.time() - by_s,) * 2)


def test_a_run_of_many_rounds_takes_no_more_room_than_one_of_two(
    state: Contributions, first: str, folder: Path
) -> None:
    committed = play(state, first, range(1, 3))
    after_two = everything(folder)
    play(state, committed[-1].adapter_sha256, range(3, 6))
    assert len(everything(folder)) == len(after_two)


def test_of_several_trunks_what_was_put_goes_two_days_after_its_last_use(
    state: Contributions, first: str, folder: Path
) -> None:
    """Each is given the average over all of them, which no record of its own names before the next round."""
    base, counts = first, []
    for number in range(1, 7):
        part = state.commit_part(train(state, base, number), base, [*CLIENTS, "elsewhere"])
        assert part.clients == list(CLIENTS)
        base = state.adapters.put(to_bytes(adapter(1000 + number)))
        counts.append(len(everything(folder)))
    age(folder / "artifacts", UNNAMED_S + 3600)
    state.adapters.use(base)
    Contributions(folder).sweep()
    assert len(everything(folder)) <= counts[1]
    state.require_adapter(base)


def test_what_a_clients_record_names_is_no_reason_to_remove_it(state: Contributions, first: str) -> None:
    """Another run may need it, of which there is no record: it has just begun, or its trunk adapter is frozen."""
    others = state.adapters.put(to_bytes(adapter(4242)))
    contribute(state, others, RoundKey(RUN, 2, 1))
    play(state, first, range(1, 6))
    state.require_adapter(others)


def test_the_last_two_rounds_commits_are_answered_again(state: Contributions, first: str, folder: Path) -> None:
    committed = play(state, first, range(1, 6))
    again = Contributions(folder)
    for number, base in ((5, committed[3]), (4, committed[2]), (5, committed[3])):
        found = again.commit(RoundKey(RUN, number, 1), base.adapter_sha256, list(CLIENTS))
        assert found == committed[number - 1]
        assert again.adapters.get(found.adapter_sha256)


def test_a_round_is_played_again_from_the_version_before_it_after_its_average_was_made(
    state: Contributions, first: str
) -> None:
    """As where its orchestrator died before SQL had the average, or aborts the attempt: it puts nothing again."""
    committed = play(state, first, range(1, 6))
    base = committed[3].adapter_sha256
    state.require_adapter(base)
    assert state.commit(train(state, base, 5, attempt=2), base, list(CLIENTS)) == committed[4]
    play(state, committed[4].adapter_sha256, range(6, 8))


def test_a_resumed_run_goes_on_from_what_its_orchestrator_puts_again(state: Contributions, first: str) -> None:
    """From an older version than the last that the trunk has averaged, as after a restored database."""
    committed = play(state, first, range(1, 6))
    with pytest.raises(SessionError, match="put it first"):
        state.require_adapter(committed[1].adapter_sha256)
    older = state.adapters.put(to_bytes(adapter(7777)))
    key = train(state, older, 3, attempt=2)
    assert state.commit(key, older, list(CLIENTS)).trained_tokens == 8
    state.require_adapter(older)


def test_a_run_that_comes_to_the_same_adapters_keeps_them(state: Contributions, first: str) -> None:
    """Two deterministic runs of the same settings and data, one behind the other."""
    committed = play(state, first, range(1, 2), "behind")
    ahead = play(state, first, range(1, 6))
    assert committed[0] == ahead[0]
    assert play(state, committed[0].adapter_sha256, range(2, 6), "behind") == ahead[1:]


def test_a_first_version_stays_for_runs_that_have_not_begun_to_train(state: Contributions, first: str) -> None:
    play(state, first, range(1, 6))
    assert play(state, first, range(1, 2), "begun-later")


@pytest.mark.parametrize(("place", "number"), list(itertools.product(PLACES, (2, 3, 4))))
def test_what_a_kill_leaves_goes_with_the_next_commit(
    tmp_path: Path, kill_at: Callable[[str], None], place: str, number: int
) -> None:
    kept = []
    for name in ("calm", "killed"):
        state = Contributions(tmp_path / name)
        base = state.adapters.put(to_bytes(adapter(0)))
        before = play(state, base, range(1, number))[-1].adapter_sha256
        key = train(state, before, number)
        if name == "killed":
            kill_at(place)
            with pytest.raises(KilledError):
                state.commit(key, before, list(CLIENTS))
            state = Contributions(tmp_path / name)
        base = state.commit(key, before, list(CLIENTS)).adapter_sha256
        kept.append(everything(tmp_path / name))
        play(state, base, range(number + 1, number + 2))
        kept.append(everything(tmp_path / name))
    calm, later, killed, later_killed = kept
    assert killed == calm, "the same commit, asked for again"
    assert later_killed == later


def test_an_adapter_is_removed_before_the_records_that_name_it(
    state: Contributions, first: str, folder: Path, kill_at: Callable[[str], None]
) -> None:
    """Else a kill between would leave one that no later commit knows of."""
    committed = play(state, first, range(1, 3))
    key = train(state, committed[1].adapter_sha256, 3)
    kill_at("leftovers.unnamed")
    with pytest.raises(KilledError):
        state.commit(key, committed[1].adapter_sha256, list(CLIENTS))
    assert not state.adapters.has(committed[0].adapter_sha256)
    assert list((folder / "candidates" / RUN / "1").rglob("*.json"))


def test_a_record_that_cannot_be_read_keeps_adapters_and_fails_no_commit(
    state: Contributions, first: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contribute(state, first, RoundKey("other", 1, 1))
    (folder / "rounds/other/1/1/2.json").write_text("{")
    committed = play(state, first, range(1, 6))
    assert all(state.adapters.has(one.adapter_sha256) for one in committed)
    assert f"what run {RUN}'s earlier rounds left stays until it is old" in caplog.text


def test_what_runs_leave_that_ended_goes_a_month_after_its_last_use(
    state: Contributions, first: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    play(state, first, range(1, 4), "ended")
    age(folder)
    live = play(state, first, range(1, 2), "live")
    young = everything(folder)
    with caplog.at_level(logging.INFO, "trunkline.server_trunk"):
        Contributions(folder).sweep()
    kept = everything(folder)
    assert "removed the records of 1 runs, unused for 30 days, and 2 adapters, for 2 days" in caplog.text
    assert not any("ended" in name for name in kept)
    assert {name for name in kept if "live" in name} == {name for name in young if "live" in name}
    for sha256 in (first, live[0].adapter_sha256):
        state.require_adapter(sha256)
    caplog.clear()
    Contributions(folder).sweep()
    assert everything(folder) == kept
    assert not caplog.text


def test_a_record_that_cannot_be_read_keeps_old_adapters_and_no_trunk_from_its_start(
    state: Contributions, first: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    age(folder)
    contribute(state, first, RoundKey("other", 1, 1))
    (folder / "rounds/other/1/1/2.json").write_text("{")
    Contributions(folder).sweep()
    state.require_adapter(first)
    assert "old runs and adapters stay: " in caplog.text


def test_a_sweep_that_is_killed_is_done_by_the_next(
    state: Contributions, first: str, folder: Path, kill_at: Callable[[str], None]
) -> None:
    play(state, first, range(1, 3), "a")
    play(state, first, range(1, 3), "b")
    age(folder)
    for _ in range(2):
        kill_at("leftovers.remove")
        with pytest.raises(KilledError):
            Contributions(folder).sweep()
    Contributions(folder).sweep()
    assert everything(folder) == {}


def test_an_adapter_that_sessions_start_from_is_young(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, tmp_path: Path
) -> None:
    """As in a run whose trunk adapter is frozen: no record ever names it."""
    client = WireClient(start_trunk().address)
    base = first_adapter(client, lora)
    path = tmp_path / "state" / "artifacts" / f"{base}.safetensors"
    age(path)
    client.session(client.hello(lora, adapter_sha256=base)).close()
    start_trunk()
    assert path.exists()
    age(path)
    start_trunk()
    assert not path.exists()
