"""A site's part in a secure sum: one call for each thing that the orchestrator may ask, its state kept in the vault.

Nothing here imports torch: in a deployment every message starts a process, and only training needs a model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregation import keys, tally
from aggregation.encoding import encoding
from aggregation.ring import RingVector
from aggregation.rules import trainable_factor
from aggregation.secure_client import SecureClient
from aggregation.terms import Policy, Terms, greeting_message
from clients.site import RosterPin, Site
from clients.vault import Vault
from contract.config import RunConfig
from contract.errors import (
    AccessError,
    AgreementError,
    ConfigError,
    ConnectionFailedError,
    DeadlineError,
    ModelError,
    SecureSumError,
    StorageError,
    TrunklineError,
)
from contract.identity import create_private_key, read_private_key
from contract.records import Factor, RoundKey
from contract.roster import read_roster
from contract.secure_records import SecureOrder, SecureReply

logger = logging.getLogger("trunkline.clients")

_AGREED = ("run", "number", "factor", "number of clients", "model fingerprint", "settings' hash")
_REFUSAL_LETTERS = 1000
STALE_S = 2 * 24 * 3600.0
"""A session this old belongs to a run that ended: no message waits longer than a day, so no round lasts longer."""


def open_secure_site(site: Site, client_id: str, entropy: Callable[[int], bytes] = os.urandom) -> SecureSite:
    """This site's part in secure sums; its identity is made at the first call where none is there.

    Raises ConfigError for a key file that cannot be used or made, or that others can read.
    """
    if not site.identity_key.exists():
        if site.identity_named:
            raise ConfigError(
                f"node config identity-key is {str(site.identity_key)!r}, which is not there: make it with "
                "`trunkline clients keygen`, or bring back the disk that holds it"
            )
        try:
            site.identity_key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"cannot make {site.identity_key.parent} for the identity: {error.strerror}") from error
        create_private_key(site.identity_key)
    identity = read_private_key(site.identity_key)
    return SecureSite(
        client_id,
        identity,
        site.policy,
        site.roster,
        Vault(site.state_dir),
        site.simulated,
        site.name,
        site.dataset,
        entropy,
    )


_TOLD = (
    *(SecureSumError, ConfigError, ModelError, StorageError),
    *(ConnectionFailedError, DeadlineError, AgreementError, AccessError),
)
"""Whose texts, under masked sums, the orchestrator is told. They MUST quote no figure of a site's text or training."""


def tellable(error: TrunklineError) -> str | None:
    """The error's own words in one line, or None where they may quote this site's data."""
    return " ".join(str(error).split()) if isinstance(error, _TOLD) else None


def withheld(error: Exception) -> str:
    """What is told of an error instead of its own words."""
    return f"{type(error).__name__} at the client; its log says more"


