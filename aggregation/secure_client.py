"""A member's half of a secure sum: what it says at each stage, and what it refuses to say.

After Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS 2017), figure 4, with
the signed consistency round of its active-adversary variant. What goes beyond it: the session's id in every key and
signature; the hash of the adapter that the member trained in its masks and in what it confirms (after Pasquini et al.,
"Eluding Secure Aggregation in Federated Learning via Model Inconsistency", CCS 2022); no stage is played twice.

A half is a state machine between messages. After each call `to_bytes` gives what must be durable before the call's
answer leaves the member; the last call leaves no secret in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError, Message

from aggregation import keys, shamir
from aggregation.graph import neighbours
from aggregation.masks import add_mask
from aggregation.ring import RingVector
from aggregation.terms import Policy, Terms
from contract import secagg_pb2 as pb
from contract.errors import SecureSumError

Frame = TypeVar("Frame", bound=Message)


class Stage(IntEnum):
    """What a member did last in its session."""

    ADVERTISED = 0
    SHARED = 1
    UPLOADED = 2
    CONFIRMED = 3
    ANSWERED = 4


class SecureClient:
    """One member in one session. Every method raises SecureSumError, with the reason, for what the member refuses."""

    def __init__(self, terms: Terms, identity: Ed25519PrivateKey, state: pb.ClientState) -> None:
        self.terms = terms
        self._session_id = terms.session_id
        self._identity = identity
        self._state = state
        self._hood = {advert.member: advert for advert in state.adverts}

    @classmethod
    def join(
        cls,
        terms: Terms,
        client_id: str,
        identity: Ed25519PrivateKey,
        policy: Policy,
        roster: Mapping[str, bytes],
        entropy: shamir.Entropy,
    ) -> SecureClient:
        """Draw this session's secrets, if `terms` keep to `policy` and name only members of `roster`."""
        policy.check(terms, roster)
        member = terms.number_of(client_id)
        if terms.members[member].identity_key != identity.public_key().public_bytes_raw():
            raise SecureSumError(f"the session names another identity key for client {client_id} than its own")
        state = pb.ClientState(
            terms=terms.to_bytes(),
            member=member,
            stage=Stage.ADVERTISED,
            sealing_secret=shamir.draw_secret(entropy),
            masking_secret=shamir.draw_secret(entropy),
            seed=shamir.draw_secret(entropy),
            fewest=policy.fewest(terms),
        )
        return cls(terms, identity, state)

    @classmethod
    def from_bytes(cls, data: bytes, identity: Ed25519PrivateKey) -> SecureClient:
        """The half that `to_bytes` wrote."""
        state = parsed(pb.ClientState, data, "the session's kept state")
        return cls(Terms.from_bytes(state.terms), identity, state)

    def to_bytes(self) -> bytes:
        return self._state.SerializeToString()

    @property
    def stage(self) -> Stage:
        return Stage(self._state.stage)

    @property
    def member(self) -> int:
        return self._state.member

    def advert(self) -> bytes:
        """Stage 0: the session's public keys, signed. The same bytes however often it is asked for."""
        self._require_stage(Stage.ADVERTISED, "advertise its keys")
        state = self._state
        advert = pb.Advert(
            member=state.member,
            sealing_key=keys.public_bytes(state.sealing_secret),
            masking_key=keys.public_bytes(state.masking_secret),
            seed_sha256=keys.digest("seed", self._session_id, state.member, state.seed),
        )
        advert.signature = keys.sign(self._identity, advert_message(self._session_id, advert))
        return advert.SerializeToString()

    def share(self, adverts: bytes, entropy: shamir.Entropy) -> bytes:
        """Stage 1: both secrets, a share sealed for each neighbour among those who advertised."""
        self._require_stage(Stage.ADVERTISED, "share its secrets")
        read = parsed(pb.Adverts, adverts, "the list of adverts").adverts
        by_member = check_adverts(self.terms, self._session_id, read)
        own = by_member.get(self.member)
        if own is None or own.SerializeToString() != self.advert():
            raise SecureSumError("the list of adverts does not hold this member's own, as it gave it")
        if len(by_member) < self._state.fewest:
            raise SecureSumError(
                f"{len(by_member)} adverts; this client shares with no fewer than {self._state.fewest}"
            )
        hood = sorted({*self._neighbours(by_member), self.member})
        if len(hood) < self.terms.threshold:
            raise SecureSumError(f"only {len(hood)} can hold shares; the threshold is {self.terms.threshold}")
        points = [number + 1 for number in hood]
        seeds = shamir.split(self._state.seed, self.terms.threshold, points, entropy)
        maskings = shamir.split(self._state.masking_secret, self.terms.threshold, points, entropy)
        sealed = []
        for number in hood:
            plain = seeds[number + 1] + maskings[number + 1]
            key, bound_to = self._sealing(by_member[number].sealing_key, self.member, number)
            sealed.append(pb.SealedShare(member=number, sealed=keys.seal(key, plain, bound_to, entropy)))
        mine = next(share for share in sealed if share.member == self.member)
        self._hood = {number: by_member[number] for number in hood}
        self._state.adverts.extend(self._hood.values())
        self._state.inbox.append(mine)
        self._state.stage = Stage.SHARED
        return pb.SealedShares(shares=[share for share in sealed if share is not mine]).SerializeToString()

    def require_turn(self) -> None:
        """Raise SecureSumError unless this member's vector is due, and was never worked on before."""
        self._require_stage(Stage.SHARED, "train")
        if self._state.attempted:
            raise SecureSumError(
                "asked to train, but this session's one turn was taken before, and no vector came of it: "
                "a round tried again is a new session"
            )

    def take_turn(self) -> None:
        """Take the session's one turn. It must be durable before anything is computed from what the server sent.

        Otherwise a server could have turn after turn fail, each with another adapter, and learn from every refusal.
        """
        self.require_turn()
        self._state.attempted = True

    def upload(self, vector: RingVector, adapter_sha256: str, inbox: bytes) -> bytes:
        """Stage 2: `vector`, shape (size,), masked IN PLACE, as little-endian bytes.

        `inbox` holds the shares that neighbours sealed for this member; `adapter_sha256` names what was trained.
        """
        self._require_stage(Stage.SHARED, "upload a vector")
        if vector.shape != (self.terms.size,) or 8 * vector.itemsize != self.terms.ring_bits:
            raise SecureSumError(
                f"the vector is {vector.dtype} of shape {vector.shape}; "
                f"this session sums uint{self.terms.ring_bits} of shape ({self.terms.size},)"
            )
        shares = parsed(pb.SealedShares, inbox, "the inbox of shares").shares
        senders = [share.member for share in shares]
        if len(set(senders)) != len(senders) or not set(senders) <= self._hood.keys() - {self.member}:
            raise SecureSumError("the inbox holds shares from who is no neighbour, or two from one")
        if len(senders) + 1 < self.terms.threshold:
            raise SecureSumError(f"only {len(senders) + 1} shared secrets; the threshold is {self.terms.threshold}")
        for share in shares:
            self._open(share)
        add_mask(vector, self_mask_key(self._state.seed, self._session_id, self.member, adapter_sha256))
        for number in senders:
            agreed = keys.agree(self._state.masking_secret, self._hood[number].masking_key, self._name(number))
            key = pair_mask_key(agreed, self._session_id, self.member, number, adapter_sha256)
            add_mask(vector, key, negative=number < self.member)
        uploaded = vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes()
        self._state.inbox.extend(shares)
        self._state.adapter_sha256 = adapter_sha256
        self._state.upload_sha256 = hashlib.sha256(uploaded).digest()
        self._state.stage = Stage.UPLOADED
        return uploaded

    def confirm(self, survivors: bytes) -> bytes:
        """Stage 3: a signature over who is in the sum. Only one such set is ever signed."""
        self._require_stage(Stage.UPLOADED, "confirm survivors")
        members = list(parsed(pb.Survivors, survivors, "the list of survivors").members)
        check_survivors(self.terms, members)
        if self.member not in members:
            raise SecureSumError("this member uploaded, and is not among the survivors that it is asked to confirm")
        shared = {share.member for share in self._state.inbox}
        strangers = sorted((self._hood.keys() & set(members)) - shared)
        if strangers:
            raise SecureSumError(
                f"{self._name(strangers[0])} is named a survivor but shared no secrets with this member"
            )
        if len(shared & set(members)) < self.terms.threshold:
            raise SecureSumError(
                f"only {len(shared & set(members))} survivors hold this member's shares; "
                f"the threshold is {self.terms.threshold}"
            )
        message = survivors_message(self._session_id, self._state.adapter_sha256, members)
        self._state.survivors.extend(members)
        self._state.stage = Stage.CONFIRMED
        return pb.Confirmation(member=self.member, signature=keys.sign(self._identity, message)).SerializeToString()

    def unmask(self, request: bytes) -> bytes:
        """Stage 4: for each neighbour a share of its seed if it survived, of its masking key if it dropped out.

        Never both, never twice, and only with a threshold of signatures on the survivors that this member confirmed.
        """
        self._require_stage(Stage.CONFIRMED, "help to unmask")
        asked = parsed(pb.UnmaskRequest, request, "the request to unmask")
        survivors, dropped = set(asked.survivors), set(asked.dropped)
        if survivors & dropped:
            both = self._name(min(survivors & dropped))
            raise SecureSumError(f"{both} is named both survivor and dropped out: its vector would be laid open")
        if list(asked.survivors) != list(self._state.survivors):
            raise SecureSumError("the survivors are not those that this member confirmed")
        held = {share.member: share for share in self._state.inbox}
        if (survivors | dropped) & self._hood.keys() != held.keys() or len(dropped) != len(asked.dropped):
            raise SecureSumError("survivors and dropped out do not cover exactly the neighbours whose shares are held")
        self._check_confirmations(asked)
        answer = pb.UnmaskAnswer()
        for number, share in sorted(held.items()):
            seed, masking = self._open(share)
            if number in survivors:
                answer.seeds.append(pb.Share(member=number, value=seed))
            else:
                answer.masking_keys.append(pb.Share(member=number, value=masking))
        self._forget()
        return answer.SerializeToString()

    def _check_confirmations(self, asked: pb.UnmaskRequest) -> None:
        message = survivors_message(self._session_id, self._state.adapter_sha256, list(asked.survivors))
        hood = {share.member for share in self._state.inbox} & set(asked.survivors)
        signers: set[int] = set()
        for one in asked.confirmations:
            if one.member not in hood or one.member in signers:
                continue
            key = self.terms.members[one.member].identity_key
            keys.verify(key, one.signature, message, f"the confirmation of {self._name(one.member)}")
            signers.add(one.member)
        if len(signers) < self.terms.threshold:
            raise SecureSumError(
                f"{len(signers)} neighbours confirmed these survivors; the threshold is {self.terms.threshold}"
            )

    def _forget(self) -> None:
        """Only that the session was played, and how far, stays."""
        kept = pb.ClientState(terms=self._state.terms, member=self.member, stage=Stage.ANSWERED)
        kept.upload_sha256 = self._state.upload_sha256
        self._state, self._hood = kept, {}

    def _require_stage(self, stage: Stage, act: str) -> None:
        if self.stage != stage:
            raise SecureSumError(
                f"asked to {act}, but this member last {self.stage.name.lower()}: no stage is played twice or early"
            )

    def _neighbours(self, adverts: Mapping[int, pb.Advert]) -> frozenset[int]:
        graph = neighbours(sorted(adverts), self.terms.degree, self._session_id, adverts_sha256(adverts))
        return graph[self.member]

    def _sealing(self, sealing_key: bytes, sender: int, receiver: int) -> tuple[bytes, bytes]:
        other = receiver if sender == self.member else sender
        agreed = keys.agree(self._state.sealing_secret, sealing_key, self._name(other))
        key = keys.derive(agreed, self._session_id, "seal", sender, receiver)
        return key, keys.digest("shares", self._session_id, sender, receiver)

    def _open(self, share: pb.SealedShare) -> tuple[bytes, bytes]:
        key, bound_to = self._sealing(self._hood[share.member].sealing_key, share.member, self.member)
        plain = keys.unseal(key, share.sealed, bound_to, self._name(share.member))
        seed, masking = plain[: shamir.SECRET_BYTES], plain[shamir.SECRET_BYTES :]
        for value in (seed, masking):
            shamir.element(value, f"a share from {self._name(share.member)}")
        return seed, masking

    def _name(self, number: int) -> str:
        return f"client {self.terms.members[number].client_id}"


