"""One life of an orchestrator that a test may have killed: it begins a run, or goes on with the one that it finds.

The orchestrator, its SQL, its artifacts, the secure sums with the clients' vaults, and the trunk are the real ones;
Flower's grid is scripted, so that a life is a second and not a minute. Where the trunk or a site is killed the sites
are real, too; else their training is arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import clients.replay
import orchestrator.trunk
from contract import failpoint
from contract.errors import TrunklineError
from contract.records import RoundKey
from orchestrator.replicas import connect
from orchestrator.run import Start, conduct
from server_trunk.contributions import Contributions
from storage.ledger import Ledger, open_ledger, open_ledger_to_read
from storage.records import RunRow
from storage.store import Store, open_store, utc_now
from tests.faults.oracle import Oracle
from tests.faults.real_site import RELEASED, RealSite, make_site
from tests.faults.scenarios import SCENARIOS, Scenario
from tests.orchestrator.conftest import Bench, LiveTrunk, inside_a_flower_task, make_bench_at
from tests.orchestrator.fakes import FakeNode
from tests.orchestrator.secure_fakes import SecureClient
from tests.storage.ledger_cases import Key

WEIGHTS = {1: 100, 2: 60, 3: 20}
VICTIM = 2
"""Which of the sites is killed where one is."""
REFUSED = 3
"""A life's exit code where the run ended with an error of our own, such as a trunk that was not there."""
_LOOK_S = 0.05


@dataclass(frozen=True)
class Place:
    """Where the lives of one run are lived: all that outlasts them. `trunk` is the address of the run's.

    The trunk at `oracle` is never killed; `memory` is what all runs know of what rounds come to.
    """

    scenario: str
    home: str
    url: str
    model: str
    trunk: str
    trunk_state: str
    oracle: str
    memory: str

    @property
    def answer(self) -> Path:
        return Path(self.home) / "answer.json"


def live(place: Place, order: str, generation: int) -> None:
    """Conduct what is to be conducted; `order` is a failpoint's. `generation` counts the lives, an hour apart."""
    logging.getLogger("trunkline").setLevel(logging.CRITICAL)
    logging.getLogger("trunkline").addHandler(logging.NullHandler())
    os.environ["TRUNKLINE_HOME"] = place.home
    os.environ.pop("TRUNKLINE_DATABASE_URL", None)
    torch.set_num_threads(1)
    clients.replay.LOOK_S = orchestrator.trunk.LOOK_S = _LOOK_S

    def clock() -> datetime:
        return utc_now() + timedelta(hours=generation)

    signer, scenario = Key(), SCENARIOS[place.scenario]
    store, ledger = open_store(place.url, clock, signer), open_ledger(place.url, clock, signer)
    before = store.list_runs(1)
    resumed = before[0].run_id if before and _goes_on(before[0]) else ""
    bench = _real_bench(place, scenario, store, resumed, order) if scenario.sites else _bench(place, store, resumed)
    if not before or before[0].status != "finished":
        failpoint.arm(order if scenario.party == "orchestrator" else "")
        with inside_a_flower_task():
            try:
                conduct(
                    Start(
                        bench.config.to_flower(), f"flower-{generation}",
                        "deployment" if scenario.sites else "simulation", bench.grid, store, bench.artifacts,
                        Path(place.home) / "runs", bench.clock, ledger=ledger,
                    )
                )  # fmt: skip
            except TrunklineError as error:
                sys.stderr.write(f"{place.scenario}: {error}\n")
                sys.exit(REFUSED)
    failpoint.arm("")
    place.answer.write_text(json.dumps(_told(place, bench, store, ledger)), encoding="utf-8")


def _goes_on(run: RunRow) -> bool:
    """Whether a run is to be resumed; one that was refused before it began is started anew."""
    return run.status != "finished" and bool(run.model_fingerprint)


def _bench(place: Place, store: Store, resumed: str) -> Bench:
    trunk = LiveTrunk(place.trunk, Contributions(Path(place.trunk_state)))
    settings = {**SCENARIOS[place.scenario].settings, "resume_run": resumed}
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


