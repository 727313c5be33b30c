"""A secure sum holds no vector for each client: neither the orchestrator nor a client grows past three of them."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Collection
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from aggregation import tally
from aggregation.dither import SecretDither
from aggregation.ring import plan
from aggregation.terms import Member, Policy
from clients.secure import SecureSite, SecureTurn
from clients.vault import Vault
from contract.config import RunConfig
from contract.flat_array import HEADER_BYTES
from contract.secure_records import SecureOrder
from orchestrator.exchange import Exchange
from orchestrator.messages import read_update
from orchestrator.secure_session import SecureSession, new_session
from tests.orchestrator.fakes import FakeClock

CLIENTS, VALUES = 8, 1_000_000
VECTOR_BYTES = 4 * VALUES
CONSTANT_BYTES = 2_000_000
CONFIG = RunConfig.from_flower({"local-steps": 2, "per-device-train-batch-size": 4, "max-length": 16})
SHA256 = "a:b"


class FreshGrid:
    """Makes each reply when it is pulled, as Flower's own Grid does: none waits here. `uploads` are arrays as files."""

    def __init__(self, uploads: dict[int, Path]) -> None:
        self._uploads = uploads
        self._asked: dict[str, Message] = {}

    def get_node_ids(self) -> Collection[int]:
        return list(self._uploads)

    def push_messages(self, messages: list[Message]) -> Collection[str | None]:
        (message,) = messages
        message_id = f"m{message.metadata.dst_node_id}"
        message.metadata.__dict__["_message_id"] = message_id
        self._asked[message_id] = message
        return [message_id]

    def pull_messages(self, message_ids: list[str]) -> Collection[Message]:
        (message_id,) = message_ids
        asked = self._asked.pop(message_id)
        data = self._uploads[asked.metadata.dst_node_id].read_bytes()
        array = Array(dtype="uint8", shape=(len(data) - HEADER_BYTES,), stype="numpy.ndarray", data=data)
        return [Message(RecordDict({"update": ArrayRecord({"update": array})}), reply_to=asked)]


class NeverPassed:
    passed = False

    def look(self) -> None: ...

    def replied(self) -> None: ...


def sites_of(folder: Path) -> tuple[dict[str, SecureSite], dict[str, Member]]:
    sites, members = {}, {}
    for number in range(CLIENTS):
        node, key = str(number + 1), Ed25519PrivateKey.generate()
        vault = Vault(folder / node)
        sites[node] = SecureSite(node, key, Policy(min_members=2), None, vault, simulated=True)
        members[node] = Member(node, key.public_key().public_bytes_raw())
    return sites, members


def ready(folder: Path) -> tuple[SecureSession, dict[str, SecureSite]]:
    """A session that waits for its vectors."""
    sites, members = sites_of(folder)
    session = new_session("run", 1, CONFIG, members, sorted(members), VALUES, "f")
    session.server.train_from(SHA256)
    for node, site in sites.items():
        session.server.accept_advert(
            node, site.answer(SecureOrder("run", join=session.terms.to_bytes()), CONFIG).advert
        )
    share, session_id = session.server.adverts(), session.terms.session_id
    for node, site in sites.items():
        order = SecureOrder("run", next_session=session_id, share=share)
        session.server.accept_shares(node, site.answer(order, CONFIG).shares)
    return session, sites


def grown(before: int) -> int:
    return tracemalloc.get_traced_memory()[1] - before


def test_neither_a_client_nor_the_orchestrator_holds_more_than_three_vectors(tmp_path: Path) -> None:
    session, sites = ready(tmp_path / "sites")
    point = plan(CLIENTS, CONFIG.max_trained_tokens(), CONFIG.update_clip)
    assert point.bits == 32
    update_d = np.random.default_rng(5).normal(0.0, 0.01, VALUES)
    uploads: dict[int, Path] = {}
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for node, site in sites.items():
            turn = SecureTurn(site, session.terms.session_id, session.inbox(node))
            encoded = point.encode(update_d, 10, SecretDither(os.urandom))
            upload = turn.upload(SHA256, encoded, {"steps": 1})
            del encoded
            uploads[int(node)] = tmp_path / node
            uploads[int(node)].write_bytes(Array(np.frombuffer(upload, dtype=np.uint8)).data)
            del upload
        assert VECTOR_BYTES < grown(before) <= 3 * VECTOR_BYTES + CONSTANT_BYTES

        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        exchange = Exchange(FreshGrid(uploads), FakeClock())

        def message_for(node: str) -> Message:
            content = RecordDict({"secure": ConfigRecord({"run": "run"})})
            return Message(content, dst_node_id=int(node), message_type="train.round")

        due_bytes = session.terms.size * session.terms.ring_bits // 8
        for answer in exchange.ask(session.cohort, message_for, NeverPassed()):
            assert answer.content is not None
            session.server.accept_upload(answer.node_id, read_update(answer.content, due_bytes))
            del answer
        assert VECTOR_BYTES < grown(before) <= 3 * VECTOR_BYTES + CONSTANT_BYTES
        assert session.survivors == sorted(sites)
    finally:
        tracemalloc.stop()
    assert session.terms.size == VALUES + 1 + tally.SIZE
