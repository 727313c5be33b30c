"""Whole runs of real clients through a real trunk by TLS and ticket: what comes out is what an open trunk gives.

Flower's grid alone is scripted. The trunk is a process of its own, which one test kills in the middle of a round.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from flwr.app import Message

from clients import participation
from clients.app import app
from clients.split_model import remote_layers
from contract.config import ConfigValue, RunConfig
from contract.identity import create_private_key, public_key_text
from orchestrator.run import Start, conduct
from orchestrator.ticket_key import open_ticket_key, signer_text
from storage.artifacts import ArtifactStore
from storage.records import AdapterVersionRow, ParticipationRow, RunRow
from storage.store import Store, open_store
from tests.clients.sites import Site, save_site_model, write_texts
from tests.conftest import TrunkProcess
from tests.orchestrator.conftest import inside_a_flower_task
from tests.orchestrator.fakes import Content, FakeClock, FakeGrid, FakeNode
from tests.pki import Pki

StartTrunk = Callable[..., TrunkProcess]
SITES = {11: "north", 12: "south"}
SETTINGS: dict[str, ConfigValue] = {
    "num-rounds": 2,
    "quorum": 2,
    "local-steps": 2,
    "per-device-train-batch-size": 2,
    "max-length": 16,
    "lora-r": 4,
    "eval-fraction": 0.25,
    "deterministic": True,
    "node-wait-s": 10.0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_site_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.made(tmp_path_factory.mktemp("keys") / "pki")


@dataclass
class Federation:
    """Two sites with identities and texts of their own, and an orchestrator's home; one run at a time."""

    folder: Path
    model: Path
    pki: Pki | None
    store: Store

    def enroll(self, *, certificates: bool) -> None:
        for name in SITES.values():
            public_key = public_key_text(create_private_key(self.folder / f"{name}.key"))
            bound = self.pki.key_sha256(name) if certificates and self.pki is not None else None
            self.store.enroll_client(name, public_key, "ada", bound)

    def site(self, node_id: int, trunk: str, **changed: str) -> Site:
        name = SITES[node_id]
        own: dict[str, str | int | bool] = {
            "model": str(self.model),
            "data": str(write_texts(self.folder / f"{name}.jsonl", 20, node_id)),
            "name": name,
            "trunk-address": trunk,
            "identity-key": str(self.folder / f"{name}.key"),
            "secagg-min-members": 2,
            "allow-deterministic": True,
            "wire-log": str(self.folder / f"{name}.wire"),
        }
        if self.pki is not None:
            files = self.pki.files(changed.pop("certificate", name))
            own |= {"trunk-ca": str(files.ca), "trunk-certificate": str(files.certificate), "trunk-key": str(files.key)}
        return Site(node_id, own | changed)

    def conduct(self, trunk: str, sites: list[Site], **settings: ConfigValue) -> RunRow:
        """A whole run; its row, however it ended."""
        told = SETTINGS | {"model": str(self.model), "trunk-address": trunk} | settings
        config, clock = RunConfig.from_flower(told), FakeClock()

        def node(site: Site) -> FakeNode:
            def work(message: Message) -> Content:
                reply = app(message, site.context(config))
                return reply.error if reply.has_error() else reply.content

            return FakeNode(work)

        grid = FakeGrid(clock, {site.node_id: node(site) for site in sites})
        artifacts = ArtifactStore(self.folder / "artifacts")
        runs = self.folder / "runs"
        with inside_a_flower_task():
            conduct(Start(config.to_flower(), "flower-1", "deployment", grid, self.store, artifacts, runs, clock))
        return self.store.get_run("last")

    def versions(self, run: RunRow) -> list[tuple[int, str, str]]:
        rows: list[AdapterVersionRow] = self.store.adapter_versions(run.run_id)
        return [(row.number, row.client_sha256, row.trunk_sha256) for row in rows]


