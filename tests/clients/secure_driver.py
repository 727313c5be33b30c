"""Drives real sites through one secure round by hand, without Flower."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from aggregation import tally
from aggregation.encoding import encoding
from aggregation.graph import full_threshold
from aggregation.secure_server import SecureServer
from aggregation.terms import NONCE_BYTES, Member, Terms
from clients.app import app
from contract.config import RunConfig
from contract.secure_records import SecureOrder, reply_from, to_record
from orchestrator.messages import read_update
from tests.clients.sites import Orchestrator, Site, Version


@dataclass
class SecureDriver:
    """Drives the sites' app through one secure round, as the orchestrator does."""

    config: RunConfig
    orchestrator: Orchestrator
    version: Version
    sites: list[Site]
    replies: list[Message] = field(default_factory=list)

    def ask(self, site: Site, order: SecureOrder, message: Message | None = None) -> Message:
        record = ConfigRecord(dict(to_record(order)))
        if message is None:
            content = RecordDict({"secure": record})
            message = Message(content, dst_node_id=site.node_id, message_type="query.secure")
        else:
            message.content["secure"] = record
        reply: Message = app(message, site.context(self.config))
        assert not reply.has_error(), reply.error.reason
        if site is self.sites[0]:
            self.replies.append(reply)
        return reply

    def stage(self, name: str, accept: Callable[[str, bytes], None], **order: bytes) -> None:
        for site in self.sites:
            reply = self.ask(site, SecureOrder(self.orchestrator.run, **order))
            accept(site.name, getattr(reply_from(reply.content["secure"]), name))

    def identities(self) -> dict[str, bytes]:
        replies = {site.name: self.ask(site, SecureOrder("r", greet=b"n" * NONCE_BYTES)) for site in self.sites}
        return {name: reply_from(reply.content["secure"]).identity for name, reply in replies.items()}

    def play(self, fingerprint: str, values: int) -> np.ndarray:
        keys = self.identities()
        bits = encoding(self.config, len(self.sites), full_threshold(len(self.sites))).bits
        terms = Terms(
            run=self.orchestrator.run, round=1, nonce=secrets.token_bytes(NONCE_BYTES),
            members=tuple(Member(name, keys[name]) for name in sorted(keys)),
            threshold=full_threshold(len(self.sites)), degree=0, size=values + 1 + tally.SIZE, ring_bits=bits,
            model_fingerprint=fingerprint, settings_sha256=self.config.sha256(),
        )  # fmt: skip
        order = self.orchestrator.order(self.version, len(self.sites))
        server = SecureServer(terms, f"{order.client_sha256}:{order.trunk_sha256}")
        self.stage("advert", server.accept_advert, join=terms.to_bytes())
        self.stage("shares", server.accept_shares, next_session=terms.session_id, share=server.adverts())
        for site in self.sites:
            told = SecureOrder(self.orchestrator.run, session=terms.session_id, inbox=server.inbox(site.name))
            reply = self.ask(site, told, self.orchestrator.message(self.version, site, len(self.sites)))
            server.accept_upload(site.name, read_update(reply.content, terms.size * bits // 8))
        session = terms.session_id
        self.stage("confirmation", server.accept_confirmation, session=session, confirm=server.survivors_message())
        self.stage("answer", server.accept_answer, session=session, unmask=server.unmask_request())
        return server.finish()
