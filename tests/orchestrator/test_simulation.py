"""A run on Flower's own simulation engine, with real clients and a real trunk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from contract.adapter import from_bytes
from contract.config import RunConfig
from storage.artifacts import ArtifactStore
from storage.records import RunRow
from storage.store import open_reader, open_store
from tests.clients.sites import save_site_model, write_texts
from trunkline.bundle import stage_app
from trunkline.flower import SuperLinkAddress, end_status, simulation_config, start_superlink, submit
from trunkline.processes import Supervisor
from trunkline.workplace import Workplace, open_workplace, start_trunk

LIMIT_S = 240.0
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("simulation") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUNKLINE_HOME", str(home))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
        yield home


@pytest.fixture(scope="module")
def settings(home: Path) -> RunConfig:
    """Three virtual clients, the last of which has no data."""
    model = save_site_model(home.parent / "model")
    for number in range(2):
        write_texts(home.parent / f"{number}.jsonl", 40, number)
    return RunConfig.from_flower(
        {
            "model": str(model),
            "data": str(home.parent / "{partition}.jsonl"),
            "secagg": "off",
            "num-rounds": 2,
            "cohort-size": 3,
            "quorum": 2,
            "local-steps": 2,
            "max-length": 16,
            "lora-r": 4,
            "learning-rate": 0.01,
        }
    )


@pytest.fixture(scope="module")
def workplace(home: Path) -> Iterator[Workplace]:
    with open_workplace(2) as opened:
        yield opened


@pytest.fixture(scope="module")
def superlink(workplace: Workplace) -> SuperLinkAddress:
    return start_superlink(workplace.supervisor, simulation=True)


def played(
    workplace: Workplace, superlink: SuperLinkAddress, config: RunConfig, name: str, clients: int = 3
) -> tuple[RunRow, str, str]:
    """(our row, what `flwr run --stream` printed, what Flower says of the run) once both have ended."""
    app = stage_app(config, workplace.directory / name)
    open_store().close()
    # A supervisor of its own: each run's log must be a file of its own.
    with Supervisor(workplace.directory / f"{name}-logs", workplace.supervisor.environment) as supervisor:
        submission = submit(supervisor, app, superlink, simulation_config(clients, 2))
        deadline = time.monotonic() + LIMIT_S
        while submission.stream.alive():
            assert time.monotonic() < deadline, submission.stream.last_lines(40)
            time.sleep(0.1)
        log = submission.stream.log_path.read_text(errors="replace")
        status, details = end_status(supervisor, superlink, submission.flower_run_id)
    row = open_reader().run_by_flower_id(submission.flower_run_id)
    assert row is not None, log
    return row, log, f"{status}: {details}"


@pytest.mark.simulation
@pytest.mark.timeout(LIMIT_S + 60)
def test_a_simulated_run_commits_its_rounds_without_the_client_that_fails(
    workplace: Workplace, superlink: SuperLinkAddress, settings: RunConfig, home: Path
) -> None:
    trunk = start_trunk(workplace, settings, settings.model)
    config = settings.model_copy(update={"trunk_address": trunk.address(workplace.supervisor)})
    row, log, told = played(workplace, superlink, config, "app")
    assert (row.status, row.mode, row.committed_rounds) == ("finished", "simulation", 2), log[-3000:]
    assert told.startswith("finished:completed")
    reader = open_reader()
    for number in (1, 2):
        found = {part.status: part for part in reader.participations(row.run_id, number)}
        assert sorted(part.status for part in reader.participations(row.run_id, number)) == ["failed", *["trained"] * 2]
        assert "2.jsonl" in (found["failed"].reason or "")
        assert "\n" not in (found["failed"].reason or "")
        assert found["trained"].metrics["steps"] == 2
    rounds = reader.rounds(row.run_id)
    assert [attempt.steps for attempt in rounds] == [4, 4]
    assert all(attempt.received_bytes > 0 and attempt.sent_bytes > 0 for attempt in rounds)
    losses = {
        (m.number, m.node_id): m.value for m in reader.metrics(row.run_id) if m.name == "eval_loss" and not m.attempt
    }
    assert losses[2, None] < losses[0, None]
    artifacts = ArtifactStore(home / "artifacts")
    first, last = (reader.adapter_version(row.run_id, number) for number in (0, 2))
    for side in ("client_sha256", "trunk_sha256"):
        drawn, trained = (from_bytes(artifacts.get(getattr(version, side))) for version in (first, last))
        assert all(drawn[name].equal(trained[name]) for name in drawn if "lora_A" in name)
        assert not any(drawn[name].equal(trained[name]) for name in drawn if "lora_B" in name)
    assert (home / "runs" / row.run_id / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.simulation
@pytest.mark.timeout(LIMIT_S + 60)
def test_a_run_without_a_trunk_says_so_in_one_line_to_who_started_it(
    workplace: Workplace, superlink: SuperLinkAddress, settings: RunConfig
) -> None:
    row, log, told = played(workplace, superlink, settings.model_copy(update={"trunk_address": "127.0.0.1:1"}), "none")
    line = "trunk at 127.0.0.1:1 does not answer: start it with: trunkline trunk serve "
    assert row.status == "failed"
    assert (row.reason or "").startswith(line)
    assert told.startswith("finished:failed")
    assert line in told
    assert any(f"trunkline: run {row.run_id} failed: {line}" in text for text in log.splitlines())


@pytest.mark.simulation
@pytest.mark.timeout(LIMIT_S + 60)
def test_twenty_clients_sum_under_masks_and_one_without_data_costs_nothing_but_itself(
    workplace: Workplace, superlink: SuperLinkAddress, settings: RunConfig, home: Path
) -> None:
    data = home.parent / "twenty"
    data.mkdir()
    for number in range(19):
        write_texts(data / f"{number}.jsonl", 12, number)
    trunk = start_trunk(workplace, settings, settings.model)
    config = settings.model_copy(
        update={
            "trunk_address": trunk.address(workplace.supervisor),
            "secagg": "on",
            "eval_fraction": 0.0,
            "data": str(data / "{partition}.jsonl"),
            "cohort_size": 20,
            "quorum": 19,
        }
    )
    row, log, told = played(workplace, superlink, config, "twenty", clients=20)
    assert (row.status, row.committed_rounds) == ("finished", 2), log[-3000:]
    assert told.startswith("finished:completed")
    reader = open_reader()
    for attempt in reader.rounds(row.run_id):
        assert (attempt.status, attempt.threshold) == ("committed", 14)
        parts = reader.participations(row.run_id, attempt.number)
        assert sorted(part.status for part in parts) == ["failed", *["trained"] * 19]
        assert all(dict(part.metrics) == {} for part in parts)
        (failed,) = [part for part in parts if part.status == "failed"]
        assert failed.reason == "DataError at the client; its log says more"
    values = {(m.number, m.attempt, m.name): m.value for m in reader.metrics(row.run_id)}
    assert values[1, 1, "steps"] == values[2, 1, "steps"] == 38
    assert values[1, 1, "train_loss"] > 0
    assert not (home / "simulated").exists() or not list((home / "simulated").iterdir())
