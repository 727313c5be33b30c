"""A run from its settings to its exported adapter, and every way in which it can end before."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Error, Message

from contract import adapter
from contract.config import ConfigValue
from contract.errors import AgreementError, ConfigError, ConnectionFailedError, QuorumError, TrunklineError
from orchestrator.base_model import model_fingerprint
from orchestrator.run import conduct
from orchestrator.trunk import Trunk
from tests.orchestrator.conftest import Bench
from tests.orchestrator.fakes import Content, FakeNode

MakeBench = Callable[..., Bench]


def test_a_run_ends_with_a_peft_directory_of_its_last_round(make_bench: MakeBench) -> None:
    bench = make_bench().tell_shapes_ahead()
    export = bench.conduct()
    run = bench.store.get_run("last")
    assert (run.status, run.reason, run.committed_rounds) == ("finished", None, 2)
    assert run.flower_run_id == "flower-1"
    assert export.directory == bench.home / "runs" / run.run_id / "adapter"
    version = bench.store.adapter_version(run.run_id, 2)
    tensors = adapter.from_bytes((export.directory / "adapter_model.safetensors").read_bytes())
    halves = [adapter.from_bytes(bench.artifacts.get(sha)) for sha in (version.client_sha256, version.trunk_sha256)]
    assert set(tensors) == set(halves[0]) | set(halves[1])
    assert all(tensors[name].equal(half[name]) for half in halves for name in half)
    record = json.loads((export.directory / "trunkline.json").read_text())
    assert record["adapter_sha256"] == export.adapter_sha256
    assert record["origin"]["run"] == run.run_id
    assert record["origin"]["round"] == 2
    assert record["origin"]["trunk_sha256"] == version.trunk_sha256
    losses = {row.number: row.value for row in bench.store.metrics(run.run_id)
              if row.name == "eval_loss" and row.node_id is None and row.attempt == 0}  # fmt: skip
    assert losses == {0: 5.0, 1: 4.0, 2: 3.0}


def test_equal_settings_give_equal_adapters(make_bench: MakeBench) -> None:
    first, again = make_bench().tell_shapes_ahead().conduct(), make_bench().tell_shapes_ahead().conduct()
    assert first.run_id != again.run_id
    assert first.adapter_sha256 == again.adapter_sha256
    assert make_bench(seed=1).tell_shapes_ahead().conduct().adapter_sha256 != first.adapter_sha256


def test_fifty_clients_of_which_some_fail_make_a_run(make_bench: MakeBench) -> None:
    bench = make_bench({node: 50 + node for node in range(1, 51)}, quorum=40)
    for node in (7, 23, 41):
        bench.grid.nodes[node] = FakeNode(lambda message: Error(1001, "OSError at the client"))
    bench.grid.nodes[50] = FakeNode(None)
    bench.tell_shapes_ahead().conduct()
    run = bench.store.get_run("last")
    assert run.status == "finished"
    counts = [row.status for row in bench.store.participations(run.run_id, 1)]
    assert (counts.count("trained"), counts.count("failed"), counts.count("late")) == (46, 3, 1)


def test_a_run_stops_early_when_the_held_out_loss_no_longer_falls(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60}, num_rounds=9, early_stopping_patience=2)
    for client in bench.clients.values():
        client.lost = lambda number: 3.0 if number == 1 else 4.0
    export = bench.tell_shapes_ahead().conduct()
    run = bench.store.get_run("last")
    assert (run.status, export.round) == ("finished", 4)  # round 4 brought the judgement of version 3
    assert run.reason == (
        "stopped early: no lower held-out loss in the last 2 rounds; "
        "round 1 has the lowest held-out loss (3.0000); `adapter export --best` takes it"
    )


# ---- runs that cannot start ------------------------------------------------------------------------------------------


def refused(bench: Bench, **values: ConfigValue) -> TrunklineError:
    with pytest.raises(TrunklineError) as caught:
        bench.conduct(**values)
    run = bench.store.get_run("last")
    assert (run.status, run.reason, run.committed_rounds) == ("failed", str(caught.value), 0)
    assert bench.grid.sent == []
    assert bench.store.adapter_versions(run.run_id) == []
    assert not (bench.home / "artifacts").exists()
    assert "\n" not in str(caught.value)
    return caught.value


def test_no_trunk_is_one_line_before_anything_is_written_or_sent(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: nothing answers there
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with caplog.at_level(logging.ERROR, "trunkline"):
            error = refused(make_bench(), trunk_address=address)
    assert isinstance(error, ConnectionFailedError)
    assert error.exit_code == 3
    assert str(error).startswith(f"trunk at {address} does not answer: start it with: trunkline trunk serve ")
    assert len([record for record in caplog.records if record.name.startswith("trunkline")]) == 1


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"head_layers": 2}, "head-layers is 2 in this run and 1 at the trunk"),
        ({"tail_layers": 2}, "tail-layers is 2 in this run and 1 at the trunk"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16 in this run and float32 at the trunk"),
        ({"attn_implementation": "eager"}, "attn-implementation is eager in this run and sdpa at the trunk"),
    ],
)
def test_a_trunk_that_serves_something_else_is_named_with_both_sides(
    make_bench: MakeBench, values: dict[str, ConfigValue], told: str
) -> None:
    error = refused(make_bench(), **values)
    assert isinstance(error, AgreementError)
    assert told in str(error)


def test_another_models_fingerprint_is_named_with_both_sides(make_bench: MakeBench, tmp_path: Path) -> None:
    from tests.server_trunk.conftest import save_llama

    bench = make_bench()
    other = save_llama(tmp_path / "other", seed=1)
    error = refused(bench, model=str(other))
    assert f"model fingerprint is {model_fingerprint(other)} in this run and" in str(error)
    assert str(model_fingerprint(bench.model)) in str(error)


def test_a_configuration_alone_is_model_enough(make_bench: MakeBench, tmp_path: Path) -> None:
    bench = make_bench().tell_shapes_ahead()
    (tmp_path / "config only").mkdir()
    shutil.copy(bench.model / "config.json", tmp_path / "config only")
    bench.conduct(model=str(tmp_path / "config only"))
    served = Trunk(bench.trunk.address).describe()
    assert bench.store.get_run("last").model_fingerprint == served.fingerprint


@pytest.mark.parametrize("model", ["", "some/model", "/nowhere"])
def test_a_model_that_is_not_there_is_refused_by_its_key(
    make_bench: MakeBench, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused(make_bench(), model=model)
    assert isinstance(error, ConfigError)
    assert str(error).startswith(
        f"model is {model!r}; it must be the absolute path of a directory that holds config.json"
    )


def test_of_a_hub_id_the_orchestrator_needs_the_configuration_alone(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench().tell_shapes_ahead()
    fetched: list[tuple[str, ...]] = []

    def download(*asked: str) -> str:
        fetched.append(asked)
        return str(bench.model / "config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    bench.conduct(model="some/model")
    assert fetched == [("some/model", "config.json")]


def test_an_unknown_key_is_refused_by_its_name(make_bench: MakeBench) -> None:
    assert "unknown config key 'learning-rat'" in str(refused(make_bench(), learning_rat=1.0))


# ---- runs that end under way -----------------------------------------------------------------------------------------


def test_a_run_without_clients_ends_with_that_reason(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.grid.nodes.clear()
    with pytest.raises(QuorumError):
        bench.conduct()
    run = bench.store.get_run("last")
    assert run.status == "failed"
    assert (run.reason or "").startswith("0 of 2 clients (quorum) connected within 10 s")


def test_a_round_without_a_quorum_fails_the_run_and_keeps_what_was_committed(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60}, num_rounds=3).tell_shapes_ahead()
    healthy = bench.clients[2]

    def dies_in_round_2(message: Message) -> Content:
        return Error(8) if message.metadata.group_id == "2" else healthy(message)

    bench.grid.nodes[2] = FakeNode(dies_in_round_2)
    with pytest.raises(QuorumError):
        bench.conduct()
    run = bench.store.get_run("last")
    assert (run.status, run.committed_rounds) == ("failed", 1)
    assert run.reason == (
        "round 2: 1 of 2 clients' updates can be used, quorum is 2; client 2: its ClientApp process died"
    )
    assert [row.status for row in bench.store.rounds(run.run_id)] == ["committed", "aborted"]


def test_a_fault_of_our_own_still_ends_the_run_in_sql(make_bench: MakeBench) -> None:
    bench = make_bench().tell_shapes_ahead()

    def fault(seconds: float) -> None:
        raise ZeroDivisionError("a fault")

    bench.clock.sleep = fault  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        bench.conduct()
    run = bench.store.get_run("last")
    assert (run.status, run.reason) == ("failed", "ZeroDivisionError: a fault")


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
def test_a_run_that_is_interrupted_is_stopped(make_bench: MakeBench, ending: type[BaseException]) -> None:
    bench = make_bench().tell_shapes_ahead()

    def interrupt(seconds: float) -> None:
        raise ending

    bench.clock.sleep = interrupt  # type: ignore[method-assign]
    with pytest.raises(ending):
        bench.conduct()
    assert bench.store.get_run("last").status == "stopped"


def test_a_process_that_is_told_to_end_can_still_record_it(make_bench: MakeBench) -> None:
    bench = make_bench().tell_shapes_ahead()
    endings: list[Callable[[], None]] = []
    plain = bench.start(bench.config.to_flower())
    start = type(plain)(
        plain.values, plain.flower_run_id, plain.mode, plain.grid, plain.store, plain.artifacts, plain.runs_dir,
        plain.clock, endings.append,
    )  # fmt: skip

    def ends_now(seconds: float) -> None:
        endings[0]()
        raise RuntimeError("the process goes on for a moment")

    bench.clock.sleep = ends_now  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        conduct(start)
    run = bench.store.get_run("last")
    assert (run.status, run.reason) == ("stopped", "the ServerApp was told to end, by a person or by Flower")
    endings[0]()
