"""Sites with keys and secrets in files of their own, and a server that they sum for: each message finds a new process.

Nothing here imports torch, so that a test can show that the sites' part in a sum does without it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregation import tally
from aggregation.graph import full_threshold
from aggregation.ring import RingVector
from aggregation.secure_server import SecureServer
from aggregation.terms import Member, Terms
from clients.secure import SecureSite, SecureTurn, open_secure_site
from clients.site import Site, read_site
from contract import secagg_pb2 as pb
from contract.config import ConfigValue, RunConfig
from contract.identity import create_private_key, public_key_text
from contract.records import RoundKey
from contract.roster import Roster, write_roster
from contract.secure_records import SecureOrder, SecureReply, order_from, reply_from, to_record

CONFIG = RunConfig.from_flower({"local-steps": 2, "per-device-train-batch-size": 2, "max-length": 16})
WEIGHT = 64
"""What CONFIG lets one client train on: four of them fit in Z_2^32."""
RUN, ADAPTER, FINGERPRINT = "a run", "ad" * 32, "f" * 64
VALUES = 50
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@dataclass
class SecureSites:
    """`count` sites under `folder`, called `site-0` and so on; `node_config` is what all of them are given besides."""

    folder: Path
    count: int = 4
    node_config: dict[str, ConfigValue] = field(default_factory=lambda: {"secagg-min-members": 4})
    config: RunConfig = CONFIG

    def __post_init__(self) -> None:
        self.keys: dict[str, bytes] = {}
        for name in self.names:
            self.enrol(name)

    @property
    def names(self) -> list[str]:
        return [f"site-{number}" for number in range(self.count)]

    def enrol(self, name: str) -> None:
        (self.folder / name).mkdir(parents=True)
        self.keys[name] = create_private_key(self.folder / name / "identity.pem")

    def settings(self, name: str) -> Site:
        own: dict[str, ConfigValue] = {
            "model": "a model",
            "data": "a text",
            "trunk-address": "127.0.0.1:1",
            "identity-key": str(self.folder / name / "identity.pem"),
            "state-dir": str(self.folder / name / "state"),
        }
        return read_site(own | self.node_config, self.config, node_id(name), "1", simulated=False)

    def process(self, name: str) -> SecureSite:
        """The site as a new process has it: from its node config and its files."""
        return open_secure_site(self.settings(name), node_id(name))

    def terms(self, *names: str, **changes: object) -> Terms:
        """Those of an honest orchestrator for all sites, or for `names`, but for `changes`."""
        among = sorted(names or self.names)
        fields: dict[str, object] = {
            "run": RUN,
            "round": 1,
            "nonce": bytes(16),
            "members": tuple(Member(name, self.keys[name]) for name in among),
            "threshold": full_threshold(len(among)),
            "degree": 0,
            "size": VALUES + tally.SIZE,
            "ring_bits": 32,
            "model_fingerprint": FINGERPRINT,
            "settings_sha256": self.config.sha256(),
        }
        return Terms(**(fields | changes))  # type: ignore[arg-type]

    def pin(self, version: int, names: Collection[str] = (), signing_key: Ed25519PrivateKey = SIGNER) -> None:
        """Publish a roster of `names`, or of all sites; every site believes SIGNER only."""
        path = self.folder / "roster.json"
        issued_at = datetime(2026, 1, 1, tzinfo=UTC)
        signer = signing_key.public_key().public_bytes_raw()
        members = {name: self.keys[name] for name in names or self.keys}
        write_roster(path, Roster(version, issued_at, signer, members), signing_key)
        self.node_config |= {
            "roster": str(path),
            "roster-signer": public_key_text(SIGNER.public_key().public_bytes_raw()),
        }

    def kept(self, name: str, session_id: bytes) -> pb.ClientState:
        """What the site has on its disk of a session that goes on."""
        return pb.ClientState.FromString(self.process(name).vault.read(session_id))

    def files(self, name: str) -> dict[str, bytes]:
        """All that is on the site's disk, its identity key aside."""
        folder = self.folder / name
        found = [path for path in folder.rglob("*") if path.is_file() and path.name != "identity.pem"]
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def node_id(name: str) -> str:
    """Flower's, which is no member's id."""
    return str(100 + int(name.removeprefix("site-")))


