"""The server's half of a secure sum: carries keys and shares between members, adds what is masked, learns the sum.

It holds one vector whatever the number of members. What it could do wrong is held off by `secure_client`; what a member
does wrong is refused here by name and leaves the sum as it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import numpy as np

from aggregation import keys, shamir
from aggregation.graph import neighbours
from aggregation.masks import add_mask
from aggregation.ring import RingVector, zeros
from aggregation.secure_client import (
    adverts_sha256,
    check_advert,
    check_adverts,
    pair_mask_key,
    parsed,
    self_mask_key,
    survivors_message,
)
from aggregation.terms import Terms
from contract import secagg_pb2 as pb
from contract.errors import SecureSumError

_NONE, _ADVERTISING, _SHARING, _UPLOADING, _CONFIRMING, _UNMASKING = range(-1, 5)


class SecureServer:
    """One session. Each stage's `accept_...` takes one member's answer; asking for the next stage's message ends it.

    Every `accept_...` raises SecureSumError, and changes nothing, for an answer that is not what is due; what begins a
    stage raises it when fewer than the threshold are left.
    """

    def __init__(self, terms: Terms, adapter_sha256: str = "") -> None:
        self.terms = terms
        self._session_id = terms.session_id
        self._adapter_sha256 = adapter_sha256
        self._adverts: dict[int, pb.Advert] = {}
        self._public: set[bytes] = set()
        # No secret: it only shows, before all members stumble over it, a key with which nobody can agree.
        self._probe = keys.digest("probe", self._session_id)
        self._graph: dict[int, frozenset[int]] = {}
        self._inboxes: defaultdict[int, list[pb.SealedShare]] = defaultdict(list)
        self._shared: set[int] = set()
        self._total = zeros(terms.size, terms.ring_bits)
        self._survivors: set[int] = set()
        self._confirmations: dict[int, bytes] = {}
        self._seeds: defaultdict[int, dict[int, bytes]] = defaultdict(dict)
        self._masking: defaultdict[int, dict[int, bytes]] = defaultdict(dict)
        self._answered: set[int] = set()
        self._ended = _NONE

    def accept_advert(self, client_id: str, data: bytes) -> None:
        """Stage 0, from one member."""
        member = self._new(client_id, self._adverts.keys(), "advertised its keys")
        advert = parsed(pb.Advert, data, f"what client {client_id} sent")
        self._require_open(_ADVERTISING, f"client {client_id} advertised its keys")
        if advert.member != member:
            raise SecureSumError(f"client {client_id} advertised the keys of member {advert.member}")
        public = set(self._public)
        check_advert(self.terms, self._session_id, advert, public)
        for key in (advert.sealing_key, advert.masking_key):
            keys.agree(self._probe, key, f"client {client_id}")
        self._adverts[member], self._public = advert, public

    def adverts(self) -> bytes:
        """Ends stage 0: what every member who advertised is told for stage 1."""
        listed = [self._adverts[member] for member in sorted(self._adverts)]
        check_adverts(self.terms, self._session_id, listed)
        self._ended = max(self._ended, _ADVERTISING)
        digest = adverts_sha256(self._adverts)
        self._graph = neighbours(sorted(self._adverts), self.terms.degree, self._session_id, digest)
        return pb.Adverts(adverts=listed).SerializeToString()

    def accept_shares(self, client_id: str, data: bytes) -> None:
        """Stage 1, from one member."""
        member = self._new(client_id, self._shared, "shared its secrets")
        self._require_open(_SHARING, f"client {client_id} shared its secrets")
        shares = parsed(pb.SealedShares, data, f"what client {client_id} sent").shares
        if self._graph.get(member) is None:
            raise SecureSumError(f"client {client_id} shared its secrets without having advertised its keys")
        receivers = [share.member for share in shares]
        if len(set(receivers)) != len(receivers) or set(receivers) != self._graph[member]:
            raise SecureSumError(f"client {client_id} shared its secrets with others than its neighbours")
        for share in shares:
            self._inboxes[share.member].append(pb.SealedShare(member=member, sealed=share.sealed))
        self._shared.add(member)

    def inbox(self, client_id: str) -> bytes:
        """What a member who shared is told for stage 2."""
        self._require_enough(self._shared, "shared their secrets")
        self._ended = max(self._ended, _SHARING)
        member = self.terms.number_of(client_id)
        if member not in self._shared:
            raise SecureSumError(f"client {client_id} shared no secrets in this session")
        return pb.SealedShares(shares=self._inboxes[member]).SerializeToString()

    def train_from(self, adapter_sha256: str) -> None:
        """Name the adapter that members get to train, where it was not known when they advertised their keys."""
        if self._survivors:
            raise SecureSumError("the session's adapter cannot change once a vector is in the sum")
        self._adapter_sha256 = adapter_sha256

    def accept_upload(self, client_id: str, data: bytes) -> None:
        """Stage 2, from one member: its masked vector is added and let go."""
        member = self._new(client_id, self._survivors, "uploaded a vector")
        self._require_open(_UPLOADING, f"client {client_id} uploaded a vector")
        if member not in self._shared:
            raise SecureSumError(f"client {client_id} uploaded a vector without having shared its secrets")
        due_bytes = self._total.nbytes
        if len(data) != due_bytes:
            fault = "truncated" if len(data) < due_bytes else "oversized"
            raise SecureSumError(
                f"client {client_id} uploaded a {fault} vector: {len(data)} bytes, {due_bytes} are due"
            )
        word = self._total.dtype.newbyteorder("<")
        np.add(self._total, np.frombuffer(data, dtype=word), out=self._total)
        self._survivors.add(member)

    @property
    def advertised(self) -> tuple[str, ...]:
        """The ids of those whose keys are known."""
        return tuple(self.terms.members[member].client_id for member in sorted(self._adverts))

    @property
    def survivors(self) -> tuple[str, ...]:
        """The ids of those whose vectors are in the sum."""
        return tuple(self.terms.members[member].client_id for member in sorted(self._survivors))

    def survivors_message(self) -> bytes:
        """Ends stage 2: what every survivor is asked to confirm."""
        self._require_enough(self._survivors, "uploaded a vector")
        self._ended = max(self._ended, _UPLOADING)
        return pb.Survivors(members=sorted(self._survivors)).SerializeToString()

    def accept_confirmation(self, client_id: str, data: bytes) -> None:
        """Stage 3, from one survivor."""
        member = self._new(client_id, self._confirmations.keys(), "confirmed the survivors")
        self._require_open(_CONFIRMING, f"client {client_id} confirmed the survivors")
        confirmation = parsed(pb.Confirmation, data, f"what client {client_id} sent")
        if member not in self._survivors or confirmation.member != member:
            raise SecureSumError(f"client {client_id} confirmed survivors without being one, or for another")
        message = survivors_message(self._session_id, self._adapter_sha256, sorted(self._survivors))
        identity_key = self.terms.members[member].identity_key
        keys.verify(identity_key, confirmation.signature, message, f"the confirmation of client {client_id}")
        self._confirmations[member] = confirmation.signature

    def unmask_request(self) -> bytes:
        """Ends stage 3: what every one who confirmed is asked."""
        self._require_enough(self._confirmations.keys(), "confirmed the survivors")
        self._ended = max(self._ended, _CONFIRMING)
        request = pb.UnmaskRequest(survivors=sorted(self._survivors), dropped=sorted(self._shared - self._survivors))
        for member, signature in sorted(self._confirmations.items()):
            request.confirmations.append(pb.Confirmation(member=member, signature=signature))
        return request.SerializeToString()

    def accept_answer(self, client_id: str, data: bytes) -> None:
        """Stage 4, from one who confirmed."""
        member = self._new(client_id, self._answered, "answered")
        self._require_open(_UNMASKING, f"client {client_id} answered")
        if member not in self._confirmations:
            raise SecureSumError(f"client {client_id} answered without having confirmed the survivors")
        answer = parsed(pb.UnmaskAnswer, data, f"what client {client_id} sent")
        hood = (self._graph[member] | {member}) & self._shared
        seeds = {share.member: share.value for share in answer.seeds}
        masking = {share.member: share.value for share in answer.masking_keys}
        if seeds.keys() != hood & self._survivors or masking.keys() != hood - self._survivors:
            raise SecureSumError(f"client {client_id} answered with other shares than it was asked for")
        for value in (*seeds.values(), *masking.values()):
            shamir.element(value, f"a share from client {client_id}")
        for of_member, value in seeds.items():
            self._seeds[of_member][member + 1] = value
        for of_member, value in masking.items():
            self._masking[of_member][member + 1] = value
        self._answered.add(member)

    def finish(self) -> RingVector:
        """The ring sum over the survivors, shape (size,). Raises SecureSumError where too few answered, or falsely."""
        self._require_open(_UNMASKING, "the sum is asked for a second time, or was")
        self._require_enough(self._answered, "answered")
        self._ended = _UNMASKING
        weights: dict[int, int] = {}
        for member in sorted(self._survivors):
            seed, weights = self._combined(self._seeds.pop(member, {}), member, weights)
            if keys.digest("seed", self._session_id, member, seed) != self._adverts[member].seed_sha256:
                raise SecureSumError(f"the shares of {self._name(member)}'s seed do not give it: one of them is false")
            key = self_mask_key(seed, self._session_id, member, self._adapter_sha256)
            add_mask(self._total, key, negative=True)
        for member in sorted(self._shared - self._survivors):
            secret, weights = self._combined(self._masking.pop(member, {}), member, weights)
            if keys.public_bytes(secret) != self._adverts[member].masking_key:
                raise SecureSumError(f"the shares of {self._name(member)}'s key do not give it: one of them is false")
            self._remove_pair_masks(member, secret)
        return self._total

    def _remove_pair_masks(self, gone: int, secret: bytes) -> None:
        """Take away what each surviving neighbour added for the mask that it shares with `gone`."""
        for other in sorted(self._graph[gone] & self._survivors):
            agreed = keys.agree(secret, self._adverts[other].masking_key, self._name(other))
            key = pair_mask_key(agreed, self._session_id, gone, other, self._adapter_sha256)
            add_mask(self._total, key, negative=not gone < other)

    def _combined(
        self, shares: Mapping[int, bytes], member: int, weights: dict[int, int]
    ) -> tuple[bytes, dict[int, int]]:
        """The secret, and the weights of its points, which `weights` are where the last member had the same ones."""
        points = tuple(sorted(shares)[: self.terms.threshold])
        if len(points) < self.terms.threshold:
            raise SecureSumError(
                f"{len(points)} shares of {self._name(member)}'s secret came; the threshold is {self.terms.threshold}"
            )
        if tuple(weights) != points:
            weights = shamir.weights_at_zero(points)
        return shamir.combine({point: shares[point] for point in points}, weights), weights

    def _new(self, client_id: str, done: Collection[int], act: str) -> int:
        member = self.terms.number_of(client_id)
        if member in done:
            raise SecureSumError(f"client {client_id} has {act} already; the first one counts")
        return member

    def _require_open(self, stage: int, act: str) -> None:
        if self._ended >= stage:
            raise SecureSumError(f"{act} too late: that stage has ended")

    def _require_enough(self, members: Collection[int], act: str) -> None:
        count = len(members)
        if count < self.terms.threshold:
            raise SecureSumError(f"only {count} of {len(self.terms.members)} {act}; threshold {self.terms.threshold}")

    def _name(self, member: int) -> str:
        return f"client {self.terms.members[member].client_id}"
