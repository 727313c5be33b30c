"""A client whose trunk session is lost trains its round again from the start, and no more often than it may."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from clients import participation, replay
from clients.app import REFUSED, app
from clients.split_model import remote_layers
from clients.wire_log import WireLog
from contract import failpoint
from contract.config import RunConfig
from contract.errors import ConnectionFailedError, SessionError, TrunklineError
from contract.records import RoundKey
from tests.clients.conftest import CUT
from tests.clients.sites import Orchestrator, Site, Version, upload_bytes, write_texts
from tests.conftest import TrunkProcess
from trunkline.ports import reserve_port

pytestmark = pytest.mark.usefixtures("flower_task")

SETTINGS: dict[str, Any] = {
    "secagg": "off",
    "local-steps": 2,
    "per-device-train-batch-size": 2,
    "max-length": 16,
    "eval-fraction": 0.25,
}


@pytest.fixture
def site(llama_dir: Path, trunk: TrunkProcess, tmp_path: Path) -> Site:
    data = write_texts(tmp_path / "texts.jsonl", rows=12, seed=1)
    return Site(7, {"model": str(llama_dir), "data": str(data), "trunk-address": trunk.address, "name": "north"})


def begun(llama_dir: Path, address: str, run: str, **settings: Any) -> tuple[Orchestrator, Version]:
    config = RunConfig.from_flower(SETTINGS | {name.replace("_", "-"): value for name, value in settings.items()})
    orchestrator = Orchestrator(config, llama_dir, address, run)
    return orchestrator, orchestrator.first()


@pytest.fixture
def loses(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """`loses(N)`: the first N trainings end, once they were through, by the loss of their session."""
    plain = participation.train

    def lose(times: int) -> list[int]:
        trainings: list[int] = []

        def train(model: Any, *given: Any) -> Any:
            done = plain(model, *given)
            trainings.append(done.steps)
            if len(trainings) <= times:
                remote_layers(model).trunk.abandon()
            return done

        monkeypatch.setattr(participation, "train", train)
        return trainings

    return lose


def test_a_deterministic_site_replays_the_same_bits(
    llama_dir: Path, trunk: TrunkProcess, site: Site, loses: Callable[[int], list[int]]
) -> None:
    uploads = []
    for run, lost in (("calm", 0), ("rough", 1)):
        orchestrator, version = begun(llama_dir, trunk.address, run, deterministic=True)
        trainings = loses(lost)
        reply = app(orchestrator.message(version, site, 1), site.context(orchestrator.config))
        assert len(trainings) == lost + 1
        uploads.append(upload_bytes(reply))
    assert uploads[0] == uploads[1]


def test_a_session_that_is_lost_too_often_ends_the_clients_part(
    llama_dir: Path, trunk: TrunkProcess, site: Site, loses: Callable[[int], list[int]]
) -> None:
    orchestrator, version = begun(llama_dir, trunk.address, "often", trunk_retries=1)
    trainings = loses(9)
    reply = app(orchestrator.message(version, site, 1), site.context(orchestrator.config))
    assert reply.has_error()
    assert reply.error.code == REFUSED
    assert "SessionError" in str(reply.error.reason)
    assert len(trainings) == 2


def test_a_trunk_killed_as_a_session_opens_and_started_again_costs_a_site_nothing(
    llama_dir: Path, trunk_process: Callable[..., TrunkProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"listen": f"127.0.0.1:{reserve_port()}", "state_dir": tmp_path / "state"}
    with monkeypatch.context() as patch:
        patch.setenv(failpoint.VARIABLE, "kill:serve.hello#1")
        mortal = trunk_process(llama_dir, CUT.head, CUT.tail, **place)
    texts = write_texts(tmp_path / "texts.jsonl", rows=12, seed=1)
    site = Site(7, {"model": str(llama_dir), "data": str(texts), "trunk-address": mortal.address, "name": "north"})
    orchestrator, version = begun(llama_dir, mortal.address, "hello")
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(app, orchestrator.message(version, site, 1), site.context(orchestrator.config))
        assert mortal.process.wait(60) == -signal.SIGKILL
        trunk_process(llama_dir, CUT.head, CUT.tail, **place)
        assert not reply.result(60).has_error()


class Scripted:
    """An attempt that ends as `ends` says, one after the other."""

    def __init__(self, *ends: TrunklineError | str, opened: bool = True, released: bool = False) -> None:
        self.ends = list(ends)
        self.opened, self.released = opened, released
        self.played = 0

    def play(self, route: object) -> str:
        self.played += 1
        end = self.ends.pop(0)
        if isinstance(end, TrunklineError):
            raise end
        return end


def play(attempt: Scripted, address: str, **settings: Any) -> str:
    config = RunConfig.from_flower({"trunk-address": address, **settings})
    place: Any = type("AnySite", (), {"trunk_address": address, "name": "north", "trunk_tls": None})()
    return replay.played(attempt, place, config, "client-1", WireLog())


LOST = SessionError("the session with the trunk is over")


GONE = ConnectionFailedError("the connection to the trunk broke")
NOISES: list[dict[str, Any]] = [
    {"dp": "client", "trunk-adapter": "frozen"},
    {"wire": "empirical", "wire-noise": 0.1},
]


@pytest.mark.parametrize("state", [{"opened": False}, {"released": True}])
def test_what_a_trunk_refused_to_open_and_what_was_released_is_not_played_again(
    trunk: TrunkProcess, state: dict[str, bool]
) -> None:
    attempt = Scripted(LOST, "done", **state)
    with pytest.raises(SessionError):
        play(attempt, trunk.address)
    assert attempt.played == 1


@pytest.mark.parametrize("settings", [{}, *NOISES])
def test_a_trunk_that_goes_before_the_session_is_open_is_waited_for(
    trunk: TrunkProcess, settings: dict[str, Any]
) -> None:
    attempt = Scripted(GONE, GONE, "done", opened=False)
    assert play(attempt, trunk.address, **settings) == "done"
    attempt = Scripted(GONE, GONE, GONE, "done", opened=False)
    with pytest.raises(ConnectionFailedError):
        play(attempt, trunk.address, **settings)
    assert attempt.played == 3


def test_a_round_that_is_over_ends_the_clients_part_at_once_and_is_not_played_again(
    llama_dir: Path, trunk: TrunkProcess, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    orchestrator, version = begun(llama_dir, trunk.address, "over")
    message, plain = orchestrator.message(version, site, 1), participation.train
    trainings: list[int] = []

    def train(model: Any, *given: Any) -> Any:
        trainings.append(1)
        orchestrator.trunk.end_before(RoundKey("over", 1, 2))
        return plain(model, *given)

    monkeypatch.setattr(participation, "train", train)
    reply = app(message, site.context(orchestrator.config))
    assert reply.has_error()
    told = f"RoundError: trunk at {trunk.address}: round 1, attempt 1 of run over is over"
    assert told in reply.error.reason
    again = app(message, site.context(orchestrator.config))
    assert told in again.error.reason
    assert trainings == [1], "it trained for an attempt that is over"


@pytest.mark.parametrize("noise", NOISES)
def test_what_was_noised_is_not_sent_again_under_other_noise(trunk: TrunkProcess, noise: dict[str, Any]) -> None:
    attempt = Scripted(LOST, "done")
    with pytest.raises(SessionError):
        play(attempt, trunk.address, **noise)
    assert attempt.played == 1


def test_a_trunk_that_stays_away_is_waited_for_no_longer_than_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(replay.time, "sleep", waits.append)
    monkeypatch.setattr(replay.time, "monotonic", lambda: float(len(waits)))
    attempt = Scripted(LOST, "done")
    with pytest.raises(ConnectionFailedError, match="no trunk answers at 127.0.0.1:9"):
        play(attempt, "127.0.0.1:9", **{"trunk-wait-s": 5.0})
    assert (attempt.played, len(waits)) == (1, 6)


def test_a_trunk_that_comes_back_is_played_with_again(trunk: TrunkProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "LOOK_S", 0.01)
    asked = threading.Event()
    plain = replay.trunk_route

    class Away:
        def describe(self) -> None:
            asked.set()
            raise ConnectionFailedError("no trunk answers")

        def close(self) -> None: ...

    routes = iter([plain, lambda *_: Away(), plain, plain])
    monkeypatch.setattr(replay, "trunk_route", lambda *given: next(routes)(*given))
    assert play(Scripted(LOST, "done"), trunk.address) == "done"
    assert asked.is_set()
