"""Clients of a secure run whose training is arithmetic: the sum, the vault on the disk and the trunk are real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from aggregation import tally
from aggregation.terms import Policy
from clients.secure import SecureSite
from clients.update import encode_update
from clients.vault import Vault
from contract.errors import TrunklineError
from contract.records import RoundKey
from contract.secure_records import SecureOrder, order_from, to_record
from tests.orchestrator.fakes import Content, ScriptedClient

Stage = str
"""`greet`, `join`, `share`, `train`, `confirm` or `unmask`: a name of what a message asks."""


FINGERPRINT = "f" * 64


def stages_of(asked: SecureOrder, *, trains: bool) -> list[Stage]:
    """What one message asks, in the order in which a site does it."""
    told = {"greet": asked.greet, "train": trains, "confirm": asked.confirm, "unmask": asked.unmask}
    told |= {"join": asked.join, "share": asked.share}
    return [name for name, present in told.items() if present]


def asked_of(message: Message) -> list[Stage]:
    """What a message asks of a client; nothing where it is of no secure run."""
    record = message.content.get("secure")
    return stages_of(order_from(record), trains="round" in message.content) if isinstance(record, ConfigRecord) else []


@dataclass
class SecureClient(ScriptedClient):
    """As ScriptedClient, under masks. `dies(stage, round)` says before which stage its answer is lost."""

    node_id: int = 0
    home: Path = Path()
    policy: Policy = field(default_factory=lambda: Policy(min_members=2))
    identity: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    dies: Callable[[Stage, int], bool] = lambda stage, number: False
    lies_about_weight: int = 0
    keeps_from_trunk: int = 0
    refuses_shares: int = 0
    """How many times it is asked for shares until it refuses, once; 0 never."""
    asked: list[list[Stage]] = field(default_factory=list)
    name: str = ""
    dataset: str = "texts"
    own_budget_is_spent: bool = False
    heads: list[bytes] = field(default_factory=list)
    fingerprint: str = FINGERPRINT

    def site(self) -> SecureSite:
        """A new one for each message, as a new process would make it."""
        vault = Vault(self.home / str(self.node_id))
        names = (self.name or f"client-{self.node_id}", self.dataset)
        return SecureSite(str(self.node_id), self.identity, self.policy, None, vault, False, *names)

    def __call__(self, message: Message) -> Content:
        try:
            return self._answer(message)
        except TrunklineError as error:
            return Error(1000, f"{type(error).__name__}: {error}")

    def _answer(self, message: Message) -> Content:
        record = message.content["secure"]
        assert isinstance(record, ConfigRecord)
        asked, order = order_from(record), message.content.get("round")
        number = int(order["round"]) if isinstance(order, ConfigRecord) else 0
        stages = stages_of(asked, trains=order is not None)
        self.asked.append(stages)
        if any(self.dies(stage, number) for stage in stages):
            return Error(2, "killed")
        content = RecordDict({"metrics": MetricRecord({})})
        self.heads += [asked.head] if asked.head else []
        if isinstance(order, ConfigRecord) and self.own_budget_is_spent:
            told = replace(self.site().answer(asked, self.config), failure="BudgetError: its own budget is spent")
            content["secure"] = ConfigRecord(dict(to_record(told)))
            return content
        if isinstance(order, ConfigRecord):
            upload = self._masked(message, dict(order.items()), asked)
            content["update"] = ArrayRecord({"update": Array(np.frombuffer(upload, dtype=np.uint8))})
        reply = self.site().answer(asked, self.config)
        if reply.shares and self.refuses_shares:
            self.refuses_shares -= 1
            reply = reply if self.refuses_shares else replace(reply, shares=b"", refusal="it will not")
        content["secure"] = ConfigRecord(dict(to_record(reply)))
        return content

    def _masked(self, message: Message, order: dict[str, Any], asked: SecureOrder) -> bytes:
        number, who = int(order["round"]), str(order["client_id"])
        self.orders.append(order)
        key = RoundKey(str(order["run"]), number, int(order["attempt"]))
        turn = self.site().turn(asked)
        turn.check(
            key, self.config, order["factor"], int(order["clients"]), self.fingerprint, training=not order["final"]
        )
        values = {"eval_tokens": 10, "eval_nats": round(self.lost(number - 1) * 10 * tally.NATS_STEPS)}
        encoded = None
        if not order["final"]:
            self._train_client_part(message, order, who)
            if not self.keeps_from_trunk and self.config.trunk_adapter == "trained":
                self._train_trunk_part(order, key, who)
            self.keeps_from_trunk = max(0, self.keeps_from_trunk - 1)
            weight = self.weight + self.lies_about_weight
            encoded = encode_update(self.updates[number], weight, int(order["clients"]), self.config, turn.threshold)
            values |= {"train_nats": 3 * self.weight * tally.NATS_STEPS, "train_tokens": self.weight, "steps": 2}
        return turn.upload(f"{order['client_sha256']}:{order['trunk_sha256']}", encoded, values)
