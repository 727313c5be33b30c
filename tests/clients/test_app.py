"""The Flower ClientApp: what a message does at a site, and what it answers when it cannot."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from clients.app import FAULT, REFUSED, app
from clients.site import in_simulation, read_site
from contract.config import RunConfig
from contract.errors import ConfigError, SessionError
from contract.records import RoundKey
from orchestrator.messages import read_metrics, read_update
from tests.clients.sites import Orchestrator, Site, Version, write_texts
from tests.conftest import TrunkProcess

pytestmark = pytest.mark.usefixtures("flower_task")

SETTINGS: dict[str, Any] = {
    "secagg": "off",
    "local-steps": 2,
    "per-device-train-batch-size": 2,
    "max-length": 16,
    "eval-fraction": 0.25,
}


def configured(**settings: Any) -> RunConfig:
    return RunConfig.from_flower(SETTINGS | {name.replace("_", "-"): value for name, value in settings.items()})


@pytest.fixture
def site(llama_dir: Path, trunk: TrunkProcess, tmp_path: Path) -> Site:
    data = write_texts(tmp_path / "own texts.jsonl", rows=12, seed=1)
    return Site(7, {"model": str(llama_dir), "data": str(data), "trunk-address": trunk.address, "name": "north"})


def orchestrated(llama_dir: Path, trunk: TrunkProcess, run: str, **settings: Any) -> tuple[Orchestrator, Version]:
    orchestrator = Orchestrator(configured(**settings), llama_dir, trunk.address, run)
    return orchestrator, orchestrator.first()


def asked(orchestrator: Orchestrator, version: Version, site: Site, *, final: bool = False) -> Message:
    return app(orchestrator.message(version, site, 1, final=final), site.context(orchestrator.config))


def refusal(reply: Message) -> str:
    assert reply.has_error()
    assert reply.error.code == REFUSED
    reason = str(reply.error.reason)
    assert "\n" not in reason
    return reason


def test_a_round_answers_update_and_metrics(llama_dir: Path, trunk: TrunkProcess, site: Site) -> None:
    orchestrator, version = orchestrated(llama_dir, trunk, "answers")
    reply = asked(orchestrator, version, site)
    size = int(version.client.trained("B").sum()) + 1
    upload = np.frombuffer(read_update(reply.content, 4 * size), dtype="<u4")
    metrics = read_metrics(reply.content, site.name)
    assert upload.size == size
    assert upload[:-1].any()
    assert upload[-1] == metrics["trained_tokens"] > 0
    assert metrics["steps"] == 2
    assert metrics["eval_tokens"] > 0
    assert 0 < metrics["eval_loss"] < 10
    assert metrics["received_bytes"] > 0


def test_a_round_leaves_one_line_on_what_left_the_site(
    llama_dir: Path, trunk: TrunkProcess, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    orchestrator, version = orchestrated(llama_dir, trunk, "tells")
    reply = asked(orchestrator, version, site)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("wire ")]
    assert line.startswith("wire round=1 site=north sent_bytes=")
    kinds = dict(part.split("=") for part in line.split()[1:])
    assert int(kinds["sent_bytes"]) == read_metrics(reply.content, site.name)["sent_bytes"]
    assert int(kinds["trunk.chunk"]) > int(kinds["trunk.hello"]) > int(kinds["trunk.close"]) > 0
    assert int(kinds["sent_bytes"]) == sum(int(kinds[kind]) for kind in kinds if "." in kind)


def test_the_final_judgement_equals_the_one_before_the_next_training(
    llama_dir: Path, trunk: TrunkProcess, site: Site
) -> None:
    orchestrator, version = orchestrated(llama_dir, trunk, "judges")
    judged, trained = (asked(orchestrator, version, site, final=final).content for final in (True, False))
    assert "update" not in judged
    assert "trained_tokens" not in read_metrics(judged, site.name)
    assert read_metrics(judged, site.name)["eval_loss"] == read_metrics(trained, site.name)["eval_loss"]


def test_a_repeated_attempt_gives_the_same_update(llama_dir: Path, trunk: TrunkProcess, site: Site) -> None:
    orchestrator, version = orchestrated(llama_dir, trunk, "repeats")
    size = 4 * (int(version.client.trained("B").sum()) + 1)
    uploads = [read_update(asked(orchestrator, version, site).content, size) for _ in range(2)]
    assert uploads[0] == uploads[1]


def test_a_later_attempt_trains_in_another_order(llama_dir: Path, trunk: TrunkProcess, site: Site) -> None:
    """Two attempts over cohorts that differ by one client would else have sums that differ by just its update."""
    orchestrator, version = orchestrated(llama_dir, trunk, "again")
    size = 4 * (int(version.client.trained("B").sum()) + 1)
    uploads = []
    for attempt in (1, 2):
        message = orchestrator.message(version, site, 1)
        facts = message.content["round"]
        assert isinstance(facts, ConfigRecord)
        facts["attempt"] = attempt
        uploads.append(read_update(app(message, site.context(orchestrator.config)).content, size))
    assert uploads[0] != uploads[1]


def test_an_absurd_update_is_refused_here_and_the_trunk_keeps_nothing(
    llama_dir: Path, trunk: TrunkProcess, site: Site
) -> None:
    orchestrator, version = orchestrated(llama_dir, trunk, "absurd", update_clip=1e-5, learning_rate=0.1)
    reason = refusal(asked(orchestrator, version, site))
    assert reason.startswith("UpdateError: coordinate ")
    assert "at most 1e-05 in size (update-clip)" in reason
    base = orchestrator.order(version, 1).trunk_sha256
    with pytest.raises(SessionError, match="no contribution from 7"):
        orchestrator.trunk.commit_round(RoundKey("absurd", 1, 1), base, ["7"])


def test_training_that_diverges_is_refused_here(llama_dir: Path, trunk: TrunkProcess, site: Site) -> None:
    orchestrator, version = orchestrated(llama_dir, trunk, "diverges", learning_rate=1e30, local_steps=4)
    assert refusal(asked(orchestrator, version, site)).startswith(("NonFiniteError: ", "UpdateError: "))


def test_an_adapter_that_is_not_the_rounds_is_refused(llama_dir: Path, trunk: TrunkProcess, site: Site) -> None:
    orchestrator, version = orchestrated(llama_dir, trunk, "hashes")
    message = orchestrator.message(version, site, 1)
    wrong = version.client.vector_d.copy()
    wrong[0] += 1
    message.content["adapter"] = ArrayRecord({"adapter": Array(wrong)})
    reason = refusal(app(message, site.context(orchestrator.config)))
    assert "IntegrityError: the client part of the adapter hashes to" in reason
    message.content["adapter"] = ArrayRecord({"adapter": Array(wrong[:-1])})
    assert "ModelError: the adapter vector has shape" in refusal(app(message, site.context(orchestrator.config)))
    message.content["adapter"] = ArrayRecord({"adapter": Array(wrong.astype(np.float64))})
    assert "it must be flat float32" in refusal(app(message, site.context(orchestrator.config)))


def test_a_message_that_is_no_order_is_refused(llama_dir: Path, trunk: TrunkProcess, site: Site) -> None:
    orchestrator, version = orchestrated(llama_dir, trunk, "orders")
    message = orchestrator.message(version, site, 1)
    message.content["round"] = ConfigRecord({"run": "orders"})
    assert "FrameError: the message's config record 'round'" in refusal(app(message, site.context(orchestrator.config)))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model": "/no/such model"}, "ModelError: model '/no/such model' is not a directory"),
        ({"data": "/no/such file.jsonl"}, "DataError: /no/such file.jsonl"),
        ({"model": ""}, "ConfigError: model is not set; it must be in the node config of this SuperNode"),
        ({"trunk-address": "127.0.0.1:1"}, "ConnectionFailedError: no trunk answers at 127.0.0.1:1"),
        ({"wire-log": "/no/such folder/log"}, "ConfigError: wire-log '/no/such folder/log' cannot be written"),
    ],
)
def test_what_a_site_lacks_is_one_line_to_the_orchestrator(
    llama_dir: Path, trunk: TrunkProcess, site: Site, changed: dict[str, str], reason: str
) -> None:
    orchestrator, version = orchestrated(llama_dir, trunk, "lacks", trunk_wait_s=0.1)
    site.node_config.update(changed)
    assert refusal(asked(orchestrator, version, site)).startswith(reason)


def test_a_run_config_key_that_is_unknown_is_refused(llama_dir: Path, trunk: TrunkProcess, site: Site) -> None:
    orchestrator, version = orchestrated(llama_dir, trunk, "unknown")
    context = site.context(orchestrator.config)
    context.run_config["learning-rat"] = 1.0
    reason = refusal(app(orchestrator.message(version, site, 1), context))
    assert reason == "ConfigError: unknown config key 'learning-rat'; did you mean 'learning-rate'?"


def test_a_fault_of_the_program_tells_its_kind_and_nothing_of_the_data(
    llama_dir: Path, trunk: TrunkProcess, site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    orchestrator, version = orchestrated(llama_dir, trunk, "faults")

    def broken(*_: object, **__: object) -> None:
        raise KeyError("a private sentence")

    monkeypatch.setattr("clients.participation.load_dataset", broken)
    reply = asked(orchestrator, version, site)
    assert reply.error.code == FAULT
    assert reply.error.reason == "KeyError at the client; its log says more"
    assert "a private sentence" in caplog.text


def test_a_sites_files_are_never_the_runs_to_choose() -> None:
    config = configured(model="/theirs/model", data="/etc/{partition}.jsonl")
    node = {"model": "/my models/m", "data": "/my data/d.jsonl", "partition-id": 3}
    chosen = read_site(node, config, "42", "7", simulated=False)
    assert (chosen.model, chosen.data, chosen.name) == ("/my models/m", "/my data/d.jsonl", "42")
    assert chosen.trunk_address == config.trunk_address
    with pytest.raises(ConfigError, match="model is not set; it must be in the node config"):
        read_site({}, config, "42", "7", simulated=False)
    with pytest.raises(ConfigError, match="node config data is 5; it must be text"):
        read_site({"data": 5}, config, "42", "7", simulated=False)


def test_a_simulated_site_takes_the_runs_model_and_its_own_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(model="/base", data="/texts/{partition}.jsonl")
    chosen = read_site({"partition-id": 3, "num-partitions": 4}, config, "42", "7", simulated=True)
    assert (chosen.model, chosen.data) == ("/base", "/texts/3.jsonl")
    with pytest.raises(ConfigError, match="data is not set; it must be in the run config"):
        read_site({"partition-id": 3}, configured(model="/base"), "42", "7", simulated=True)
    assert not in_simulation()
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: True))
    assert in_simulation()


def test_a_site_without_a_ledger_opens_no_database_for_a_run_that_prices_nothing(tmp_path: Path) -> None:
    """Every message starts a process, which would wait for SQL to be imported."""
    code = (
        "import sys, clients.app as app\nfrom clients.site import read_site\nconfig = app.RunConfig.from_flower({})\n"
        "node = {'model': 'm', 'data': 'd', 'trunk-address': '127.0.0.1:1', 'state-dir': sys.argv[1]}\n"
        "app._refuse_unpriced(config, read_site(node, config, '1', '1', simulated=False))\n"
        "print(sorted({'sqlalchemy', 'alembic', 'clients.spending'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    assert not (tmp_path / "state").exists()


def test_importing_the_app_and_the_package_imports_no_torch() -> None:
    code = "import sys, clients, clients.app; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
