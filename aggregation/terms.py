"""What the parties of one secure sum agree on, the id that hashes all of it, and what a member insists on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from aggregation.graph import FULL_GRAPH_LIMIT, GraphPlan, full_threshold, is_safe
from aggregation.keys import KEY_BYTES, digest
from contract import secagg_pb2 as pb
from contract.errors import SecureSumError

PROTOCOL = 1
NONCE_BYTES = 16
MAX_MEMBERS = 1 << 14
RING_BITS = (32, 64)
DEFAULT_MIN_MEMBERS = 10
DEFAULT_MAX_WEIGHT = 1 << 24


@dataclass(frozen=True, slots=True)
class Member:
    """One of the roster: its id and its Ed25519 public key, 32 bytes."""

    client_id: str
    identity_key: bytes


@dataclass(frozen=True, slots=True)
class Terms:
    """One session: one attempt at one round's sum. Members are sorted by id; a member's number is its place.

    `settings_sha256` stands for whatever else must be the same everywhere, such as the fixed point. Raises
    SecureSumError, naming the field, where they are no terms that any party may accept.
    """

    run: str
    round: int
    nonce: bytes
    members: tuple[Member, ...]
    threshold: int
    degree: int
    size: int
    ring_bits: int
    model_fingerprint: str
    settings_sha256: str

    def __post_init__(self) -> None:
        ids = [member.client_id for member in self.members]
        _require(2 <= len(ids) <= MAX_MEMBERS, f"{len(ids)} members; a session has 2 to {MAX_MEMBERS}")
        _require(ids == sorted(set(ids)), "the members are not in order, or one is named twice")
        keys = {member.identity_key for member in self.members}
        _require(len(keys) == len(ids), "two members have the same identity key")
        _require(all(len(key) == KEY_BYTES for key in keys), f"an identity key is not {KEY_BYTES} bytes")
        _require(len(self.nonce) == NONCE_BYTES, f"the nonce has {len(self.nonce)} bytes; it must have {NONCE_BYTES}")
        _require(self.ring_bits in RING_BITS, f"ring_bits is {self.ring_bits}; it must be 32 or 64")
        _require(0 <= self.round < 1 << 32, f"the round is {self.round}; it must be 0 or more")
        _require(self.size >= 1, f"size is {self.size}; a vector has at least one element")
        _require(self.degree % 2 == 0 and self.degree < len(ids), f"degree is {self.degree}; it must be even, below N")
        most = self.plan.neighbourhood
        _require(
            most < 2 * self.threshold <= 2 * most,
            f"threshold is {self.threshold}; it must be more than half of {most}, and at most that",
        )

    @property
    def plan(self) -> GraphPlan:
        return GraphPlan(len(self.members), self.degree, self.threshold)

    @property
    def session_id(self) -> bytes:
        """SHA-256 over every field."""
        members = [part for member in self.members for part in (member.client_id, member.identity_key)]
        numbers = (PROTOCOL, self.round, self.threshold, self.degree, self.size, self.ring_bits)
        texts = (self.run, self.model_fingerprint, self.settings_sha256)
        return digest("session", *numbers, *texts, self.nonce, digest("members", *members))

    def id_of(self, identity_key: bytes) -> str:
        """The id of the member with this key; raises SecureSumError where it is no member's."""
        for member in self.members:
            if member.identity_key == identity_key:
                return member.client_id
        raise SecureSumError("the session does not name this client's identity key")

    def number_of(self, client_id: str) -> int:
        """The member's number; raises SecureSumError where it is none."""
        for number, member in enumerate(self.members):
            if member.client_id == client_id:
                return number
        raise SecureSumError(f"client {client_id} is not among the session's members")

    def to_bytes(self) -> bytes:
        return pb.Terms(
            protocol=PROTOCOL,
            run=self.run,
            round=self.round,
            nonce=self.nonce,
            members=[pb.Member(client_id=one.client_id, identity_key=one.identity_key) for one in self.members],
            threshold=self.threshold,
            degree=self.degree,
            size=self.size,
            ring_bits=self.ring_bits,
            model_fingerprint=self.model_fingerprint,
            settings_sha256=self.settings_sha256,
        ).SerializeToString()

    @classmethod
    def from_bytes(cls, data: bytes) -> Terms:
        """Raises SecureSumError where `data` is no terms, or terms of another protocol."""
        try:
            read = pb.Terms.FromString(data)
        except DecodeError as error:
            raise SecureSumError("the session's terms cannot be read") from error
        _require(read.protocol == PROTOCOL, f"the terms are of protocol {read.protocol}; this is {PROTOCOL}")
        return cls(
            run=read.run,
            round=read.round,
            nonce=read.nonce,
            members=tuple(Member(one.client_id, one.identity_key) for one in read.members),
            threshold=read.threshold,
            degree=read.degree,
            size=read.size,
            ring_bits=read.ring_bits,
            model_fingerprint=read.model_fingerprint,
            settings_sha256=read.settings_sha256,
        )