def check_adverts(terms: Terms, session_id: bytes, adverts: Iterable[pb.Advert]) -> dict[int, pb.Advert]:
    """The adverts by member; raises SecureSumError unless each is one member's own, signed, and enough are there."""
    by_member: dict[int, pb.Advert] = {}
    public: set[bytes] = set()
    for advert in adverts:
        if advert.member >= len(terms.members) or advert.member in by_member:
            raise SecureSumError(f"an advert of member {advert.member}: unknown, or its second")
        check_advert(terms, session_id, advert, public)
        by_member[advert.member] = advert
    if len(by_member) < terms.threshold:
        raise SecureSumError(f"{len(by_member)} adverts; the threshold is {terms.threshold}")
    return by_member


def check_advert(terms: Terms, session_id: bytes, advert: pb.Advert, public: set[bytes]) -> None:
    """Raise SecureSumError unless `advert` is signed and its keys are new ones; adds them to `public`."""
    name = f"client {terms.members[advert.member].client_id}"
    if {len(advert.sealing_key), len(advert.masking_key), len(advert.seed_sha256)} != {keys.KEY_BYTES}:
        raise SecureSumError(f"the advert of {name} holds a key that is not {keys.KEY_BYTES} bytes")
    identity_key = terms.members[advert.member].identity_key
    keys.verify(identity_key, advert.signature, advert_message(session_id, advert), f"the advert of {name}")
    own = {advert.sealing_key, advert.masking_key}
    if len(own) < 2 or public & own:
        raise SecureSumError(f"the advert of {name} repeats another's key")
    public |= own


