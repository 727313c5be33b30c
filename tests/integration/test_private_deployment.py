"""A run with differential privacy through a real SuperLink and SuperNodes, each with a ledger of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aggregation.encoding import noise_scale
from aggregation.graph import full_threshold
from contract.config import ConfigValue, RunConfig
from contract.errors import BudgetError
from contract.privacy_records import Unit
from orchestrator.budget_cli import app
from privacy.accountant import count
from privacy.filters import admit
from privacy.plan import register_budget, round_releases
from storage.ledger import open_ledger_to_read
from storage.records import RunRow
from storage.store import open_store
from tests.clients.sites import save_site_model, write_texts
from tests.conftest import TrunkProcess
from trunkline.bundle import stage_app
from trunkline.flower import flower_environment, start_superlink, start_supernode, submit
from trunkline.processes import Supervisor

SITES, POOR = 4, 3
RUN_LIMIT_S = 400.0
pytestmark = [pytest.mark.deployment, pytest.mark.timeout(RUN_LIMIT_S + 60)]


def settings(model: Path, trunk_address: str) -> RunConfig:
    return RunConfig.from_flower(
        {
            "model": str(model),
            "trunk-address": trunk_address,
            "num-rounds": 2,
            "cohort-size": SITES,
            "quorum": 3,
            "eval-fraction": 0.0,
            "local-steps": 1,
            "per-device-train-batch-size": 2,
            "max-length": 16,
            "lora-r": 4,
            "dp": "client",
            "dp-noise-multiplier": 2.0,
            "trunk-adapter": "frozen",
            "metrics": "off",
        }
    )


def rounds_that_fit(config: RunConfig, epsilon: float) -> int:
    """How many rounds a budget of `epsilon` has room for, 3 for all that are more."""
    scale = noise_scale(config, SITES, full_threshold(SITES))
    budget = register_budget(config.model_copy(update={"dp_epsilon": epsilon}))
    releases = round_releases(config, scale=scale, size=1)
    for played in range(3):
        try:
            charged = {text: times * played for text, times in count(releases).items()}
            admit(budget, Unit("site", "notes", "client"), charged, releases)
        except BudgetError:
            return played
    return 3


def ended(flower_run_id: str, lines: Callable[[int], list[str]]) -> RunRow:
    deadline, store = time.monotonic() + RUN_LIMIT_S, open_store()
    while time.monotonic() < deadline:
        row = store.run_by_flower_id(flower_run_id)
        if row is not None and row.status != "running":
            return row
        time.sleep(0.2)
    raise AssertionError(lines(40))


def told(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_site_whose_own_budget_ends_sits_out_and_both_sides_ledgers_prove_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trunk_process: Callable[..., TrunkProcess]
) -> None:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    environment = {
        **flower_environment(tmp_path, threads=1),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    model = save_site_model(tmp_path / "model")
    config = settings(model, trunk_process(model, 1, 1).address)
    fitting = [eps / 20 for eps in range(20, 400) if rounds_that_fit(config, eps / 20) == 1]
    one_round = fitting[len(fitting) // 2]  # the price depends a little on how many values a round trains
    with Supervisor(tmp_path / "logs", environment) as supervisor:
        superlink = start_superlink(supervisor, simulation=False)
        for number in range(SITES):
            site: dict[str, ConfigValue] = {
                "model": str(model),
                "data": str(write_texts(tmp_path / f"{number}.jsonl", 20, number)),
                "name": f"site-{number}",
                "dataset": "notes",
                "state-dir": str(tmp_path / f"state-{number}"),
                "trunk-address": config.trunk_address,
                "secagg-min-members": SITES,
                "privacy-epsilon": one_round if number == POOR else 20.0,
                "privacy-delta": 1e-5,
            }
            start_supernode(supervisor, superlink, f"site-{number}", site)
        submission = submit(supervisor, stage_app(config, tmp_path / "app"), superlink)
        run = ended(submission.flower_run_id, submission.stream.last_lines)
    assert (run.status, run.committed_rounds) == ("finished", 2), run.reason

    for number in range(SITES):
        ledger = open_ledger_to_read(f"sqlite:///{tmp_path / f'state-{number}' / 'ledger.db'}")
        charges = [row for row in ledger.rows(Unit(f"site-{number}", "notes", "client")) if row.kind == "charge"]
        ledger.close()
        rounds = [1] if number == POOR else [1, 2]
        assert [row.round for row in charges if row.state == "COMMITTED"] == rounds, number
        assert [row.round for row in charges if row.state == "RESERVED"] == rounds, number
    store = open_store()
    statuses = {row.node_id: row.status for row in store.participations(run.run_id, 2)}
    assert sorted(statuses.values()) == ["failed", "trained", "trained", "trained"]

    told("verify")
    for number in range(SITES):
        report = tmp_path / f"report-{number}.json"
        told("verify", "--site", tmp_path / f"state-{number}")
        told("export", "--site", tmp_path / f"state-{number}", "--out", report)
        told("verify", "--heads", report)