@dataclass(frozen=True, slots=True)
class SecureSite:
    """Who this site is in a secure sum, what it insists on, whom it knows. `node_id` is Flower's.

    `pin` is None where no roster is pinned: the site then takes the orchestrator's word for who the others are.
    `entropy(n)` gives the n secret random bytes that a session's secrets are made of.
    """

    node_id: str
    identity: Ed25519PrivateKey
    policy: Policy
    pin: RosterPin | None
    vault: Vault
    simulated: bool = False
    name: str = ""
    dataset: str = ""
    entropy: Callable[[int], bytes] = os.urandom

    def join(self, data: bytes, config: RunConfig) -> bytes:
        """Stage 0 of a new session; answers the advert."""
        terms = Terms.from_bytes(data)
        if self.vault.knows(terms.session_id):
            raise SecureSumError("this client has joined that session before: a round tried again is a new session")
        self._require_agreed(terms, config)
        client_id = terms.id_of(self.identity.public_key().public_bytes_raw())
        client = SecureClient.join(terms, client_id, self.identity, self.policy, self._roster(terms), self.entropy)
        self._forget_the_dead(terms)
        advert = client.advert()
        self.vault.keep(terms.session_id, client.to_bytes())
        return advert

    def _require_agreed(self, terms: Terms, config: RunConfig) -> None:
        """Raise SecureSumError unless the session's numbers follow from the settings that this site was given."""
        weight = config.max_weight()
        self.policy.check_weight(weight)
        if terms.settings_sha256 != config.sha256():
            raise SecureSumError("the session was made for other settings than this client was given")
        # A judgement's tally needs no more than the smaller ring, and fits in both.
        bits = encoding(config, len(terms.members), terms.threshold).bits
        if terms.size != tally.SIZE and terms.ring_bits != bits:
            raise SecureSumError(
                f"the session sums in Z_2^{terms.ring_bits}; {len(terms.members)} clients of up to {weight} tokens "
                f"sum in Z_2^{bits}: in another ring their sum could wrap, or be read wrongly"
            )

    def _roster(self, terms: Terms) -> Mapping[str, bytes]:
        """Whom this site knows, read anew for each session, so that a site that is enrolled restarts nobody."""
        if self.pin is not None:
            roster = read_roster(self.pin.path, self.pin.signer, self.vault.roster_version())
            self.vault.note_roster(roster.version)
            return roster.members
        level = logging.DEBUG if self.simulated else logging.WARNING  # one machine holds all of a simulation
        logger.log(
            level,
            "secure sum over %d clients: no roster is pinned in this node's config, so that the others are real, and "
            "not the orchestrator's own, is the orchestrator's word",
            len(terms.members),
        )
        return {member.client_id: member.identity_key for member in terms.members}

    def share(self, session_id: bytes, adverts: bytes) -> bytes:
        """Stage 1."""
        client = self._resumed(session_id)
        shares = client.share(adverts, self.entropy)
        self.vault.keep(session_id, client.to_bytes())
        return shares

    def terms(self, session_id: bytes) -> Terms:
        """What this site agreed to in a session that goes on."""
        return self._resumed(session_id).terms

    def require_ready(self, session_id: bytes) -> None:
        """Raise SecureSumError, before anything is trained, unless the session waits for this site's vector."""
        self._resumed(session_id).require_turn()

    def take_turn(self, session_id: bytes) -> None:
        """Take the session's one turn to train or to judge: when this returns, that it was taken is durable."""
        client = self._resumed(session_id)
        client.take_turn()
        self.vault.keep(session_id, client.to_bytes())

    def upload(self, session_id: bytes, vector: RingVector, adapter_sha256: str, inbox: bytes) -> bytes:
        """Stage 2; masks `vector` in place. Its hash is durable before the bytes are answered."""
        client = self._resumed(session_id)
        uploaded = client.upload(vector, adapter_sha256, inbox)
        self.vault.keep(session_id, client.to_bytes())
        return uploaded

    def confirm(self, session_id: bytes, survivors: bytes) -> bytes:
        """Stage 3."""
        client = self._resumed(session_id)
        confirmation = client.confirm(survivors)
        self.vault.keep(session_id, client.to_bytes())
        return confirmation

    def unmask(self, session_id: bytes, request: bytes) -> bytes:
        """Stage 4. That it was answered is durable, and the secrets are gone, before the answer leaves."""
        client = self._resumed(session_id)
        answer = client.unmask(request)
        self.vault.forget(session_id)
        return answer

    def greet(self, run: str, nonce: bytes, *declared: str) -> tuple[bytes, bytes]:
        """This site's public key, and its signature that binds Flower's node id, and what it declares, to it."""
        message = greeting_message(run, self.node_id, nonce, *declared)
        return self.identity.public_key().public_bytes_raw(), keys.sign(self.identity, message)

    def answer(self, asked: SecureOrder, config: RunConfig) -> SecureReply:
        """What the orchestrator asked of this site beside training, answered.

        What this site refuses of the session that comes next is told as `refusal`, and spoils nothing of this one.
        """
        told: dict[str, Any] = {}
        if asked.greet:
            declared = {"name": self.name, "dataset": self.dataset} if config.dp != "off" else {}
            told["identity"], told["greeting"] = self.greet(asked.run, asked.greet, *declared.values())
            told |= declared
        if asked.confirm:
            told["confirmation"] = self.confirm(asked.session, asked.confirm)
        if asked.unmask:
            told["answer"] = self.unmask(asked.session, asked.unmask)
        refusal = ""
        try:
            if asked.join:
                told["advert"] = self.join(asked.join, config)
            if asked.share:
                told["shares"] = self.share(asked.next_session, asked.share)
        except TrunklineError as error:
            refusal = (tellable(error) or withheld(error))[:_REFUSAL_LETTERS]
            logger.error("no part in the next secure sum: %s", " ".join(str(error).split()))
        return SecureReply(**told, refusal=refusal)

    def turn(self, asked: SecureOrder) -> SecureTurn:
        """This site's place in the sum of the round that it is asked to work for."""
        return SecureTurn(self, asked.session, asked.inbox, asked.head)

    def _resumed(self, session_id: bytes) -> SecureClient:
        return SecureClient.from_bytes(self.vault.read(session_id), self.identity)

    def _forget_the_dead(self, joined: Terms) -> None:
        """Of the run that goes on, only the session of the round before may still be open."""
        self.vault.sweep()
        for session_id, state, age_s in self.vault.open_sessions():
            if age_s > STALE_S or self._is_dead(session_id, state, joined):
                self.vault.forget(session_id)

    def _is_dead(self, session_id: bytes, state: bytes, joined: Terms) -> bool:
        try:
            terms = SecureClient.from_bytes(state, self.identity).terms
        except SecureSumError as error:
            logger.warning("session %s cannot be gone on with: %s", session_id.hex()[:12], error)
            return True
        return terms.run == joined.run and terms.round != joined.round - 1


@dataclass(frozen=True, slots=True)
class SecureTurn:
    """This site's place in the secure sum of one round: the session, and the shares that neighbours sealed for it.

    `head` is what the orchestrator's ledger says of this site's chain; empty where nothing is charged.
    """

    site: SecureSite
    session_id: bytes
    inbox: bytes
    head: bytes = b""

    @property
    def threshold(self) -> int:
        """How many clients the sum needs to its end."""
        return self.site.terms(self.session_id).threshold

    def check(
        self, key: RoundKey, config: RunConfig, factor: Factor, clients: int, fingerprint: str, *, training: bool
    ) -> None:
        """Raise SecureSumError, before anything is computed, unless the round is the one this site agreed to.

        Takes the session's one turn: whatever comes of the work, no second order is worked for.
        """
        self.site.require_ready(self.session_id)
        terms = self.site.terms(self.session_id)
        wanted = trainable_factor(config.aggregation, key.round) if training else factor
        told = (key.run, key.round, factor, clients, fingerprint, config.sha256())
        agreed = (terms.run, terms.round, wanted, len(terms.members), terms.model_fingerprint, terms.settings_sha256)
        for name, one, other in zip(_AGREED, told, agreed, strict=True):
            if one != other:
                raise SecureSumError(f"the round's {name} is {one}, but the session that it was joined for has {other}")
        self.site.take_turn(self.session_id)

    def upload(self, adapter_sha256: str, encoded: RingVector | None, values: Mapping[str, int]) -> bytes:
        """The masked bytes of the encoded update, if there is one, and of the tally behind it."""
        bits = self.site.terms(self.session_id).ring_bits
        told = tally.encode(values, bits)
        vector: RingVector = told if encoded is None else np.concatenate([encoded, told])
        return self.site.upload(self.session_id, vector, adapter_sha256, self.inbox)