@dataclass
class SecureSession:
    """One session over sites, and its server; each stage is a record there and a record back."""

    sites: SecureSites
    terms: Terms

    def __post_init__(self) -> None:
        self.server = SecureServer(self.terms, ADAPTER)
        self.session_id = self.terms.session_id

    def asked(self, **stages: bytes) -> SecureOrder:
        """An order as it comes out of the record that carries it."""
        return order_from(to_record(SecureOrder(run=self.terms.run, **stages)))

    def ask(self, name: str, **stages: bytes) -> SecureReply:
        reply = self.sites.process(name).answer(self.asked(**stages), self.sites.config)
        return reply_from(to_record(reply))

    def join(self, name: str) -> SecureReply:
        return self.ask(name, join=self.terms.to_bytes())

    def set_up(self, names: Sequence[str] = ()) -> None:
        """The two stages before the vectors."""
        among = names or self.sites.names
        for name in among:
            self.server.accept_advert(name, taken(self.join(name), "advert"))
        adverts = self.server.adverts()
        for name in among:
            reply = self.ask(name, next_session=self.session_id, share=adverts)
            self.server.accept_shares(name, taken(reply, "shares"))

    def turn(self, name: str) -> SecureTurn:
        """The site's place in the sum, as its train message gives it."""
        asked = self.asked(session=self.session_id, inbox=self.server.inbox(name))
        return self.sites.process(name).turn(asked)

    def check(self, name: str, *, training: bool = True) -> None:
        key = RoundKey(self.terms.run, self.terms.round, 1)
        clients = len(self.terms.members)
        self.turn(name).check(key, self.sites.config, "B", clients, FINGERPRINT, training=training)

    def upload(self, vectors: Mapping[str, RingVector], values: Mapping[str, Mapping[str, int]]) -> None:
        """Stage 2 of those whom `values` names; who has no vector only judges."""
        for name, told in values.items():
            encoded = vectors.get(name)
            self.check(name, training=encoded is not None)
            given = None if encoded is None else encoded.copy()
            self.server.accept_upload(name, self.turn(name).upload(ADAPTER, given, told))

    def confirm(self, names: Sequence[str]) -> None:
        message = self.server.survivors_message()
        for name in names:
            reply = self.ask(name, session=self.session_id, confirm=message)
            self.server.accept_confirmation(name, taken(reply, "confirmation"))

    def unmask(self, names: Sequence[str]) -> RingVector:
        request = self.server.unmask_request()
        for name in names:
            reply = self.ask(name, session=self.session_id, unmask=request)
            self.server.accept_answer(name, taken(reply, "answer"))
        return self.server.finish()


def taken(reply: SecureReply, name: str) -> bytes:
    """The reply's only field."""
    assert set(to_record(reply)) == {name}, reply
    data = getattr(reply, name)
    assert isinstance(data, bytes)
    return data


def vectors_of(names: Sequence[str]) -> dict[str, RingVector]:
    """Any elements of Z_2^32, up to the largest: what a site encodes is not the sum's business."""
    rng = np.random.default_rng(len(names))
    return {name: rng.integers(0, 1 << 32, VALUES, dtype=np.uint32) for name in names}


def counts_of(names: Sequence[str]) -> dict[str, dict[str, int]]:
    return {
        name: {
            "eval_nats": 2**47 + number, "eval_tokens": 65535 + number,
            "train_nats": 3 * number, "train_tokens": 5 * number, "steps": 2,
        }
        for number, name in enumerate(names)
    }  # fmt: skip


def totals_of(values: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {what: sum(told[what] for told in values.values()) for what in tally.NAMES}


def ring_sum(vectors: Mapping[str, RingVector], names: Sequence[str]) -> RingVector:
    total = np.zeros_like(vectors[names[0]])
    for name in names:
        total += vectors[name]
    return total
