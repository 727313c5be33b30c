"""The doctor's checks of clocks, versions, ports, memory and writes, each with what is wrong and its fix."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from contract.records import CutLayers
from contract.version import VERSION
from server_trunk import status
from server_trunk.server import ServeOptions
from server_trunk.status import TrunkStatus
from storage import health
from storage.store import open_store
from tests.server_trunk.conftest import CUT, RunningTrunk, running, save_llama
from trunkline import database_checks, model_checks, port_checks
from trunkline.cli import app
from trunkline.clocks import judge_skew
from trunkline.finding import DoubtfulError, NotReadyError, SkippedError
from trunkline.model_checks import AskedModel, check_gpu_memory, check_model_memory
from trunkline.port_checks import check_port
from trunkline.trunk_checks import check_trunk_clock, check_trunk_version

# ---- clocks and versions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skew_s", "error_s", "kind"),
    [
        (0.0, 0.01, None),
        (-1.9, 0.0, None),
        (2.5, 0.1, DoubtfulError),
        (-2.5, 0.1, DoubtfulError),
        (2.5, 0.6, None),
        (11.0, 0.5, NotReadyError),
        (-11.0, 0.5, NotReadyError),
        (11.0, 2.0, DoubtfulError),
    ],
)
def test_a_clock_is_judged_by_what_is_sure_of_it(skew_s: float, error_s: float, kind: type[Exception] | None) -> None:
    if kind is None:
        assert judge_skew("the clock of x", skew_s, error_s, 10.0).startswith("the clock of x is ")
        return
    with pytest.raises(NotReadyError) as found:
        judge_skew("the clock of x", skew_s, error_s, 10.0)
    assert type(found.value) is kind
    assert "NTP" in found.value.fix
    assert ("ahead of" if skew_s > 0 else "behind") in str(found.value)


@pytest.fixture(scope="module")
def live_trunk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTrunk]:
    made = tmp_path_factory.mktemp("trunk")
    model = save_llama(made / "model")
    with running(ServeOptions(str(model), CUT, "127.0.0.1:0", made / "state", device="cpu", batch_tokens=512)) as begun:
        yield begun


def test_a_live_trunk_tells_its_version_and_its_time(live_trunk: RunningTrunk) -> None:
    told = status.ask(live_trunk.address)
    assert told.version == VERSION
    assert told.clock_skew_s is not None
    assert abs(told.clock_skew_s) <= told.clock_error_s + 0.001, "it is this machine's own clock"
    assert f"is trunkline {VERSION}, as here" in check_trunk_version(live_trunk.address)
    assert f"the clock of {live_trunk.address}" in check_trunk_clock(live_trunk.address)


@pytest.fixture
def answering(live_trunk: RunningTrunk, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Has the trunk answer otherwise than it would."""

    def answer(**changes: Any) -> str:
        told: TrunkStatus = replace(status.ask(live_trunk.address), **changes)
        monkeypatch.setattr(status, "ask", lambda address, tls: told)
        return live_trunk.address

    return answer


