"""Whole rounds under differential privacy, over real sites and a real trunk: what leaves, what is paid and summed."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from flwr.app import MetricRecord

from aggregation import tally
from aggregation.encoding import encoding
from aggregation.graph import full_threshold
from contract import adapter
from contract.config import ConfigValue, RunConfig
from contract.privacy_records import Unit
from contract.records import RoundKey
from orchestrator.trunk import Trunk
from storage.ledger import open_ledger
from storage.records import LedgerRow
from tests.clients.secure_driver import SecureDriver
from tests.clients.sites import Orchestrator, Site, Version, write_texts
from tests.clients.test_wire_audit import CONFIG as CLEAR
from tests.clients.test_wire_audit import documented, limit, reply_fields
from tests.conftest import TrunkProcess

SITES = 4
PRIVATE: dict[str, ConfigValue] = {"secagg": "on", "metrics": "off", "trunk-adapter": "frozen"}
MODES: dict[str, dict[str, ConfigValue]] = {
    "client": {"dp": "client", "dp-noise-multiplier": 2.0},
    "example": {"dp": "example", "dp-sample-rate": 0.3, "wire": "empirical", "wire-noise": 0.1},
    "wire": {
        "dp": "example",
        "dp-sample-rate": 0.5,
        "wire": "dp",
        "wire-releases": 2,
        "wire-noise-multiplier": 20.0,
        "dp-noise-multiplier": 20.0,
        "wire-length-bucket": CLEAR.max_length,
        "trunk-adapter": "trained",
    },
}


@dataclass
class PrivateRound:
    """One round of a mode: what the sites' ledgers say, what left, and what it came to."""

    config: RunConfig
    driven: SecureDriver
    before: Version
    total: np.ndarray
    rows: list[list[LedgerRow]]
    entries: list[list[dict[str, object]]]
    trunk: Trunk

    def counted(self, site: int, message: str) -> int:
        return sum(entry["channel"] == "trunk" and entry["message"] == message for entry in self.entries[site])


@pytest.fixture(scope="module", params=MODES)
def played(
    request: pytest.FixtureRequest,
    llama_dir: Path,
    trunk: TrunkProcess,
    tmp_path_factory: pytest.TempPathFactory,
    flower_task: None,
) -> PrivateRound:
    folder = tmp_path_factory.mktemp(request.param)
    config = RunConfig.from_flower({**CLEAR.to_flower(), **PRIVATE, "deterministic": False, **MODES[request.param]})
    sites = []
    for number in range(SITES):
        data = write_texts(folder / f"{number}.jsonl", rows=24, seed=number)
        node = {"model": str(llama_dir), "data": str(data), "trunk-address": trunk.address, "name": f"site-{number}"}
        node |= {"wire-log": str(folder / f"wire {number}"), "state-dir": str(folder / str(number)), "dataset": "notes"}
        sites.append(Site(70 + number, node | {"secagg-min-members": SITES}))
    orchestrator = Orchestrator(config, llama_dir, trunk.address, run=f"private-{request.param}")
    version = orchestrator.first()
    trained = int(version.client.trained(orchestrator.order(version, SITES).factor).sum())
    driven = SecureDriver(config, orchestrator, version, sites)
    total = driven.play(Trunk(trunk.address).describe().fingerprint, trained)
    rows, entries = [], []
    for number in range(SITES):
        with closing(open_ledger(f"sqlite:///{folder / str(number) / 'ledger.db'}")) as ledger:
            assert ledger.verify() == []
            rows.append(
                list(ledger.rows(Unit(f"site-{number}", "notes", "client" if config.dp == "client" else "example")))
            )
        entries.append([json.loads(line) for line in (folder / f"wire {number}").read_text().splitlines()])
    return PrivateRound(config, driven, version, total, rows, entries, Trunk(trunk.address))


def test_every_priced_channel_is_paid_once_and_nothing_else(played: PrivateRound) -> None:
    channels = ["adapter_sum"]
    if played.config.wire == "dp":
        channels += ["wire_forward", "wire_backward"]
    for rows in played.rows:
        charges = Counter((row.channel, row.state) for row in rows if row.kind == "charge")
        assert charges == {(channel, state): 1 for channel in channels for state in ("RESERVED", "COMMITTED")}
        assert [row.operator for row in rows if row.kind == "budget"] == [f"run {played.driven.orchestrator.run}"]


def test_what_leaves_is_listed_and_holds_no_losses_or_counts(played: PrivateRound) -> None:
    table = documented()
    for reply in played.driven.replies:
        metrics = reply.content.get("metrics")
        assert not isinstance(metrics, MetricRecord) or dict(metrics) == {}
        for field, size in [entry for entry in reply_fields(reply) if entry[0] != "secure: ConfigRecord"]:
            assert size <= limit(table[field], d=10**6, N=SITES, r=8)
    told = {f"secure.{name}" for reply in played.driven.replies for name in reply.content["secure"]}
    assert {"secure.name", "secure.dataset"} < told < table.keys()
    assert not any(tally.decode(played.total[-tally.SIZE :]).values())


def test_the_sum_decodes_to_clients_that_weigh_the_same(played: PrivateRound) -> None:
    noisy = encoding(played.config, SITES, full_threshold(SITES))
    update_d, weight = noisy.decode(played.total[: -tally.SIZE])
    assert weight == SITES
    assert np.abs(update_d).max() > 0
    if played.config.dp == "client":
        # Norms of 1 at most, and noise shares for 3 - 1 clients, of which all 4 stayed.
        sigma = 2.0 * np.sqrt(4 / 2) / 4
        assert 0.85 * sigma < update_d.std() < 1.15 * sigma


def test_the_trunks_half_learns_only_where_the_wire_is_priced(played: PrivateRound) -> None:
    driven = played.driven
    if played.config.trunk_adapter == "frozen":
        assert played.counted(0, "step") == 0
        closes = [entry for entry in played.entries[0] if entry["message"] == "close"]
        assert [entry["fields"] for entry in closes] == [{"close": 2}]
        return
    order = driven.orchestrator.order(played.before, SITES)
    key = RoundKey(driven.orchestrator.run, 1, 1)
    average = played.trunk.commit_round(key, order.trunk_sha256, [site.name for site in driven.sites])
    assert average.trained_tokens == SITES  # each client weighs 1: its tokens are not told
    trained = adapter.from_bytes(played.trunk.get_adapter(average.sha256))
    assert any(not tensor.equal(played.before.tensors()[name]) for name, tensor in trained.items())


def test_the_orchestrator_learns_no_counts_of_the_trunk(played: PrivateRound) -> None:
    seen = played.trunk.progress(RoundKey(played.driven.orchestrator.run, 1, 1))
    assert seen.sessions == SITES
    assert (seen.tokens, seen.received_bytes, seen.sent_bytes) == (0, 0, 0)


def test_padded_rows_show_no_lengths(played: PrivateRound, llama_dir: Path) -> None:
    if played.config.wire_length_bucket != played.config.max_length:
        pytest.skip("this mode pads no rows")
    hidden_size = json.loads((llama_dir / "config.json").read_text())["hidden_size"]
    row_bytes = 4 * played.config.max_length * hidden_size
    for entries in played.entries:
        sizes = [entry["bytes"] for entry in entries if entry["message"] == "chunk"]
        assert sizes
        assert all(isinstance(size, int) and size % row_bytes < 16 for size in sizes)
