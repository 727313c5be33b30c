"""Which client each Flower node speaks for, by its signature at first contact in a run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from aggregation import keys
from aggregation.terms import NONCE_BYTES, Member, greeting_message
from contract.errors import ConfigError, LeaseError, SecureSumError, StorageError
from contract.identity import check_client_id, decode_public_key
from contract.privacy_records import Level, Unit
from contract.secure_records import SecureOrder
from orchestrator.desk import Desk
from orchestrator.secure_exchange import SecureAnswer, ask_all, stage_deadline
from orchestrator.telling import REASONS_SHOWN

log = logging.getLogger("trunkline.orchestrator")

GREETINGS = 3
"""How often a node is asked who it is: a ghost that Flower still lists would cost each draw a stage's timeout."""


@dataclass(frozen=True, slots=True)
class _Greeting:
    """A public key of 32 bytes, and its owner's verified signature over run, node, nonce and what it declares."""

    identity_key: bytes
    signature: bytes
    name: str
    dataset: str


@dataclass(slots=True)
class Membership:
    """Where clients are enrolled, only those take part, under their enrolled ids; else every node is its own client.

    A simulation's clients have throw-away identities, which nobody enrolls: `enrolled` is False there. `shut_out_nodes`
    take no part for the rest of the run, each for its reason.
    """

    desk: Desk
    enrolled: bool
    _greetings: dict[str, _Greeting] = field(default_factory=dict)
    _asked: Counter[str] = field(default_factory=Counter)
    _reasons: dict[str, str] = field(default_factory=dict)
    _datasets: dict[str, str] = field(default_factory=dict)
    shut_out_nodes: dict[str, str] = field(default_factory=dict)

    def known(self, nodes: Iterable[str]) -> dict[str, Member]:
        """Those of `nodes` that may take part in a sum, by node id; new ones are asked who they are."""
        present = list(nodes)
        self._greet(present)
        names = self._enrolled_names()
        found: dict[bytes, str] = {}
        for node_id, greeting in self._greetings.items():  # in the order of their greetings
            if node_id not in present or node_id in self.shut_out_nodes:
                continue
            if not self._may_take_part(node_id, greeting, names):
                continue
            before = found.get(greeting.identity_key)
            if before is not None:  # a site that started anew speaks through its newest node
                self.exclude(before, f"node {node_id} came later with the same identity key")
            found[greeting.identity_key] = node_id
        for node_id in found.values():
            self._reasons.pop(node_id, None)
        return {node_id: Member(node_id if names is None else names[key], key) for key, node_id in found.items()}

    def units(self, members: Mapping[str, Member], level: Level) -> dict[str, Unit]:
        """Whose privacy each node's part is charged to: the enrolled client, or else the name that it declared.

        One budget pays for one part in a round: a second node that declares the same client and dataset is left out. At
        client level a client's text is protected as a whole: it takes part through one node, and with the dataset that
        it first came with for the rest of the run.
        """
        names = self._enrolled_names()
        found: dict[Unit, str] = {}
        for node_id in sorted(members):
            greeting = self._greetings[node_id]
            client = greeting.name if names is None else members[node_id].client_id
            if level == "client" and (bound := self._datasets.setdefault(client, greeting.dataset)) != greeting.dataset:
                self.exclude(node_id, f"client {client} takes part with dataset {bound} in this run")
                continue
            unit = Unit(client, greeting.dataset, level)
            if unit in found:
                self.exclude(node_id, f"node {found[unit]} has the same name {client} and dataset {unit.dataset}")
                continue
            found[unit] = node_id
        return {node_id: unit for unit, node_id in found.items()}

    def remember(self, charged: Iterable[Unit]) -> None:
        """Keep clients to the datasets that the run has charged before it was resumed."""
        for unit in charged:
            if unit.level == "client":
                self._datasets.setdefault(unit.client, unit.dataset)

    def shut_out(self, node_id: str, reason: str) -> None:
        """Leave a node out for the rest of the run."""
        self.shut_out_nodes[node_id] = reason
        self.exclude(node_id, reason)

    def excluded(self, nodes: Iterable[str]) -> list[tuple[str, str]]:
        """Those of `nodes` that take no part, each with the newest reason, the first few."""
        return [(node_id, self._reasons[node_id]) for node_id in nodes if node_id in self._reasons][:REASONS_SHOWN]

    def _greet(self, nodes: Collection[str]) -> None:
        silent = {node_id for node_id, times in self._asked.items() if times >= GREETINGS}
        new = sorted(set(nodes) - self._greetings.keys() - self.desk.exchange.busy() - silent)
        if not new:
            return
        self._asked.update(new)
        nonce = self.desk.entropy(NONCE_BYTES)
        orders = {node_id: SecureOrder(self.desk.run_id, greet=nonce) for node_id in new}
        heard = set()
        for answer in ask_all(self.desk, orders, stage_deadline(self.desk)):
            heard.add(answer.node_id)
            self._hear(answer, nonce)
        for node_id in sorted(set(new) - heard):
            self.exclude(node_id, "it did not say who it is in time")

    def _hear(self, answer: SecureAnswer, nonce: bytes) -> None:
        if answer.reply is None:
            self.exclude(answer.node_id, f"it did not say who it is: {answer.failure}")
            return
        reply = answer.reply
        declared = () if self.desk.config.dp == "off" else (reply.name, reply.dataset)
        message = greeting_message(self.desk.run_id, answer.node_id, nonce, *declared)
        try:
            for told in declared:
                check_client_id(told, "what it is charged to")
            keys.verify(reply.identity, reply.greeting, message, f"the greeting of client {answer.node_id}")
        except (SecureSumError, ConfigError) as error:
            self.exclude(answer.node_id, str(error))
            return
        self._reasons.pop(answer.node_id, None)
        self._greetings[answer.node_id] = _Greeting(reply.identity, reply.greeting, reply.name, reply.dataset)

    def _enrolled_names(self) -> Mapping[bytes, str] | None:
        """Client ids by public key, as SQL has them now; None where nobody was ever enrolled."""
        if not self.enrolled or not self.desk.store.roster_version():
            return None
        rows = self.desk.store.list_identities()
        return {decode_public_key(row.public_key, f"the key of {row.client_id}"): row.client_id for row in rows}

    def _may_take_part(self, node_id: str, greeting: _Greeting, names: Mapping[bytes, str] | None) -> bool:
        if names is None:
            return True
        client_id = names.get(greeting.identity_key)
        if client_id is None:
            self.exclude(node_id, "its identity key is not enrolled, or was revoked: `trunkline clients list`")
            return False
        try:
            self.desk.store.bind_node(self.desk.run_id, node_id, client_id, greeting.signature)
        except LeaseError:
            raise
        except StorageError as error:
            self.exclude(node_id, str(error))
            return False
        return True

    def exclude(self, node_id: str, reason: str) -> None:
        """Note, and say once, why a node takes no part in the sum that is drawn now."""
        if self._reasons.get(node_id) != reason:
            self._reasons[node_id] = reason
            log.warning("node %s takes no part in secure sums: %s", node_id, reason)