def test_another_version_is_doubtful_and_one_that_refuses_clients_is_not_ready(answering: Callable[..., str]) -> None:
    with pytest.raises(DoubtfulError, match="is trunkline 9.9, here is"):
        check_trunk_version(answering(version="9.9"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"torch": "1.0"}, "has torch 1.0 there, .* here: it refuses clients of this machine"),
        ({"protocol": 99}, "speaks protocol 99, this installation"),
    ],
)
def test_libraries_or_a_protocol_that_differ_are_named(
    answering: Callable[..., str], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(NotReadyError, match=told) as found:
        check_trunk_version(answering(**changes))
    assert found.value.result == "FAIL"


def test_a_trunk_whose_clock_is_off_is_told(answering: Callable[..., str]) -> None:
    with pytest.raises(NotReadyError, match=r"is 45\.000 s behind this machine's, right to 0\.010 s"):
        check_trunk_clock(answering(clock_skew_s=-45.0, clock_error_s=0.01))


def test_a_trunk_of_before_or_none_is_skipped(answering: Callable[..., str]) -> None:
    for check in (check_trunk_clock, check_trunk_version):
        with pytest.raises(SkippedError, match="not asked: no trunk answers"):
            check("127.0.0.1:9")
    with pytest.raises(SkippedError, match="does not tell its time"):
        check_trunk_clock(answering(clock_skew_s=None))


def test_each_trunk_has_checks_of_its_own(live_trunk: RunningTrunk, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["doctor", "--trunk", f"{live_trunk.address},127.0.0.1:9", "-o", "json"])
    found = {one["check"]: one["result"] for one in json.loads(done.stdout)["data"]}
    assert done.exit_code == 1
    assert (found["trunk"], found[f"trunk version {live_trunk.address}"]) == ("FAIL", "PASS")
    assert found[f"trunk clock {live_trunk.address}"] == "PASS"
    assert found["trunk clock 127.0.0.1:9"] == found["trunk version 127.0.0.1:9"] == "SKIP"


# ---- the database ----------------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", f"sqlite:///{tmp_path / 'runs.db'}")
    return tmp_path / "runs.db"


def test_a_database_that_is_not_there_yet_is_not_written_to(database: Path) -> None:
    for check in (database_checks.check_database_write, database_checks.check_database_clock):
        with pytest.raises(SkippedError, match="its schema is absent"):
            check()
    assert not database.exists()


def test_a_write_is_tried_and_a_refusal_told(database: Path) -> None:
    open_store().close()
    assert "took a row, which was taken back" in database_checks.check_database_write()
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT count(*) FROM events").fetchone() == (0,)
        connection.execute("CREATE TRIGGER shut BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'read-only'); END")
    with pytest.raises(NotReadyError, match="read-only") as found:
        database_checks.check_database_write()
    assert "the right to write" in found.value.fix


def test_a_database_that_cannot_be_reached_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_DATABASE_URL", "postgresql://ada:hunter2@127.0.0.1:1/runs")
    with pytest.raises(NotReadyError, match="no database answers") as found:
        database_checks.check_database()
    assert "hunter2" not in str(found.value)
    with pytest.raises(SkippedError, match="not asked"):
        database_checks.check_database_clock()


@pytest.mark.parametrize(("skew_s", "result"), [(0.5, None), (3.0, "WARN"), (-12.0, "FAIL")])
def test_a_servers_clock_must_agree_for_the_lease(
    database: Path, monkeypatch: pytest.MonkeyPatch, skew_s: float, result: str | None
) -> None:
    open_store().close()
    monkeypatch.setattr(health, "clock_skew", lambda engine: (skew_s, 0.01))
    if result is None:
        assert "the clock of sqlite" in database_checks.check_database_clock()
        return
    with pytest.raises(NotReadyError) as found:
        database_checks.check_database_clock()
    assert found.value.result == result


# ---- ports -----------------------------------------------------------------------------------------------------------

LISTENER = """
import socket, sys, time
listening = socket.socket()
listening.bind((sys.argv[1], 0))
listening.listen()
print(listening.getsockname()[1], flush=True)
time.sleep(600)
"""


@pytest.fixture
def listen() -> Iterator[Callable[..., int]]:
    """Starts a process that listens, with further words in its command line; answers its port."""
    started: list[subprocess.Popen[str]] = []

    def begin(address: str, *words: str) -> int:
        process = subprocess.Popen([sys.executable, "-c", LISTENER, address, *words], stdout=subprocess.PIPE, text=True)
        started.append(process)
        if process.stdout is None:
            raise RuntimeError("no pipe")
        return int(process.stdout.readline())

    yield begin
    for process in started:
        process.kill()
        process.communicate(timeout=10)


def test_a_port_that_nobody_has_is_free() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert check_port(unused.getsockname()[1]) == "free", "bound is not listening"


def test_one_of_ours_on_a_port_is_named(listen: Callable[..., int]) -> None:
    port = listen("127.0.0.1", "trunkline", "trunk", "serve")
    assert check_port(port, loopback_only=True).endswith(" at 127.0.0.1")


def test_a_stranger_on_a_port_is_doubtful_and_named(listen: Callable[..., int]) -> None:
    with pytest.raises(DoubtfulError, match=r"python.* \(process \d+\) at 127\.0\.0\.1") as found:
        check_port(listen("127.0.0.1"))
    assert "another port" in found.value.fix


def test_a_supernodes_own_port_that_others_reach_is_doubtful(listen: Callable[..., int]) -> None:
    port = listen("0.0.0.0", "flower-supernode")
    assert "at 0.0.0.0" in check_port(port)
    with pytest.raises(DoubtfulError, match=r"at 0\.0\.0\.0") as found:
        check_port(port, loopback_only=True)
    assert "leave it on 127.0.0.1" in found.value.fix


def test_a_system_that_does_not_tell_who_listens_is_asked_for_the_port(
    listen: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(kind: str) -> None:
        raise port_checks.psutil.AccessDenied

    monkeypatch.setattr(port_checks.psutil, "net_connections", denied)
    assert check_port(listen("127.0.0.1")) == "in use, and this system does not tell by whom"


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


def trunk_bytes(model: Path, size: int) -> int:
    """By the weights themselves: layers 1 and 2 of 4."""
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    return (
        sum(tensor.numel() for name, tensor in tensors.items() if ".layers.1." in name or ".layers.2." in name) * size
    )


def test_the_trunks_weights_are_counted_as_they_are_loaded(model: Path) -> None:
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        weights, gpu = model_checks._footprint(AskedModel(str(model), CutLayers(1, 1), dtype))
        assert weights == trunk_bytes(model, size)
    asked = AskedModel(str(model), CutLayers(1, 1), "float32")
    held = check_model_memory if gpu is None else check_gpu_memory
    assert "the trunk's weights take" in held(asked)
    with pytest.raises(SkippedError, match="no CUDA here" if gpu is None else "the GPU would hold them"):
        (check_gpu_memory if gpu is None else check_model_memory)(asked)


def test_a_model_that_cannot_be_cut_so_or_is_none_is_told(model: Path) -> None:
    with pytest.raises(NotReadyError, match="leave no layer for the trunk"):
        check_model_memory(AskedModel(str(model), CutLayers(9, 9), "float32"))
    with pytest.raises(NotReadyError, match="is not a directory"):
        check_model_memory(AskedModel("/nowhere", CutLayers(1, 1), "float32"))


def test_without_a_model_memory_is_not_judged() -> None:
    for check in (check_gpu_memory, check_model_memory):
        with pytest.raises(SkippedError, match="--model"):
            check(None)


@pytest.mark.parametrize(
    ("weights", "gpu", "result"),
    [
        (10**10, (10**9, 2 * 10**9), "FAIL"),
        (10**9, (15 * 10**8, 2 * 10**9), "WARN"),
        (10**9, (10**10, 2 * 10**10), None),
    ],
)
def test_weights_are_held_against_what_the_gpu_has_free(
    monkeypatch: pytest.MonkeyPatch, weights: int, gpu: tuple[int, int], result: str | None
) -> None:
    monkeypatch.setattr(model_checks, "_footprint", lambda asked: (weights, gpu))
    asked = AskedModel("x", CutLayers(1, 1), "float32")
    if result is None:
        assert "1.00 GB; 10.0 GB are free of 20.0 GB on the GPU" in check_gpu_memory(asked)
        return
    with pytest.raises(NotReadyError) as found:
        check_gpu_memory(asked)
    assert found.value.result == result
    assert "torchrun" in found.value.fix


def test_a_footprint_that_takes_too_long_or_fails_is_told(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr(model_checks, "LIMIT_S", 0.01)
    with pytest.raises(NotReadyError, match="was not read within"):
        check_model_memory(AskedModel(str(model), CutLayers(1, 2), "float32"))
    monkeypatch.setattr(model_checks, "LIMIT_S", 120)
    monkeypatch.setattr(model_checks.sys, "executable", "/bin/false")
    with pytest.raises(NotReadyError, match="could not be read: no output"):
        check_model_memory(AskedModel(str(model), CutLayers(2, 1), "float32"))
