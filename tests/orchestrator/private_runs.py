"""A whole run under client-level privacy: secure clients, an open ledger, and signed heads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

from contract.config import ConfigValue
from orchestrator.replicas import connect
from orchestrator.run import conduct
from storage.ledger import open_ledger
from storage.store import Store
from tests.orchestrator.conftest import Bench
from tests.orchestrator.fakes import FakeNode
from tests.orchestrator.secure_fakes import SecureClient
from tests.orchestrator.test_spending import DP, Key


def conducted_privately(
    make_bench: Callable[..., Bench], prepare: Callable[[Bench], None] = lambda bench: None, **settings: ConfigValue
) -> Bench:
    """The bench of a run of five clients that has ended; `prepare` is given it before the run begins."""
    bench = make_bench(dict.fromkeys(range(1, 6), 100), **{**DP, "quorum": 4, **settings}).tell_shapes_ahead()
    fingerprint = connect(bench.trunk.address).describe().fingerprint
    for number, scripted in list(bench.clients.items()):
        client = SecureClient(
            bench.config, bench.trunk.contributions, node_id=number, home=bench.home / "sites", fingerprint=fingerprint
        )
        client.client_names, client.client_sizes = scripted.client_names, scripted.client_sizes
        bench.clients[number], bench.grid.nodes[number] = client, FakeNode(client)
    with closing(open_ledger(f"sqlite:///{bench.home / 'trunkline.db'}", signer=Key())) as ledger:
        bench.store = Store(bench.store._engine, signer=Key())
        prepare(bench)
        conduct(replace(bench.start(bench.config.to_flower()), ledger=ledger))
    return bench
