"""Secure sums through a real SuperLink and real SuperNodes, of which some are killed: each round commits, rightly.

What is right is computed apart: the same sites train again from the same adapter, in clear, within the test.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from aggregation.graph import full_threshold
from aggregation.ring import plan
from contract.config import RunConfig
from orchestrator.adapters import ClientPart
from storage.artifacts import ArtifactStore
from storage.records import RunRow
from storage.store import Store, open_store
from tests.clients.sites import Orchestrator, Site, save_site_model, write_texts
from tests.conftest import TrunkProcess
from tests.orchestrator.conftest import inside_a_flower_task
from trunkline.bundle import stage_app
from trunkline.flower import Submission, flower_environment, start_superlink, start_supernode, submit
from trunkline.processes import Daemon, Supervisor

RUN_LIMIT_S = 400.0
pytestmark = [pytest.mark.killing, pytest.mark.timeout(RUN_LIMIT_S + 60)]


@dataclass
class Federation:
    """A SuperLink, its SuperNodes, and the run that is killed into."""

    store: Store
    nodes: list[Daemon]
    logs: list[Path]
    configs: list[dict[str, str | int | bool]]
    submission: Submission

    def row(self) -> RunRow | None:
        return self.store.run_by_flower_id(self.submission.flower_run_id)

    def kill(self, number: int) -> None:
        """SIGKILL for the SuperNode and all that it started."""
        os.killpg(self.nodes[number].process.pid, signal.SIGKILL)

    def node_id(self, number: int) -> int:
        """Flower's, as the SuperNode's own log tells it."""
        found = re.search(r"SuperNode ID: (\d+)", self.nodes[number].log_path.read_text())
        assert found is not None
        return int(found[1])

    def sent(self, number: int, message: str) -> bool:
        """Whether the site's own wire log says that it sent such a message."""
        log = self.logs[number]
        return log.exists() and any(json.loads(line)["message"] == message for line in log.read_text().splitlines())

    def phase(self) -> str:
        row = self.row()
        rounds = self.store.rounds(row.run_id) if row else []
        return rounds[-1].phase if rounds else ""

    def until(self, happens: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + RUN_LIMIT_S
        while not happens():
            row = self.row()
            assert row is None or row.status == "running", (what, row.reason, self.submission.stream.last_lines(40))
            assert time.monotonic() < deadline, (what, self.submission.stream.last_lines(40))
            time.sleep(0.02)

    def end(self) -> RunRow:
        self.until(lambda: (row := self.row()) is not None and row.committed_rounds == 1, "the round's commit")
        row = self.row()
        assert row is not None
        return row


@pytest.fixture
def federation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trunk_process: Callable[..., TrunkProcess]
) -> Iterator[Callable[[int], Federation]]:
    """`federation(sites)`: a deployment that has been told to play one round."""
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    checkout = Path(__file__).resolve().parents[2]
    environment = {**flower_environment(tmp_path, threads=1), "PYTHONPATH": str(checkout)}
    model = save_site_model(tmp_path / "model")
    trunk = trunk_process(model, 1, 1)
    with Supervisor(tmp_path / "logs", environment) as supervisor:

        def started(sites: int) -> Federation:
            superlink = start_superlink(supervisor, simulation=False)
            nodes, logs, configs = [], [], []
            for number in range(sites):
                logs.append(tmp_path / f"wire-{number}.jsonl")
                site: dict[str, str | int | bool] = {
                    "model": str(model),
                    "data": str(write_texts(tmp_path / f"{number}.jsonl", 20, number)),
                    "trunk-address": trunk.address,
                    "wire-log": str(logs[-1]),
                    "secagg-min-members": sites,
                    "secagg-min-threshold": full_threshold(sites),
                }
                configs.append(site)
                nodes.append(start_supernode(supervisor, superlink, f"site-{number}", site))
            config = settings(model, trunk.address, sites)
            submission = submit(supervisor, stage_app(config, tmp_path / "app"), superlink)
            return Federation(open_store(), nodes, logs, configs, submission)

        yield started


def settings(model: Path, trunk_address: str, sites: int) -> RunConfig:
    return RunConfig.from_flower(
        {
            "model": str(model),
            "trunk-address": trunk_address,
            "num-rounds": 1,
            "cohort-size": sites,
            "quorum": 2,
            "eval-fraction": 0.0,
            "local-steps": 2,
            "per-device-train-batch-size": 2,
            "max-length": 16,
            "lora-r": 4,
            # While all sites load torch at once, nobody makes progress.
            "round-timeout-s": 25.0 if sites == 4 else 60.0,
            "secagg-stage-timeout-s": 15.0 if sites == 4 else 30.0,
        }
    )


def check_committed(federation: Federation, clients: int, survivors: set[int]) -> None:
    """One attempt, and its adapter is what the survivors, and nobody else, give when they train again in clear."""
    row = federation.end()
    (attempt,) = federation.store.rounds(row.run_id)
    assert (attempt.status, attempt.threshold) == ("committed", full_threshold(clients))
    statuses = {int(one.node_id): one.status for one in federation.store.participations(row.run_id, 1)}
    nodes = [federation.node_id(number) for number in range(clients)]
    assert {number for number, node_id in enumerate(nodes) if statuses[node_id] == "trained"} == survivors
    config = RunConfig.from_flower({**row.config, "secagg": "off"})
    artifacts = ArtifactStore(Path(os.environ["TRUNKLINE_HOME"]) / "artifacts")
    sha256 = federation.store.adapter_version(row.run_id, 1).client_sha256
    found_d = ClientPart.from_bytes(artifacts.get(sha256)).vector_d.astype(np.float64)

    def in_clear(numbers: list[int]) -> tuple[np.ndarray, int]:
        again = Orchestrator(config, Path(config.model), config.trunk_address, run=row.run_id)
        sites = [Site(nodes[number], dict(federation.configs[number])) for number in numbers]
        with inside_a_flower_task():
            version = again.round(again.first(), sites)
        return version.client.vector_d.astype(np.float64), sum(again.weights.values())

    expected_d, weight = in_clear(sorted(survivors))
    assert weight == attempt.trained_tokens
    bound = plan(clients, config.max_trained_tokens(), config.update_clip).error_bound(len(survivors), weight)
    assert np.abs(found_d - expected_d).max() <= 3 * bound + 1e-7
    without_one_d, _ = in_clear(sorted(survivors)[1:])
    assert np.abs(found_d - without_one_d).max() > 30 * bound + 1e-6, "a client more or less would not show"


def test_four_sites_of_which_one_is_killed_before_its_upload(federation: Callable[[int], Federation]) -> None:
    running = federation(4)
    running.until(lambda: running.sent(3, "forward"), "the first step of site 3")
    running.kill(3)
    assert not running.sent(3, "train.round")
    check_committed(running, 4, {0, 1, 2})


def test_four_sites_of_which_one_is_killed_after_its_upload(federation: Callable[[int], Federation]) -> None:
    running = federation(4)
    running.until(lambda: running.phase() == "confirming", "the second exchange")
    running.kill(3)
    check_committed(running, 4, {0, 1, 2, 3})


def test_seven_sites_of_which_one_is_killed_before_and_one_after(federation: Callable[[int], Federation]) -> None:
    running = federation(7)
    running.until(lambda: running.sent(5, "forward"), "the first step of site 5")
    running.kill(5)
    assert not running.sent(5, "train.round")
    running.until(lambda: running.phase() == "confirming", "the second exchange")
    running.kill(6)
    check_committed(running, 7, {0, 1, 2, 3, 4, 6})
