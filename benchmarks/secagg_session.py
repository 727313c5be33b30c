"""One session of the secure sum in one process, as its parties would play it, each on its own meter.

A member goes from message to message by what it kept, as it would on a node, and its vector exists only while it
uploads. What everybody said is recorded, so that the server's whole work, or one member's, can be read again.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregation.graph import GraphPlan
from aggregation.ring import FixedPoint, RingVector, plan, zeros
from aggregation.secure_client import SecureClient
from aggregation.secure_server import SecureServer
from aggregation.terms import Member, Policy, Terms
from benchmarks.meters import Meter, Stopwatch

ADAPTER = "ad" * 32
RING_BITS = 32
MAX_WEIGHT = 1000
CLIP = 1.0
CORRUPT = 0.05
_NONCE = bytes(16)

Answer = tuple[str, bytes]
"""A member's id and what it said."""


class Load:
    """What is summed, by whom, and how many are gone once they have shared their secrets."""

    def __init__(self, graph: GraphPlan, size: int, drop: float, seed: int = 0) -> None:
        self._seed = seed
        self.size = size
        self.fixed: FixedPoint = plan(graph.members, MAX_WEIGHT, CLIP)
        rng = np.random.default_rng([seed, graph.members])
        ids = [f"client-{number:04}" for number in range(graph.members)]
        self.identities = {client_id: Ed25519PrivateKey.from_private_bytes(rng.bytes(32)) for client_id in ids}
        members = tuple(Member(one, key.public_key().public_bytes_raw()) for one, key in self.identities.items())
        self.roster = {member.client_id: member.identity_key for member in members}
        self.policy = Policy(min_members=2, corrupt=CORRUPT, dropout=drop, min_ring=2)
        # The last element of an encoded vector is the member's weight.
        fields = (members, graph.threshold, graph.degree, size + 1, RING_BITS)
        self.terms = Terms("benchmark", 1, _NONCE, *fields, "f" * 64, "5" * 64)
        self.gone = frozenset(rng.choice(ids, round(drop * graph.members), replace=False).tolist())

    @property
    def survivors(self) -> list[str]:
        return [client_id for client_id in self.identities if client_id not in self.gone]

    def update(self, client_id: str) -> npt.NDArray[np.float32]:
        """The member's update, the same whenever asked."""
        draw = np.random.default_rng([self._seed, self.terms.number_of(client_id)])
        return draw.random(self.size, dtype=np.float32) - np.float32(0.5)

    def weight(self, client_id: str) -> int:
        return 1 + self.terms.number_of(client_id) % MAX_WEIGHT


class Player:
    """One member, read by `meter` in each of its stages, encoding and all that it keeps included."""

    def __init__(self, load: Load, client_id: str, meter: Meter) -> None:
        self._load, self._client_id, self._meter = load, client_id, meter
        self.kept = b""

    def join(self) -> None:
        load, name = self._load, self._client_id
        with self._meter.running("join"):
            client = SecureClient.join(load.terms, name, load.identities[name], load.policy, load.roster, os.urandom)
            self.kept = client.to_bytes()

    def advert(self) -> bytes:
        return self._act("advert", lambda client: client.advert())

    def share(self, adverts: bytes) -> bytes:
        return self._act("share", lambda client: client.share(adverts, os.urandom))

    def encode(self) -> RingVector:
        update, weight = self._load.update(self._client_id), self._load.weight(self._client_id)
        with self._meter.running("encode"):
            return self._load.fixed.encode(update, weight)

    def upload(self, vector: RingVector, inbox: bytes) -> bytes:
        return self._act("upload", lambda client: client.upload(vector, ADAPTER, inbox))

    def confirm(self, survivors: bytes) -> bytes:
        return self._act("confirm", lambda client: client.confirm(survivors))

    def unmask(self, request: bytes) -> bytes:
        return self._act("unmask", lambda client: client.unmask(request))

    def _act(self, stage: str, act: Callable[[SecureClient], bytes]) -> bytes:
        with self._meter.running(stage):
            client = SecureClient.from_bytes(self.kept, self._load.identities[self._client_id])
            answer = act(client)
            self.kept = client.to_bytes()
        return answer


class Voices(Protocol):
    """What the members say to what the server sends, stage by stage."""

    def adverts(self) -> Iterator[Answer]: ...
    def shares(self, adverts: bytes) -> Iterator[Answer]: ...
    def uploads(self, inbox: Callable[[str], bytes]) -> Iterator[Answer]: ...
    def confirmations(self, survivors: bytes) -> Iterator[Answer]: ...
    def answers(self, request: bytes) -> Iterator[Answer]: ...


