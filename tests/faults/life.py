"""One life of an orchestrator that a test may have killed: it begins a run, or goes on with the one that it finds.

The orchestrator, its SQL, its artifacts, the secure sum's client halves with their vaults and the trunk are the real
ones; Flower's grid and the clients' training are scripted, so that a life is a second and not a minute.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contract import failpoint
from contract.config import ConfigValue
from orchestrator.replicas import connect
from orchestrator.run import Start, conduct
from server_trunk.contributions import Contributions
from storage.ledger import Ledger, open_ledger
from storage.store import Store, open_store, utc_now
from tests.orchestrator.conftest import Bench, LiveTrunk, inside_a_flower_task, make_bench_at
from tests.orchestrator.fakes import FakeNode
from tests.orchestrator.secure_fakes import SecureClient
from tests.storage.ledger_cases import Key

WEIGHTS = {1: 100, 2: 60, 3: 20}
_SECURE: Mapping[str, ConfigValue] = {"secagg": "on", "num_rounds": 2}
SCENARIOS: Mapping[str, Mapping[str, ConfigValue]] = {
    "plain": {"secagg": "off", "num_rounds": 2, "deterministic": True},
    "secure": {**_SECURE, "deterministic": True},
    "private": {**_SECURE, "dp": "client", "trunk_adapter": "frozen", "metrics": "off", "dp_noise_multiplier": 4.0},
}
"""Settings by name. Under `private` noise is drawn anew in each attempt, so that no two runs have equal adapters."""


@dataclass(frozen=True)
class Place:
    """Where the lives of one run are lived: all that outlasts them. `trunk` is the address of one that serves on."""

    scenario: str
    home: str
    url: str
    model: str
    trunk: str
    trunk_state: str

    @property
    def answer(self) -> Path:
        return Path(self.home) / "answer.json"


def live(place: Place, order: str, generation: int) -> None:
    """Conduct what is to be conducted; `order` is a failpoint's. `generation` counts the lives, an hour apart."""
    logging.getLogger("trunkline").setLevel(logging.ERROR)
    os.environ["TRUNKLINE_HOME"] = place.home
    os.environ.pop("TRUNKLINE_DATABASE_URL", None)

    def clock() -> datetime:
        return utc_now() + timedelta(hours=generation)

    signer = Key()
    store, ledger = open_store(place.url, clock, signer), open_ledger(place.url, clock, signer)
    before = store.list_runs(1)
    resumed = before[0].run_id if before and before[0].status != "finished" else ""
    bench = _bench(place, store, resumed)
    if resumed or not before:
        failpoint.arm(order)
        with inside_a_flower_task():
            conduct(
                Start(
                    bench.config.to_flower(), f"flower-{generation}", "simulation", bench.grid, store, bench.artifacts,
                    Path(place.home) / "runs", bench.clock, ledger=ledger,
                )
            )  # fmt: skip
    failpoint.arm("")
    place.answer.write_text(json.dumps(_told(bench, store, ledger)), encoding="utf-8")


def _bench(place: Place, store: Store, resumed: str) -> Bench:
    trunk = LiveTrunk(place.trunk, Contributions(Path(place.trunk_state)))
    settings = {**SCENARIOS[place.scenario], "resume_run": resumed}
    bench = make_bench_at(Path(place.home), Path(place.model), trunk, WEIGHTS, settings, store=store)
    bench.tell_shapes_ahead()
    if bench.config.secagg == "on":
        fingerprint = connect(place.trunk).describe().fingerprint
        for number, scripted in list(bench.clients.items()):
            client = SecureClient(
                bench.config, trunk.contributions, scripted.weight, node_id=number, home=bench.home / "sites",
                identity=Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"site %d" % number).digest()),
                client_names=scripted.client_names, client_sizes=scripted.client_sizes, fingerprint=fingerprint,
            )  # fmt: skip
            bench.clients[number], bench.grid.nodes[number] = client, FakeNode(client)
    return bench


def _told(bench: Bench, store: Store, ledger: Ledger) -> dict[str, object]:
    """What came of the run, and what is wrong with what it left."""
    run = store.get_run("last")
    rounds = store.rounds(run.run_id)
    versions = [[row.number, row.client_sha256, row.trunk_sha256] for row in store.adapter_versions(run.run_id)]
    wrong = [str(fault) for fault in ledger.verify()]
    wrong += [f"round {row.number} is {row.status}" for row in rounds if row.status == "open"]
    for _, *halves in versions:
        wrong += [f"artifact {sha256} is gone" for sha256 in halves if not bench.artifacts.get(str(sha256))]
    if bench.config.dp != "off":
        wrong += _unpaid(store, ledger, run.run_id)
    return {
        "run": run.run_id,
        "status": run.status,
        "runs": len(store.list_runs()),
        "attempts": [[row.number, row.attempt, row.status] for row in rounds],
        "versions": versions,
        "wrong": wrong,
    }


def _unpaid(store: Store, ledger: Ledger, run_id: str) -> list[str]:
    """Who is in a committed sum without a committed charge, or was asked to train and has none at all."""
    wrong = []
    states = {
        (row.client, row.round, row.attempt): row.state
        for unit in ledger.units()
        for row in ledger.rows(unit)
        if row.kind == "charge"
    }
    committed = {(row.number, row.attempt) for row in store.rounds(run_id) if row.status == "committed"}
    for part in store.participations(run_id):
        state = states.get((f"client-{part.node_id}", part.number, part.attempt))
        due = ("COMMITTED",) if (part.number, part.attempt) in committed else ("RESERVED", "COMMITTED")
        if part.status == "trained" and state not in due:
            wrong.append(f"client {part.node_id} trained in {part.number}, attempt {part.attempt}, and paid {state}")
    return wrong