def check_survivors(terms: Terms, members: list[int]) -> None:
    """Raise SecureSumError unless `members` are distinct, in order, of this session, and at least the threshold."""
    if members != sorted(set(members)) or (members and members[-1] >= len(terms.members)):
        raise SecureSumError("the survivors are not in order, or not of this session")
    if len(members) < terms.threshold:
        raise SecureSumError(f"{len(members)} survivors; the threshold is {terms.threshold}")


def advert_message(session_id: bytes, advert: pb.Advert) -> bytes:
    """What a member signs of its advert."""
    public = (advert.sealing_key, advert.masking_key, advert.seed_sha256)
    return keys.digest("advert", session_id, advert.member, *public)


def adverts_sha256(adverts: Mapping[int, pb.Advert]) -> bytes:
    """The hash of all public keys, in the members' order."""
    listed = [part for _, one in sorted(adverts.items()) for part in (one.sealing_key, one.masking_key)]
    return keys.digest("adverts", *listed)


def survivors_message(session_id: bytes, adapter_sha256: str, members: list[int]) -> bytes:
    """What a member signs to confirm the survivors."""
    return keys.digest("survivors", session_id, adapter_sha256, *members)


def self_mask_key(seed: bytes, session_id: bytes, member: int, adapter_sha256: str) -> bytes:
    """The key of a member's own mask."""
    return keys.derive(seed, session_id, "self mask", member, adapter_sha256)


def pair_mask_key(agreed: bytes, session_id: bytes, one: int, other: int, adapter_sha256: str) -> bytes:
    """The key of the mask that two members share; it cancels only where both trained the same adapter."""
    return keys.derive(agreed, session_id, "pair mask", min(one, other), max(one, other), adapter_sha256)


def parsed(kind: type[Frame], data: bytes, what: str) -> Frame:
    """The message in `data`; raises SecureSumError, naming `what`, where there is none."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise SecureSumError(f"{what} cannot be read") from error
