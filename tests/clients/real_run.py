"""A whole run in one process but for the trunk: the real orchestrator, real sites and their text, Flower's grid alone
is scripted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Message

from clients.app import app
from contract.config import ConfigValue, RunConfig
from orchestrator.export import Export
from orchestrator.run import Start, conduct
from storage.artifacts import ArtifactStore
from storage.ledger import open_ledger
from storage.store import open_store
from tests.clients.sites import Site
from tests.orchestrator.fakes import Content, FakeClock, FakeGrid, FakeNode


def conducted(home: Path, config: RunConfig, sites: list[Site]) -> Export:
    """Conduct a run of `config` over `sites`; SQL and files lie in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    clock, url = FakeClock(), f"sqlite:///{home / 'trunkline.db'}"
    grid = FakeGrid(clock, {site.node_id: FakeNode(_answering(site, config)) for site in sites})
    store, ledger = open_store(url), open_ledger(url)
    try:
        return conduct(
            Start(
                config.to_flower(), "flower-1", "deployment", grid, store, ArtifactStore(home / "artifacts"),
                home / "runs", clock, ledger=ledger,
            )
        )  # fmt: skip
    finally:
        store.close()
        ledger.close()


def settings(model: Path, trunk_address: str, **values: ConfigValue) -> RunConfig:
    """A run of one short round for sites of `tests.clients.sites`; `values` are snake_case."""
    told = {name.replace("_", "-"): value for name, value in values.items()}
    return RunConfig.from_flower(
        {
            "secagg": "off", "quorum": 1, "num-rounds": 1, "local-steps": 2, "per-device-train-batch-size": 2,
            "max-length": 16, "eval-fraction": 0.25, "lora-r": 4, "model": str(model), "trunk-address": trunk_address,
            **told,
        }
    )  # fmt: skip


def _answering(site: Site, config: RunConfig) -> Callable[[Message], Content]:
    def answer(message: Message) -> Content:
        reply = app(message, site.context(config))
        return reply.error if reply.has_error() else reply.content

    return answer
