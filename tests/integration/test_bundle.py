"""A run from Flower's bundle alone: no process of the run can import anything from the checkout."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from contract.config import RunConfig
from demo.settings import MODEL_DIR
from storage.store import open_store
from tests.conftest import TrunkProcess
from trunkline.bundle import stage_app
from trunkline.flower import flower_environment, start_superlink, start_supernode, submit
from trunkline.processes import Supervisor

CHECKOUT = Path(__file__).resolve().parents[2]
RUN_LIMIT_S = 400.0

GUARD = """
import importlib.abc, importlib.machinery, sys

CHECKOUT = {checkout!r}
MOVED = ("contract", "aggregation", "privacy", "storage", "clients", "orchestrator", "demo", "trunkline")

class MovedAway(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in MOVED:
            return None
        entries = [entry for entry in sys.path if entry and not entry.startswith(CHECKOUT)]
        spec = importlib.machinery.PathFinder.find_spec(name, entries)
        if spec is None:
            raise ModuleNotFoundError(f"{{name}} is in the checkout only, which was moved away", name=name)
        return spec

sys.meta_path.insert(0, MovedAway())
"""


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """Owns processes from which the checkout is out of reach, as if it had been moved away."""
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD.format(checkout=str(CHECKOUT)))
    home = tmp_path / "home"
    monkeypatch.setenv("TRUNKLINE_HOME", str(home))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    environment = flower_environment(tmp_path, threads=1)
    return Supervisor(tmp_path / "logs", {**environment, "PYTHONPATH": str(guard)})


def write_site(directory: Path, name: str) -> dict[str, str | int]:
    """A site's own model and text; answers its node config."""
    model, data = directory / name / "model", directory / name / "notes.jsonl"
    shutil.copytree(MODEL_DIR, model)
    rows = [{"text": f"{name} writes note {number} about its own work and keeps it at home."} for number in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": str(model), "data": str(data), "name": name, "secagg-min-members": 2}


@pytest.mark.deployment
@pytest.mark.timeout(RUN_LIMIT_S + 60)
def test_a_run_needs_nothing_but_its_bundle_and_the_node_configs(
    supervisor: Supervisor, tmp_path: Path, trunk_process: Callable[..., TrunkProcess]
) -> None:
    trunk = trunk_process(MODEL_DIR, 1, 1)
    sites = [write_site(tmp_path, name) for name in ("north", "south")]
    config = RunConfig.from_flower(
        {
            "model": sites[0]["model"],
            "trunk-address": trunk.address,
            "num-rounds": 1,
            "eval-fraction": 0.0,
            "local-steps": 2,
            "per-device-train-batch-size": 2,
            "max-length": 32,
        }
    )
    with supervisor:
        superlink = start_superlink(supervisor, simulation=False)
        for number, site in enumerate(sites):
            start_supernode(supervisor, superlink, f"site-{number}", {**site, "trunk-address": trunk.address})
        app = stage_app(config, tmp_path / "app")
        submission = submit(supervisor, app, superlink)
        shutil.rmtree(app)
        store = open_store()
        deadline = time.monotonic() + RUN_LIMIT_S
        while (row := store.run_by_flower_id(submission.flower_run_id)) is None or row.status == "running":
            assert submission.stream.alive() or row is not None, submission.stream.last_lines(40)
            assert time.monotonic() < deadline, submission.stream.last_lines(40)
            time.sleep(0.5)
    assert (row.status, row.committed_rounds) == ("finished", 1), (row.reason, submission.stream.last_lines(40))
    assert (tmp_path / "home" / "runs" / row.run_id / "adapter" / "adapter_model.safetensors").is_file()


def test_the_guard_keeps_the_checkout_out_of_reach(supervisor: Supervisor, tmp_path: Path) -> None:
    with supervisor:
        found = supervisor.start("probe", [sys.executable, "-c", "import contract.errors"])
        while found.alive():
            time.sleep(0.05)
        assert "moved away" in found.last_lines()