def _real_bench(place: Place, scenario: Scenario, store: Store, resumed: str, order: str) -> Bench:
    """As `_bench`, over sites that train for real; the victim's messages are answered each by its own process."""
    trunk = LiveTrunk(place.trunk, Contributions(Path(place.trunk_state)))
    settings = {**scenario.settings, "resume_run": resumed}
    home = Path(place.home)
    bench = make_bench_at(home, Path(place.model), trunk, {}, settings, store=store)
    for number in range(1, scenario.sites + 1):
        site = make_site(number, Path(place.model), place.trunk, home, scenario.sites)
        told = order if order and scenario.party == "site" and number == VICTIM else None
        bench.grid.nodes[number] = FakeNode(RealSite(site, bench.config, home, told, scenario.again))
    return bench


def _told(place: Place, bench: Bench, store: Store, ledger: Ledger) -> dict[str, object]:
    """What came of the run, and what is wrong with what it left."""
    run = store.get_run("last")
    rounds = store.rounds(run.run_id)
    versions = [[row.number, row.client_sha256, row.trunk_sha256] for row in store.adapter_versions(run.run_id)]
    wrong = [str(fault) for fault in ledger.verify()]
    wrong += [f"round {row.number} is {row.status}" for row in rounds if row.status == "open"]
    for _, *halves in versions:
        wrong += [f"artifact {sha256} is gone" for sha256 in halves if not bench.artifacts.get(str(sha256))]
    scenario = SCENARIOS[place.scenario]
    if bench.config.dp != "off":
        wrong += _unpaid(store, ledger, run.run_id)
    if scenario.sites:
        sites = {
            str(number): make_site(number, Path(place.model), place.oracle, Path(place.home), scenario.sites)
            for number in range(1, scenario.sites + 1)
        }
        wrong += _released_wrongly(Path(place.home), charged=bench.config.dp != "off")
        if bench.config.deterministic:
            with inside_a_flower_task():
                wrong += Oracle(store, bench.artifacts, sites, place.oracle, Path(place.memory)).faults(run)
    return {
        "run": run.run_id,
        "status": run.status,
        "runs": sum(bool(row.model_fingerprint) for row in store.list_runs()),
        "attempts": [[row.number, row.attempt, row.status] for row in rounds],
        "versions": versions,
        "whole": all(part.status == "trained" for part in _committed_parts(store, run.run_id)),
        "wrong": wrong,
    }


def _committed_parts(store: Store, run_id: str) -> list[object]:
    committed = {(row.number, row.attempt) for row in store.rounds(run_id) if row.status == "committed"}
    return [part for part in store.participations(run_id) if (part.number, part.attempt) in committed]


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


def _released_wrongly(home: Path, *, charged: bool) -> list[str]:
    """What left a site twice, in two versions, under the masks of one session; or without its own ledger's charge."""
    wrong, seen = [], {}
    released = home / RELEASED
    for line in released.read_text().splitlines() if released.exists() else []:
        node, session, what, sha256, key = json.loads(line)
        if seen.setdefault((node, session, what), sha256) != sha256:
            wrong.append(f"site {node} gave two answers as its {what} in session {session[:12]}")
        if charged and what == "upload" and _paid_at_site(home, node, RoundKey(*key)) != "COMMITTED":
            wrong.append(f"site {node} uploaded for {key}, and its own ledger holds no committed charge for it")
    if charged:
        for path in sorted((home / "sites").glob("*/ledger.db")):
            with closing(open_ledger_to_read(f"sqlite:///{path}")) as ledger:
                wrong += [f"site {path.parent.name}: {fault}" for fault in ledger.verify()]
    return wrong


def _paid_at_site(home: Path, node: int, key: RoundKey) -> str | None:
    """The newest state of the site's own charge for a round."""
    with closing(open_ledger_to_read(f"sqlite:///{home / 'sites' / str(node) / 'ledger.db'}")) as ledger:
        rows = [row for unit in ledger.units() for row in ledger.rows(unit) if row.kind == "charge"]
    states = [row.state for row in rows if (row.run, row.round, row.attempt) == (key.run, key.round, key.attempt)]
    return states[-1] if states else None