def serve(terms: Terms, voices: Voices, meter: Meter) -> RingVector:
    """The server's whole work, read by `meter`; nothing that the members do is."""
    with meter.running("setup"):
        server = SecureServer(terms, ADAPTER)

    def take(stage: str, accept: Callable[[str, bytes], None], said: Iterable[Answer]) -> None:
        for client_id, data in said:
            with meter.running(stage):
                accept(client_id, data)

    def inbox(client_id: str) -> bytes:
        with meter.running("upload"):
            return server.inbox(client_id)

    take("advert", server.accept_advert, voices.adverts())
    with meter.running("advert"):
        adverts = server.adverts()
    take("share", server.accept_shares, voices.shares(adverts))
    take("upload", server.accept_upload, voices.uploads(inbox))
    with meter.running("confirm"):
        survivors = server.survivors_message()
    take("confirm", server.accept_confirmation, voices.confirmations(survivors))
    with meter.running("unmask"):
        request = server.unmask_request()
    take("unmask", server.accept_answer, voices.answers(request))
    with meter.running("finish"):
        return server.finish()


@dataclass
class Said:
    """Everything that was said in a session, to be said again; `told` is by stage and, where it differs, by member."""

    ups: defaultdict[str, list[Answer]] = field(default_factory=lambda: defaultdict(list))
    told: dict[str, bytes] = field(default_factory=dict)
    inboxes: dict[str, bytes] = field(default_factory=dict)
    joined: dict[str, bytes] = field(default_factory=dict)

    def adverts(self) -> Iterator[Answer]:
        return iter(self.ups["advert"])

    def shares(self, adverts: bytes) -> Iterator[Answer]:
        return iter(self.ups["share"])

    def uploads(self, inbox: Callable[[str], bytes]) -> Iterator[Answer]:
        for client_id, data in self.ups["upload"]:
            inbox(client_id)
            yield client_id, data

    def confirmations(self, survivors: bytes) -> Iterator[Answer]:
        return iter(self.ups["confirm"])

    def answers(self, request: bytes) -> Iterator[Answer]:
        return iter(self.ups["unmask"])

    def replay(self, load: Load, client_id: str, meter: Meter) -> None:
        """One member's whole work again, on what it was told."""
        player = Player(load, client_id, meter)
        player.join()
        player.advert()
        player.kept = self.joined[client_id]  # what was told answers this advert, not the one just made
        player.share(self.told["share"])
        uploaded = player.upload(player.encode(), self.inboxes[client_id])
        if uploaded != dict(self.ups["upload"])[client_id]:
            raise AssertionError(f"{client_id} uploaded something else than before")
        player.confirm(self.told["confirm"])
        player.unmask(self.told["unmask"])

    def bytes_of(self, load: Load, client_id: str) -> tuple[dict[str, int], dict[str, int]]:
        """Up and down of one member, by stage; the session's terms come with the first."""
        told = {"advert": load.terms.to_bytes(), **self.told, "upload": self.inboxes[client_id]}
        up = {stage: len(dict(said)[client_id]) for stage, said in self.ups.items()}
        return up, {stage: len(told[stage]) for stage in up}


class Cohort:
    """The members of a session, live: their stopwatches, what they said, and the plain sum of their vectors."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self.said = Said()
        self.watches = {client_id: Stopwatch() for client_id in load.identities}
        self.plain = zeros(load.terms.size, RING_BITS)
        self._players = {client_id: Player(load, client_id, watch) for client_id, watch in self.watches.items()}

    def adverts(self) -> Iterator[Answer]:
        for client_id, player in self._players.items():
            player.join()
            self.said.joined[client_id] = player.kept
            yield self._say("advert", client_id, player.advert())

    def shares(self, adverts: bytes) -> Iterator[Answer]:
        self.said.told["share"] = adverts
        for client_id, player in self._players.items():
            yield self._say("share", client_id, player.share(adverts))

    def uploads(self, inbox: Callable[[str], bytes]) -> Iterator[Answer]:
        for client_id in self._load.survivors:
            told = self.said.inboxes[client_id] = inbox(client_id)
            vector = self._players[client_id].encode()
            self.plain += vector
            yield self._say("upload", client_id, self._players[client_id].upload(vector, told))

    def confirmations(self, survivors: bytes) -> Iterator[Answer]:
        self.said.told["confirm"] = survivors
        for client_id in self._load.survivors:
            yield self._say("confirm", client_id, self._players[client_id].confirm(survivors))

    def answers(self, request: bytes) -> Iterator[Answer]:
        self.said.told["unmask"] = request
        for client_id in self._load.survivors:
            yield self._say("unmask", client_id, self._players[client_id].unmask(request))

    def _say(self, stage: str, client_id: str, data: bytes) -> Answer:
        self.said.ups[stage].append((client_id, data))
        return client_id, data
