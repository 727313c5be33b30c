"""What leaves a site in a round under secure sums: every field is listed, and nothing of it is in clear."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from aggregation import tally
from aggregation.ring import plan
from contract.config import RunConfig
from contract.records import RoundKey
from orchestrator.trunk import Trunk
from tests.clients.secure_driver import SecureDriver
from tests.clients.sites import Orchestrator, Site, upload_bytes, write_texts
from tests.clients.test_wire_audit import CONFIG as CLEAR
from tests.clients.test_wire_audit import documented, limit, reply_fields, site_secrets
from tests.conftest import TrunkProcess

CONFIG = RunConfig.from_flower({**CLEAR.to_flower(), "secagg": "on", "deterministic": False})
SITES = 4


@dataclass
class SecureRound:
    """One round as site 0 took part in it: its Flower replies in order, and what all of it came to."""

    sites: list[Site]
    replies: list[Message]
    wire_log: list[dict[str, object]]
    trained_values: int
    total: np.ndarray
    weights: dict[str, int]

    def raw(self) -> bytes:
        """What Flower pushes for the replies: their objects."""
        objects = [value for reply in self.replies for value in get_all_nested_objects(reply).values()]
        return b"".join(value.deflate() for value in objects)


@pytest.fixture(scope="module")
def played(
    llama_dir: Path, trunk: TrunkProcess, tmp_path_factory: pytest.TempPathFactory, flower_task: None
) -> SecureRound:
    folder = tmp_path_factory.mktemp("masked audit")
    sites = []
    for number in range(SITES):
        data = write_texts(folder / f"private notes {number}.jsonl", rows=24, seed=number)
        node_config = {"model": str(llama_dir), "data": str(data), "trunk-address": trunk.address}
        node_config |= {"wire-log": str(folder / f"wire {number}.jsonl"), "state-dir": str(folder / str(number))}
        sites.append(Site(70 + number, node_config | {"secagg-min-members": SITES}))
    orchestrator = Orchestrator(CONFIG, llama_dir, trunk.address, run="masked-audit")
    version = orchestrator.first()
    trained = int(version.client.trained(orchestrator.order(version, SITES).factor).sum())
    driven = SecureDriver(CONFIG, orchestrator, version, sites)
    total = driven.play(Trunk(trunk.address).describe().fingerprint, trained)
    entries = [json.loads(line) for line in (folder / "wire 0.jsonl").read_text().splitlines()]
    average = orchestrator.trunk.commit_round(
        RoundKey(orchestrator.run, 1, 1), orchestrator.order(version, SITES).trunk_sha256, [site.name for site in sites]
    )
    return SecureRound(sites, driven.replies, entries, trained, total, {"trunk": average.trained_tokens})


def test_every_field_that_left_is_documented_with_its_size(played: SecureRound) -> None:
    table, seen = documented(), set()
    for reply in played.replies:
        fields = [entry for entry in reply_fields(reply) if entry[0] != "secure: ConfigRecord"]
        record = reply.content["secure"]
        assert isinstance(record, ConfigRecord)
        fields += [(f"secure.{name}", len(value)) for name, value in record.items()]
        for field, size in fields:
            assert field in table, f"{field} left the client and is not in docs/wire.md"
            most = limit(table[field], d=played.trained_values, N=SITES, r=4)
            assert size <= most, f"{field} has {size} bytes, the table says {most}"
            seen.add(field)
    stages = ("identity", "greeting", "advert", "shares", "confirmation", "answer")
    assert {name for name in seen if not name.startswith("metadata.")} == {
        "update",
        *(f"secure.{one}" for one in stages),
    }


def test_the_wire_log_lists_exactly_those_fields(played: SecureRound) -> None:
    logged = [entry for entry in played.wire_log if entry["channel"] == "flower"]
    found = [entry["fields"] for entry in logged if entry["message"] == "secure" and entry["fields"]]
    sent = [reply.content["secure"] for reply in played.replies if reply.content["secure"]]
    assert found == [{f"secure.{name}": len(value) for name, value in record.items()} for record in sent]
    (training,) = [entry for entry in logged if entry["message"] == "train.round"]
    assert training["fields"] == {"update": 4 * (played.trained_values + 1 + tally.SIZE)}


def test_nothing_of_a_site_is_in_clear_in_what_the_orchestrator_gets(played: SecureRound) -> None:
    raw = played.raw()
    for name, patterns in site_secrets(played.sites[0]).items():
        assert not [pattern for pattern in patterns if pattern in raw], f"{name} left the site"
    (training,) = [reply for reply in played.replies if "update" in reply.content]
    assert dict(training.content["metrics"]) == {}
    update = np.frombuffer(upload_bytes(training), dtype="<u4")
    # The limbs above every count of this round would be 0 in clear, and the weight a small number.
    assert np.count_nonzero(update[-tally.SIZE - 1 :] > 1 << 16) >= tally.SIZE - 2


def test_the_sum_is_over_the_weights_that_the_trunk_was_told(played: SecureRound) -> None:
    point = plan(SITES, CONFIG.max_trained_tokens(), CONFIG.update_clip)
    update_d, weight = point.decode(played.total[: -tally.SIZE])
    assert weight == played.weights["trunk"] > 0
    assert update_d.shape == (played.trained_values,)
    assert np.abs(update_d).max() > 0
    told = tally.decode(played.total[-tally.SIZE :])
    assert told["steps"] == SITES * CONFIG.local_steps
    assert told["eval_tokens"] > 0


def test_no_secret_of_the_session_is_left_at_the_site(played: SecureRound) -> None:
    for site in played.sites:
        sessions = list((Path(str(site.node_config["state-dir"])) / "sessions").iterdir())
        assert [file.stat().st_size for file in sessions] == [0]
