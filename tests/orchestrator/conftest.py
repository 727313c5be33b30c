"""What an orchestrator works with, real except for Flower, for time and for the clients' training."""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from contract.config import ConfigValue, RunConfig
from contract.model_files import resolve_model
from contract.records import CutLayers
from orchestrator.adapters import ClientPart, draw_first_adapter
from orchestrator.desk import Desk, Version
from orchestrator.exchange import Exchange
from orchestrator.export import Export
from orchestrator.replicas import connect
from orchestrator.run import Start, conduct, first_version, new_run_id
from server_trunk.contributions import Contributions
from server_trunk.server import ServeOptions
from storage.artifacts import ArtifactStore
from storage.store import Store, open_store
from tests.orchestrator.budget_cases import fill_home, fill_site
from tests.orchestrator.fakes import FakeClock, FakeGrid, FakeNode, ScriptedClient
from tests.server_trunk.conftest import RunningTrunk, save_llama

SETTINGS: dict[str, ConfigValue] = {
    "secagg": "off",
    "quorum": 2,
    "num-rounds": 2,
    "lora-r": 4,
    "local-steps": 2,
    "max-length": 16,
    "per-device-train-batch-size": 4,
    "round-timeout-s": 30.0,
    "node-wait-s": 10.0,
}


@contextmanager
def inside_a_flower_task() -> Iterator[None]:
    """Flower builds messages only inside one of its tasks."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_run_id", "_task_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield


@pytest.fixture(autouse=True)
def _flower_task() -> Iterator[None]:
    with inside_a_flower_task():
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@dataclass(frozen=True)
class LiveTrunk:
    """A real trunk on the wire, and its disk, where scripted clients leave what they trained."""

    address: str
    contributions: Contributions


@pytest.fixture(scope="session")
def live_trunk(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveTrunk]:
    state_dir = tmp_path_factory.mktemp("trunk")
    running = RunningTrunk(ServeOptions(str(tiny_model), CutLayers(1, 1), "127.0.0.1:0", state_dir, device="cpu"))
    yield LiveTrunk(running.address, Contributions(state_dir))
    running.stop()


@dataclass
class Bench:
    """One run's surroundings; `clients` train by arithmetic, `nodes` answer for them."""

    config: RunConfig
    clock: FakeClock
    grid: FakeGrid
    store: Store
    artifacts: ArtifactStore
    trunk: LiveTrunk
    model: Path
    home: Path
    clients: dict[int, ScriptedClient] = field(default_factory=dict)

    def add_clients(self, weights: dict[int, int]) -> None:
        for node_id, weight in weights.items():
            client = ScriptedClient(self.config, self.trunk.contributions, weight)
            self.clients[node_id] = client
            self.grid.nodes[node_id] = FakeNode(client)

    def desk(self) -> Desk:
        """A run that was created and has its first adapter yet to come. The trunk is shared, so its id is new."""
        run_id = new_run_id(datetime.now(UTC))
        self.store.create_run(run_id, "flower-1", self.config.to_flower(), "simulation", "f" * 64)
        exchange = Exchange(self.grid, self.clock)
        trunk = connect(self.trunk.address)
        return Desk(run_id, self.config, exchange, trunk, self.store, self.artifacts, self.clock)

    def first(self, desk: Desk) -> Version:
        version = first_version(desk, self.model)
        self.tell_shapes(version.client)
        return version

    def tell_shapes(self, part: ClientPart) -> None:
        """Scripted clients load no model, so they are told what it holds."""
        for client in self.clients.values():
            client.client_names = part.names
            client.client_sizes = {name: _size(part.shapes[name]) for name in part.names}

    def conduct(self, **values: ConfigValue) -> Export:
        """A whole run with this bench's settings and `values` on top (snake_case)."""
        told = {**self.config.to_flower(), **{key.replace("_", "-"): value for key, value in values.items()}}
        return conduct(self.start(told))

    def tell_shapes_ahead(self) -> Bench:
        """Let the scripted clients know the adapter's shapes before the run draws it."""
        self.tell_shapes(ClientPart.from_bytes(draw_first_adapter(self.config, self.model).client))
        return self

    def start(self, values: dict[str, ConfigValue]) -> Start:
        runs_dir = self.home / "runs"
        return Start(values, "flower-1", "simulation", self.grid, self.store, self.artifacts, runs_dir, self.clock)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def make_bench_at(
    home: Path,
    model: Path,
    trunk: LiveTrunk,
    weights: dict[int, int],
    settings: dict[str, ConfigValue],
    *,
    store: Store | None = None,
) -> Bench:
    """A bench whose SQL, unless a `store` is given, and artifacts lie in `home`; `settings` are snake_case."""
    told = {key.replace("_", "-"): value for key, value in settings.items()}
    where: dict[str, ConfigValue] = {"model": str(resolve_model(model)), "trunk-address": trunk.address}
    clock = FakeClock()
    store = store or open_store(f"sqlite:///{home / 'trunkline.db'}")
    bench = Bench(
        RunConfig.from_flower({**SETTINGS, **where, **told}), clock, FakeGrid(clock, {}), store,
        ArtifactStore(home / "artifacts"), trunk, model, home,
    )  # fmt: skip
    bench.add_clients(weights)
    return bench


@pytest.fixture
def make_bench(
    tiny_model: Path, live_trunk: LiveTrunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Bench]]:
    """`make_bench({node_id: weight}, **settings)`; the home directory is the test's own."""
    home = tmp_path / "home"
    monkeypatch.setenv("TRUNKLINE_HOME", str(home))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    made: list[Bench] = []

    def make(weights: dict[int, int] | None = None, **settings: ConfigValue) -> Bench:
        made.append(make_bench_at(home, tiny_model, live_trunk, weights or {1: 100, 2: 60, 3: 20}, settings))
        return made[-1]

    yield make
    for bench in made:
        bench.store.close()


@pytest.fixture
def ledger_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of an operator who is called ada."""
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    return tmp_path / "home"


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home and a site with what a client-level run left in their ledgers; to be copied, never changed."""
    made = tmp_path_factory.mktemp("filled")
    for name, fill in (("home", fill_home), ("site", fill_site)):
        (made / name).mkdir()
        fill(made / name)
    return made


@pytest.fixture
def spent(ledger_home: Path, filled: Path) -> None:
    """The home has that run in its ledger."""
    shutil.copytree(filled / "home", ledger_home)


@pytest.fixture
def site(tmp_path: Path, filled: Path) -> Path:
    """That run's site."""
    return Path(shutil.copytree(filled / "site", tmp_path / "site"))
