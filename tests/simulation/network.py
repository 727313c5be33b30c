"""Flower between an orchestrator and the sites, and all that a network does to messages."""

from __future__ import annotations

import errno
import random
import sqlite3
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import Error, Message, RecordDict
from sqlalchemy.exc import OperationalError

from contract.config import ConfigValue
from tests.simulation.kernel import Kernel
from tests.simulation.weather import Weather

FULL = "no space left on the simulated disk"
LISTED_FOR_S = 20.0
"""How long a node that is gone is still listed as connected."""


class LinkError(Exception):
    """The SuperLink took a message and its answer was lost: Flower raises, and nobody knows."""


class Host(Protocol):
    """A site's SuperNode."""

    name: str

    def receive(self, grid: Grid, message: Message) -> None: ...


@dataclass
class _Node:
    host: Host
    gone_s: float | None = None


@dataclass
class Network:
    """The SuperLink: which nodes there are, and how long messages take. It outlives all orchestrators."""

    kernel: Kernel
    weather: Weather
    rng: random.Random
    nodes: dict[int, _Node] = field(default_factory=dict)

    def connect(self, node_id: int, host: Host) -> None:
        self.nodes[node_id] = _Node(host)

    def disconnect(self, node_id: int) -> None:
        self.nodes[node_id].gone_s = self.kernel.now_s

    def listed(self) -> list[int]:
        now_s = self.kernel.now_s
        return [n for n, node in self.nodes.items() if node.gone_s is None or now_s - node.gone_s < LISTED_FOR_S]

    def strikes(self, chance: float) -> bool:
        """Whether a misfortune of this chance comes now."""
        return chance > 0.0 and self.kernel.now_s < self.weather.clears_s and self.rng.random() < chance

    def held_s(self, name: str, way: str) -> float:
        """How long nothing comes through to a site, or 0."""
        now_s = self.kernel.now_s
        ends = [
            one.end_s - now_s
            for one in self.weather.partitions
            if one.way == way and name in one.cut_off and one.start_s <= now_s < one.end_s
        ]
        return max(ends, default=0.0)

    def spoil_disk(self, place: str) -> None:
        """Raise, where a failpoint stands before something is durable, what a full disk does to who writes there."""
        if not place.endswith(("file.write", ".uncommitted")) or not self.strikes(self.weather.disk_full):
            return
        self.kernel.say(f"the disk is full at {place}")
        if place == "file.write":
            raise OSError(errno.ENOSPC, FULL)
        raise OperationalError(None, None, sqlite3.OperationalError(FULL))

    def delay_s(self, name: str) -> float:
        """How long a message to or from a site takes."""
        delay_s = self.rng.uniform(0.02, 0.3)
        if self.strikes(self.weather.late):
            delay_s += self.rng.expovariate(1.0 / self.weather.late_s)
        return delay_s + self.held_s(name, "grid")


class Grid:
    """One Flower run's way to the nodes (orchestrator.exchange.MessageGrid)."""

    def __init__(
        self,
        network: Network,
        flower_run_id: int,
        values: Mapping[str, ConfigValue],
        heard: Callable[[str, Message, Message], None],
    ) -> None:
        """`values` is the run config that sites are given; `heard` is told of each reply that a site let go."""
        self._network = network
        self.flower_run_id = flower_run_id
        self.values = dict(values)
        self._heard = heard
        self._sent = 0
        self._replies: dict[str, list[Message]] = {}
        self.pushed: Callable[[Message], None] = lambda message: None
        self.looked: Callable[[], None] = lambda: None

    def get_node_ids(self) -> Collection[int]:
        self.looked()
        return self._network.listed()

    def push_messages(self, messages: list[Message]) -> Collection[str | None]:
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: list[str]) -> Collection[Message]:
        return [reply for message_id in message_ids for reply in self._replies.pop(message_id, [])]

    def _push(self, message: Message) -> str | None:
        network, kernel = self._network, self._network.kernel
        node_id = message.metadata.dst_node_id
        self.pushed(message)
        if network.strikes(network.weather.refused) or node_id not in network.nodes:
            kernel.say(f"run {self.flower_run_id} message to {node_id} refused")
            return None
        self._sent += 1
        message_id = f"{self.flower_run_id}.{self._sent}"
        message.metadata.__dict__["_message_id"] = message_id
        host = network.nodes[node_id].host
        kernel.say(f"sent {message_id} {message.metadata.message_type} to {host.name}")
        copies = 0 if network.strikes(network.weather.message_lost) else 1
        if copies and network.strikes(network.weather.duplicated):
            copies = 2
        for _ in range(copies):
            kernel.at(network.delay_s(host.name), lambda: self._deliver(node_id, message))
        if network.strikes(network.weather.ack_lost):
            raise LinkError(f"the SuperLink's answer to message {message_id} was lost")
        return message_id

    def _deliver(self, node_id: int, message: Message) -> None:
        node = self._network.nodes[node_id]
        if node.gone_s is None:
            node.host.receive(self, message)
        elif self._network.kernel.now_s - node.gone_s < LISTED_FOR_S:  # it may come back under this id
            self._network.kernel.at(1.0, lambda: self._deliver(node_id, message))

    def reply(self, name: str, message: Message, content: RecordDict | Error) -> None:
        """A site's answer sets out; from now on it counts as known to the world, whether it arrives or not."""
        network = self._network
        answer: Any = Message(content, reply_to=message)  # type: ignore[call-overload]
        self._heard(name, message, answer)
        if network.strikes(network.weather.reply_lost):
            network.kernel.say(f"the reply to {message.metadata.message_id} is lost")
            return
        network.kernel.at(network.delay_s(name), lambda: self._arrive(message.metadata.message_id, answer))

    def _arrive(self, message_id: str, answer: Message) -> None:
        self._replies.setdefault(message_id, []).append(answer)