@pytest.fixture
def federation(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[..., Federation]:
    """`federation(pki)`: with a home of its own, and the orchestrator's certificate in the environment."""

    def start(pki: Pki | None, *, certificates: bool = False) -> Federation:
        folder = tmp_path / ("open" if pki is None else "secured")
        folder.mkdir()
        monkeypatch.setenv("TRUNKLINE_HOME", str(folder / "home"))
        names = ("TRUNKLINE_TRUNK_CA", "TRUNKLINE_TRUNK_CERTIFICATE", "TRUNKLINE_TRUNK_KEY")
        for name in names:
            monkeypatch.delenv(name, raising=False)
        if pki is not None:
            files = pki.files("orchestrator")
            for name, path in zip(names, (files.ca, files.certificate, files.key), strict=True):
                monkeypatch.setenv(name, str(path))
        store = open_store(f"sqlite:///{folder / 'trunkline.db'}")
        request.addfinalizer(store.close)
        made = Federation(folder, model, pki, store)
        made.enroll(certificates=certificates)
        return made

    return start


def ticketed(trunk_process: StartTrunk, model: Path, pki: Pki, **options: object) -> TrunkProcess:
    """A trunk by TLS that takes the tickets of the orchestrator whose home is set."""
    files = pki.files("trunk")
    tls = {"tls_certificate": files.certificate, "tls_key": files.key, "client_ca": pki.ca}
    return trunk_process(model, 1, 1, **tls, ticket_signer=signer_text(open_ticket_key()), **options)


def presented(federation: Federation, name: str) -> list[dict[str, int]]:
    """What each hello of a site held: field and size."""
    lines = (federation.folder / f"{name}.wire").read_text().splitlines()
    return [entry["fields"] for line in lines if (entry := json.loads(line))["message"] == "hello"]


def test_a_run_by_tls_and_ticket_gives_the_bits_of_an_open_one(
    federation: Callable[..., Federation], trunk_process: StartTrunk, model: Path, pki: Pki
) -> None:
    plain = federation(None)
    open_trunk = trunk_process(model, 1, 1)
    before = plain.conduct(open_trunk.address, [plain.site(node_id, open_trunk.address) for node_id in SITES])
    secured = federation(pki, certificates=True)
    trunk = ticketed(trunk_process, model, pki)
    after = secured.conduct(trunk.address, [secured.site(node_id, trunk.address) for node_id in SITES])
    assert (before.status, after.status) == ("finished", "finished")
    assert secured.versions(after) == plain.versions(before)
    assert len(secured.versions(after)) == 3
    for name in SITES.values():
        assert all("hello.ticket" in fields and "hello.proof" in fields for fields in presented(secured, name))
        assert len(presented(secured, name)) == 3
        assert not any("hello.ticket" in fields for fields in presented(plain, name))


def test_a_session_that_is_lost_while_the_trunk_is_killed_comes_back_by_its_renewal(
    federation: Callable[..., Federation],
    trunk_process: StartTrunk,
    model: Path,
    pki: Pki,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The trunk's second process has nothing of the first one's memory but the key in its state directory."""
    secured = federation(pki, certificates=True)
    first = ticketed(trunk_process, model, pki)
    plain, killed = participation.train, []

    def train(*given: object) -> object:
        done = plain(*given)  # type: ignore[arg-type]
        if not killed:
            first.kill()
            again = ticketed(trunk_process, model, pki, listen=first.address, state_dir=first.state_dir)
            killed.append(again)
            remote_layers(given[0]).trunk.read_adapter()  # type: ignore[arg-type]  # notices that the session is lost
        return done

    monkeypatch.setattr(participation, "train", train)
    presented_tickets: list[bytes] = []
    told = participation.Admission.presented

    def watched(self: participation.Admission, hello: object, address: str, challenge: bytes) -> object:
        shown = told(self, hello, address, challenge)  # type: ignore[arg-type]
        presented_tickets.append(shown.ticket)
        return shown

    monkeypatch.setattr(participation.Admission, "presented", watched)
    sites = [secured.site(node_id, first.address) for node_id in SITES]
    with caplog.at_level(logging.WARNING, "trunkline.clients"):
        run = secured.conduct(first.address, sites, **{"num-rounds": 1})
    assert (run.status, len(killed)) == ("finished", 1)
    assert any("has lost its trunk, its round begins again" in message for message in caplog.messages)
    kinds = [b"trunkline-renewal-1" in ticket for ticket in presented_tickets]
    assert kinds.count(True) == 1
    assert len(kinds) == 2 * 2 + 1


def test_a_client_with_another_clients_certificate_is_left_out_and_the_reason_is_in_sql(
    federation: Callable[..., Federation], trunk_process: StartTrunk, model: Path, pki: Pki
) -> None:
    secured = federation(pki, certificates=True)
    trunk = ticketed(trunk_process, model, pki)
    sites = [secured.site(11, trunk.address), secured.site(12, trunk.address, certificate="north")]
    with pytest.raises(Exception, match="round 1"):
        secured.conduct(trunk.address, sites, **{"secagg-aborts": 0, "num-rounds": 1})
    run = secured.store.get_run("last")
    rows: list[ParticipationRow] = secured.store.participations(run.run_id, 1)
    reasons = {row.node_id: row.reason for row in rows}
    assert reasons["11"] is None
    assert "TicketError: trunk at" in str(reasons["12"])
    assert "the ticket is for the TLS key" in str(reasons["12"])
