"""A whole secure sum in one process: members, a server that carries what they say, and who drops out when."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregation.ring import RingVector
from aggregation.secure_client import SecureClient
from aggregation.secure_server import SecureServer
from aggregation.shamir import Entropy
from aggregation.terms import Member, Policy, Terms

ADAPTER = "ad" * 32
ANYTHING_GOES = Policy(min_members=2, min_threshold=1, corrupt=0.0, min_ring=2)


@dataclass
class Cohort:
    """Members of one session that have joined, and the server."""

    terms: Terms
    identities: Mapping[str, Ed25519PrivateKey]
    entropy: Entropy = os.urandom
    policy: Policy = ANYTHING_GOES
    members: dict[str, SecureClient] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.server = SecureServer(self.terms, ADAPTER)
        for client_id in self.identities:
            self.members[client_id] = self.join(client_id)

    def join(self, client_id: str) -> SecureClient:
        return SecureClient.join(
            self.terms, client_id, self.identities[client_id], self.policy, self.roster, self.entropy
        )

    @property
    def roster(self) -> dict[str, bytes]:
        return {member.client_id: member.identity_key for member in self.terms.members}

    def reload(self, client_id: str) -> SecureClient:
        """As a new process would find the member: from what it kept."""
        kept = self.members[client_id].to_bytes()
        self.members[client_id] = SecureClient.from_bytes(kept, self.identities[client_id])
        return self.members[client_id]

    def advertise(self, who: Collection[str]) -> bytes:
        for client_id in who:
            self.server.accept_advert(client_id, self.reload(client_id).advert())
        return self.server.adverts()

    def share(self, who: Collection[str], adverts: bytes) -> None:
        for client_id in who:
            self.server.accept_shares(client_id, self.reload(client_id).share(adverts, self.entropy))

    def upload(self, who: Collection[str], vectors: Mapping[str, RingVector]) -> None:
        for client_id in who:
            inbox = self.server.inbox(client_id)
            uploaded = self.reload(client_id).upload(vectors[client_id].copy(), ADAPTER, inbox)
            self.server.accept_upload(client_id, uploaded)

    def confirm(self, who: Collection[str]) -> None:
        message = self.server.survivors_message()
        for client_id in who:
            self.server.accept_confirmation(client_id, self.reload(client_id).confirm(message))

    def unmask(self, who: Collection[str]) -> RingVector:
        request = self.server.unmask_request()
        for client_id in who:
            self.server.accept_answer(client_id, self.reload(client_id).unmask(request))
        return self.server.finish()

    def play(self, vectors: Mapping[str, RingVector], gone: Sequence[Collection[str]] = ()) -> RingVector:
        """The sum; the clients in `gone[stage]` answer nothing from that stage on."""
        left = set(self.identities)
        groups = []
        for stage in range(5):
            left -= set(gone[stage]) if stage < len(gone) else set()
            groups.append(sorted(left))
        adverts = self.advertise(groups[0])
        self.share(groups[1], adverts)
        self.upload(groups[2], vectors)
        self.confirm(groups[3])
        return self.unmask(groups[4])


def identities_of(count: int, seed: int = 0) -> dict[str, Ed25519PrivateKey]:
    """Keys from a seed: the same in every process, and no secret."""
    rng = np.random.default_rng([seed, count])
    return {f"client-{n:04}": Ed25519PrivateKey.from_private_bytes(rng.bytes(32)) for n in range(count)}


def terms_of(identities: Mapping[str, Ed25519PrivateKey], **changes: object) -> Terms:
    members = tuple(
        Member(client_id, key.public_key().public_bytes_raw()) for client_id, key in sorted(identities.items())
    )
    fields: dict[str, object] = {
        "run": "a run",
        "round": 1,
        "nonce": bytes(16),
        "members": members,
        "threshold": 2 * len(members) // 3 + 1,
        "degree": 0,
        "size": 50,
        "ring_bits": 32,
        "model_fingerprint": "f" * 64,
        "settings_sha256": "5" * 64,
    }
    return Terms(**(fields | changes))  # type: ignore[arg-type]


def cohort_of(count: int, seed: int = 0, **changes: object) -> Cohort:
    identities = identities_of(count, seed)
    return Cohort(terms_of(identities, **changes), identities)


def vectors_of(cohort: Cohort, seed: int = 0) -> dict[str, RingVector]:
    rng = np.random.default_rng(seed)
    top = 1 << cohort.terms.ring_bits
    kind = np.uint32 if cohort.terms.ring_bits == 32 else np.uint64
    return {client_id: rng.integers(0, top, cohort.terms.size, dtype=kind) for client_id in cohort.identities}


def plain_sum(cohort: Cohort, vectors: Mapping[str, RingVector], who: Collection[str]) -> RingVector:
    total = np.zeros_like(next(iter(vectors.values())))
    for client_id in who:
        total += vectors[client_id]
    return total
