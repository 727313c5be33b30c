"""A clock that only waits on paper, a Grid of scripted nodes, and clients whose training is arithmetic.

The clients' halves are the real ones: the real fixed point and upload, and real contributions on a real trunk's disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from aggregation.protocol import PlainSumClient
from aggregation.ring import plan
from contract import adapter
from contract.config import RunConfig
from contract.records import Factor, RoundKey
from server_trunk.contributions import Contributions

Content = RecordDict | Error


class FakeClock:
    """Time passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


@dataclass
class FakeNode:
    """Answers each message with what `work` makes of it, `after_s` later; `work` None answers never."""

    work: Callable[[Message], Content] | None
    after_s: float = 0.2
    connects_after_s: float = 0.0


class FakeGrid:
    """A Grid over FakeNodes: a node handles one message at a time, as Flower's do."""

    def __init__(self, clock: FakeClock, nodes: dict[int, FakeNode]) -> None:
        self._clock = clock
        self._opened = clock.now
        self.nodes = nodes
        self.sent: list[Message] = []
        self.pulled: list[list[str]] = []
        self.refuse: set[int] = set()
        self.strays: list[Message] = []
        self.silent: Callable[[int, Message], bool] = lambda node_id, message: False
        self.silent_from = 0.0
        self._due: dict[str, tuple[float, Message]] = {}
        self._free_at: dict[int, float] = {}

    def get_node_ids(self) -> Collection[int]:
        return [n for n, node in self.nodes.items() if self._clock.now - self._opened >= node.connects_after_s]

    def push_messages(self, messages: list[Message]) -> Collection[str | None]:
        ids: list[str | None] = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            if node_id in self.refuse:
                ids.append(None)
                continue
            self.sent.append(message)
            message_id = f"m{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = message_id
            ids.append(message_id)
            node = self.nodes[node_id]
            mute = self._clock.now >= self.silent_from and self.silent(node_id, message)
            if node.work is not None and not mute:
                starts = max(self._clock.now, self._free_at.get(node_id, 0.0))
                content = node.work(message)
                self._free_at[node_id] = starts + node.after_s
                self._due[message_id] = (starts + node.after_s, Message(content, reply_to=message))
        return ids

    def pull_messages(self, message_ids: list[str]) -> Collection[Message]:
        self.pulled.append(list(message_ids))
        ready = [self._due.pop(m)[1] for m in message_ids if m in self._due and self._due[m][0] <= self._clock.now]
        strays, self.strays = self.strays, []
        return [*strays, *ready]


@dataclass
class ScriptedClient:
    """Trains by arithmetic: every trained value moves by a fixed small amount of this client's own.

    `weight` is its number of trained tokens; `lost` are the held-out losses that it reports, by round.
    """

    config: RunConfig
    contributions: Contributions
    weight: int = 100
    lost: Callable[[int], float] = lambda number: 5.0 - number
    told_trunk: int | None = None
    orders: list[dict[str, Any]] = field(default_factory=list)
    updates: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)
    received: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    client_names: tuple[str, ...] = ()
    client_sizes: dict[str, int] = field(default_factory=dict)

    def __call__(self, message: Message) -> Content:
        facts = message.content["round"]
        order = dict(facts.items())
        self.orders.append(order)
        number, who = int(order["round"]), str(order["client_id"])
        metrics: dict[str, float | int] = {"eval_loss": self.lost(number - 1), "eval_tokens": 10}
        if order["final"]:
            return RecordDict({"metrics": MetricRecord(metrics)})
        key = RoundKey(str(order["run"]), number, int(order["attempt"]))
        upload = self._train_client_part(message, order, who)
        self._train_trunk_part(order, key, who)
        metrics |= {"train_loss": 3.0, "trained_tokens": self.weight, "steps": 2, "seconds": 0.5}
        update = ArrayRecord({"update": Array(np.frombuffer(upload, dtype=np.uint8))})
        return RecordDict({"update": update, "metrics": MetricRecord(metrics)})

    def _train_client_part(self, message: Message, order: dict[str, Any], who: str) -> bytes:
        vector_d = next(iter(message.content["adapter"].values())).numpy()
        self.received[int(order["round"])] = vector_d
        trainable = set(adapter.trainable_names(self.client_names, order["factor"]))
        size = sum(self.client_sizes[name] for name in trainable)
        delta = drift(size, f"client {who} {order['round']}")
        self.updates[int(order["round"])] = delta
        point = plan(int(order["clients"]), self.config.max_trained_tokens(), self.config.update_clip)
        return PlainSumClient(size + 1).upload(point.encode(delta, self.weight))

    def _train_trunk_part(self, order: dict[str, Any], key: RoundKey, who: str) -> None:
        base = str(order["trunk_sha256"])
        tensors = adapter.from_bytes(self.contributions.adapters.get(base))
        for name in adapter.trainable_names(tensors, order["factor"]):
            moved = drift(tensors[name].numel(), f"trunk {who} {order['round']} {name}")
            tensors[name] += adapter.unflatten(moved, {name: tuple(tensors[name].shape)}, [name])[name]
        weight = self.weight if self.told_trunk is None else self.told_trunk
        self.contributions.add(key, who, base, weight, adapter.to_bytes(tensors))


def drift(size: int, seed: str) -> npt.NDArray[np.float64]:
    """`size` small numbers that follow from `seed`."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little")
    return np.random.default_rng(number).normal(0.0, 0.01, size)


def factor_of(order: dict[str, Any]) -> Factor:
    found: Factor = order["factor"]
    return found


def is_training(message: Message) -> bool:
    facts = message.content["round"]
    return isinstance(facts, ConfigRecord) and not facts["final"]