@dataclass(frozen=True, slots=True)
class Policy:
    """What a member insists on, whatever a server proposes.

    `min_threshold` 0 means floor(2N/3) + 1 of the full graph, and for a ring one that is safe with a fraction
    `corrupt` of the members on the server's side while up to a fraction `dropout` is not heard at all.
    """

    min_members: int = DEFAULT_MIN_MEMBERS
    min_threshold: int = 0
    corrupt: float = 0.05
    dropout: float = 0.1
    min_ring: int = FULL_GRAPH_LIMIT + 1
    """Fewest members of a ring: with fewer the full graph is cheap, and safer."""
    max_weight: int = DEFAULT_MAX_WEIGHT
    """Most trained tokens that one client may put into the balance."""

    def __post_init__(self) -> None:
        for name, value in (("corrupt", self.corrupt), ("dropout", self.dropout)):
            _require(0 <= value < 1, f"{name} is {value}; it must be a fraction, at least 0 and below 1")

    def check(self, terms: Terms, roster: Mapping[str, bytes]) -> None:
        """Raise SecureSumError, with the reason, unless `terms` keep to this policy and name only the roster's keys."""
        count, threshold = len(terms.members), terms.threshold
        _require(
            count >= self.min_members,
            f"the session has {count} members; this client takes part in no sum over fewer than {self.min_members} "
            "(secagg-min-members in its node config)",
        )
        floor = self.min_threshold or (full_threshold(count) if not terms.degree else 0)
        _require(
            threshold >= floor,
            f"the session's threshold is {threshold} of {terms.plan.neighbourhood}; this client wants at least {floor} "
            "(secagg-min-threshold in its node config)",
        )
        _require(
            not terms.degree or count >= self.min_ring,
            f"the session gives each of {count} members {terms.degree} neighbours; below {self.min_ring} this client "
            "wants everybody to be everybody's",
        )
        for member in terms.members:
            _require(
                roster.get(member.client_id) == member.identity_key,
                f"client {member.client_id} is not in this client's roster with that key",
            )
        if terms.degree:
            traitors = math.ceil(self.corrupt * count)
            _require(
                all(is_safe(GraphPlan(n, terms.degree, threshold), traitors) for n in (count, self.fewest(terms))),
                f"{terms.degree} neighbours with a threshold of {threshold} are not safe against {traitors} corrupt "
                f"members of {count}, of whom {self.fewest(terms)} may be all that advertise",
            )

    def check_weight(self, max_weight: int) -> None:
        """Raise SecureSumError where a run lets one client weigh more than this policy does."""
        _require(
            max_weight <= self.max_weight,
            f"the run lets a client train on {max_weight} tokens in a round; this client takes part with no more than "
            f"{self.max_weight} (secagg-max-weight in its node config)",
        )

    def fewest(self, terms: Terms) -> int:
        """How many must advertise: a server that chooses who is heard could make a ring's corrupt ones a majority."""
        count = len(terms.members)
        return count - math.floor(self.dropout * count) if terms.degree else terms.threshold


def greeting_message(run: str, client_id: str, nonce: bytes, *declared: str) -> bytes:
    """What a client signs at its first contact in a run: that Flower's node speaks for its identity.

    `declared` are its name and its dataset's, in a run whose privacy budgets are kept by them.
    """
    return digest("greeting", run, client_id, nonce, *declared)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SecureSumError(message)
