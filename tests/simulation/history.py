"""What the world saw, and a small model of what may have been: whatever contradicts it is a line in `wrong`.

It looks at what leaves a site, at what is sent to one and at what SQL holds, and computes the averages by itself from
the plain updates. It asks no class of the orchestrator what that one thinks.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Message

from aggregation.encoding import noisy_encoding
from aggregation.ring import plan
from aggregation.terms import Terms
from contract import adapter
from contract import secagg_pb2 as pb
from contract.config import RunConfig
from contract.records import RoundKey
from contract.secure_records import SecureOrder, order_from, reply_from
from storage.artifacts import ArtifactStore
from tests.simulation.books import Attempt, Books, Version
from tests.simulation.kernel import Kernel
from tests.simulation.site import SiteHost, Trained


@dataclass(frozen=True)
class Release:
    """What a site let go for one attempt, and under which session's masks."""

    site: str
    session: bytes
    vector_sha256: str
    trained: Trained


class History:
    """All runs of one seed."""

    def __init__(
        self, kernel: Kernel, config: RunConfig, books: Books, artifacts: ArtifactStore, hosts: Mapping[str, SiteHost]
    ) -> None:
        self.wrong: list[str] = []
        self.commits = 0
        self.releases: dict[tuple[str, RoundKey], list[Release]] = defaultdict(list)
        self.site_books: Mapping[str, Callable[[], Books | None]] = {}
        self._kernel = kernel
        self._config = config
        self._books = books
        self._artifacts = artifacts
        self._hosts = hosts
        self._terms: dict[bytes, Terms] = {}
        self._vectors: dict[tuple[str, bytes], str] = {}
        self._confirmed: dict[bytes, bytes] = {}
        self._opened: dict[tuple[bytes, int], str] = {}
        self._versions: dict[str, list[Version]] = {}

    def refute(self, what: str) -> None:
        """Note a contradiction."""
        self._kernel.say(f"WRONG: {what}")
        self.wrong.append(what)

    # ---- what is sent to a site ----------------------------------------------------------------------------------

    def pushed(self, message: Message) -> None:
        """An order sets out: it must go on from the round that was committed last."""
        secure = _order_of(message)
        if secure is not None and secure.join:
            terms = Terms.from_bytes(secure.join)
            self._terms[terms.session_id] = terms
        facts = message.content.get("round")
        if not isinstance(facts, ConfigRecord):
            return
        run_id, number = str(facts["run"]), int(str(facts["round"]))
        versions = self._books.versions(run_id)
        wanted = next((one for one in versions if one.number == number - 1), None)
        sent = (facts["client_sha256"], facts["trunk_sha256"])
        if wanted is None or sent != (wanted.client_sha256, wanted.trunk_sha256):
            self.refute(f"round {number} is sent with another adapter than round {number - 1} committed")

    # ---- what leaves a site --------------------------------------------------------------------------------------

    def heard(self, name: str, message: Message, answer: Message) -> None:
        """A site's answer sets out."""
        if answer.has_error():
            self._kernel.say(f"{name} answers {message.metadata.message_id} by error {answer.error.code}")
            return
        asked = _order_of(message)
        session = asked.session if asked is not None else b""
        self._kernel.say(f"{name} answers {message.metadata.message_id}")
        if "update" in answer.content:
            self._let_go(name, session, _upload_sha256(answer))
        record = answer.content.get("secure")
        if asked is None or not isinstance(record, ConfigRecord):
            return
        reply = reply_from(record)
        for said in (reply.failure, reply.refusal):
            if said:
                self._kernel.say(f"{name} says: {said}")
        if reply.confirmation:
            self._signed(name, session, asked.confirm)
        if reply.answer:
            self._helped(name, session, asked.unmask, reply.answer)

    def _let_go(self, name: str, session: bytes, vector_sha256: str) -> None:
        if self._config.secagg == "on":
            before = self._vectors.setdefault((name, session), vector_sha256)
            if before != vector_sha256:
                self.refute(f"{name} let two vectors go under the masks of session {session.hex()[:8]}")
        made = self._hosts[name].made
        self._kernel.say(f"{name} lets {vector_sha256[:12]} go" + (f" for {_shown(made.key)}" if made else ""))
        if made is None:
            return
        self.releases[name, made.key].append(Release(name, session, vector_sha256, made))
        if self._config.dp != "off":
            self._require_paid(name, made.key)

    def _require_paid(self, name: str, key: RoundKey) -> None:
        """Whatever is let go was paid for before, on both sides, and stays so."""
        of = (key.run, key.round, key.attempt)
        own = self.site_books[name]()
        sides = {"the orchestrator's": self._books.states(name, of)}
        sides["its own"] = set() if own is None else own.states(name, of)
        for whose, states in sides.items():
            if "RESERVED" not in states or "VOID" in states:
                self.refute(f"{name} let {_shown(key)} go, and in {whose} ledger its charge is {sorted(states)}")
        if "COMMITTED" not in sides["its own"]:
            self.refute(f"{name} let {_shown(key)} go before its own ledger had it COMMITTED")

    def _signed(self, name: str, session: bytes, survivors: bytes) -> None:
        if self._confirmed.setdefault(session, survivors) != survivors:
            self.refute(f"{name} signed other survivors of session {session.hex()[:8]} than another did")
        named = pb.Survivors.FromString(survivors).members
        if len(named) < self._terms[session].threshold:
            self.refute(f"{name} signed {len(named)} survivors, below the threshold")

    def _helped(self, name: str, session: bytes, request: bytes, answer: bytes) -> None:
        asked, told = pb.UnmaskRequest.FromString(request), pb.UnmaskAnswer.FromString(answer)
        threshold = self._terms[session].threshold
        if min(len(asked.survivors), len(asked.confirmations)) < threshold:
            self.refute(f"{name} helped to unmask {len(asked.survivors)} survivors, threshold {threshold}")
        for kind, shares in (("seed", told.seeds), ("masking key", told.masking_keys)):
            for share in shares:
                if self._opened.setdefault((session, share.member), kind) != kind:
                    self.refute(f"both secrets of member {share.member} of session {session.hex()[:8]} are told")

    # ---- what SQL holds ------------------------------------------------------------------------------------------

    def look(self, run_id: str) -> None:
        """Nothing that was committed changes; what is new follows from what its survivors let go."""
        versions, before = self._books.versions(run_id), self._versions.get(run_id, [])
        if versions[: len(before)] != before:
            self.refute(f"the versions of {run_id} were {before} and are {versions}")
        if [one.number for one in versions] != list(range(len(versions))):
            self.refute(f"the versions of {run_id} are numbered {[one.number for one in versions]}")
        attempts = self._books.attempts(run_id)
        committed = [(number, attempt) for number, attempt, status, *_ in attempts if status == "committed"]
        if [number for number, _ in committed] != [one.number for one in versions[1:]]:
            self.refute(f"the versions of {run_id} are {len(versions)}, its committed attempts {committed}")
        opened = [number for number, _, status, *_ in attempts if status == "open"]
        if opened not in ([], [len(versions)]):
            self.refute(f"rounds {opened} of {run_id} are open, and {len(versions)} comes next")
        for number, attempt, status, threshold, _ in attempts:
            if status == "committed" and len(before) <= number < len(versions):
                self._require_mean((run_id, number, attempt), versions[number - 1], versions[number], threshold)
        self._versions[run_id] = versions

    def _require_mean(self, of: Attempt, before: Version, after: Version, threshold: int | None) -> None:
        self.commits += 1
        nodes = self._books.trained(of)
        names = [self._name_of(node) for node in nodes]
        self._kernel.say(
            f"committed {of[1]}.{of[2]} over {names}: {after.client_sha256[:12]} {after.trunk_sha256[:12]}"
        )
        if len(set(names)) != len(names) or len(names) < max(threshold or 1, self._config.quorum):
            self.refute(f"round {of[1]} is committed over {names}, threshold {threshold}, quorum {self._config.quorum}")
        found = [self.releases[name, RoundKey(*of)] for name in names]
        if not all(found):
            self.refute(f"round {of[1]} counts {names} as in its sum, and not all of them let an update go")
            return
        if any(not np.array_equal(made[0].trained.encoded, other.trained.encoded) for made in found for other in made):
            self.refute(f"a site let two updates go for round {of[1]}, attempt {of[2]}")
        trained = [made[0].trained for made in found]
        if self._config.dp == "off" and self._config.metrics == "sum":
            weight = sum(one.weight for one in trained)
            if weight != after.trained_tokens:
                self.refute(f"round {of[1]} says {after.trained_tokens} tokens; its survivors trained on {weight}")
        self._require_client_mean(of, before, after, trained, threshold)
        self._require_trunk_mean(of, before, after, trained)

    def _require_client_mean(
        self, of: Attempt, before: Version, after: Version, trained: Sequence[Trained], threshold: int | None
    ) -> None:
        """The committed half is the last one and its survivors' codes' mean to the bit; that is near the plain one."""
        names, old_d = self._client_part(before)
        _, new_d = self._client_part(after)
        order, config, weight = trained[0].order, self._config, sum(one.weight for one in trained)
        codes = np.stack([one.encoded for one in trained])
        total = codes.sum(axis=0, dtype=codes.dtype)
        steps = total[:-1].view(f"i{codes.itemsize}").astype(np.float64)
        if config.dp == "off":
            scale = plan(order.clients, config.max_weight(), config.update_clip).scale
            mean_d = steps / (scale * weight)
            exact_d = sum(one.weight * one.update_d for one in trained) / weight
            bound = (len(trained) if not config.deterministic else len(trained) / 2) / (scale * weight) + 1e-12
            if np.abs(mean_d - exact_d).max(initial=0.0) > bound:
                self.refute(f"the codes of round {of[1]} are not the plain weighted mean of its updates")
        else:
            noisy = noisy_encoding(config, order.clients, threshold or 0)
            mean_d = steps / (noisy.scale * order.clients)
        if int(total[-1]) != weight:
            self.refute(f"the weights of round {of[1]} sum to {int(total[-1])}, its survivors' to {weight}")
        moved = set(adapter.trainable_names(names, order.factor))
        where = np.concatenate([np.full(size, name in moved) for name, size in names.items()])
        wanted_d = old_d.copy()
        wanted_d[where] = (old_d[where].astype(np.float64) + mean_d).astype(np.float32)
        if not np.array_equal(wanted_d, new_d):
            self.refute(f"the clients' half of round {of[1]} is not the mean over {len(trained)} survivors")

    def _require_trunk_mean(self, of: Attempt, before: Version, after: Version, trained: Sequence[Trained]) -> None:
        """The trunk's half is the mean over the same survivors with the same weights."""
        if self._config.trunk_adapter == "frozen":
            if after.trunk_sha256 != before.trunk_sha256:
                self.refute(f"the trunk's half is frozen and round {of[1]} changed it")
            return
        weight = sum(one.weight for one in trained)
        for name, value in adapter.from_bytes(self._artifacts.get(after.trunk_sha256)).items():
            wanted = sum(one.weight * (one.trunk or {})[name] for one in trained) / weight
            if not np.allclose(value.double().numpy(), wanted, rtol=0.0, atol=1e-7):
                self.refute(f"the trunk's half of round {of[1]} is not the mean over the clients' half's survivors")
                return

    def _client_part(self, version: Version) -> tuple[dict[str, int], npt.NDArray[np.float32]]:
        tensors = adapter.from_bytes(self._artifacts.get(version.client_sha256))
        return {name: value.numel() for name, value in tensors.items()}, adapter.flatten(tensors, tensors)

    def _name_of(self, node_id: int) -> str:
        return list(self._hosts)[(node_id - 1) % 100]


def _order_of(message: Message) -> SecureOrder | None:
    record = message.content.get("secure")
    return order_from(record) if isinstance(record, ConfigRecord) else None


def _upload_sha256(answer: Message) -> str:
    array = next(iter(answer.content["update"].values()))
    return hashlib.sha256(array.data).hexdigest()


def _shown(key: RoundKey) -> str:
    return f"round {key.round}, attempt {key.attempt}"
