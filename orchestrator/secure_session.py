"""One secure sum as the orchestrator drives it: its terms, its server half, and what came of each node."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from aggregation.encoding import encoding
from aggregation.graph import GraphPlan, plan_graph
from aggregation.secure_server import SecureServer
from aggregation.tally import SIZE as TALLY_SIZE
from aggregation.terms import NONCE_BYTES, Member, Policy, Terms
from contract.config import RunConfig
from contract.errors import ConfigError, SecureSumError
from orchestrator.secure_exchange import SecureAnswer
from orchestrator.telling import told_failures

log = logging.getLogger("trunkline.orchestrator")


@dataclass(slots=True)
class SecureSession:
    """`members` gives each node of the cohort its member id; `shared` are the nodes that may upload, in any order.

    `failures` holds, by node, why it fell out; `refusers` are those that would not take part in what they were asked,
    `undelivered` those that the order to train provably never left for.
    """

    terms: Terms
    session_id: bytes
    server: SecureServer
    members: Mapping[str, str]
    shared: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    refusers: set[str] = field(default_factory=set)
    undelivered: set[str] = field(default_factory=set)

    @property
    def cohort(self) -> tuple[str, ...]:
        """Its nodes, sorted."""
        return tuple(sorted(self.members))

    @property
    def values(self) -> int:
        """How many adapter values are summed: what is left of a vector without weight and tally; 0 in a judgement."""
        return max(0, self.terms.size - TALLY_SIZE - 1)

    @property
    def survivors(self) -> list[str]:
        """The nodes whose vectors are in the sum, sorted."""
        inside = set(self.server.survivors)
        return sorted(node_id for node_id, member in self.members.items() if member in inside)

    @property
    def advertised(self) -> list[str]:
        """The nodes whose keys are known, sorted."""
        inside = set(self.server.advertised)
        return sorted(node_id for node_id, member in self.members.items() if member in inside)

    def inbox(self, node_id: str) -> bytes:
        """The shares that were sealed for a node."""
        return self.server.inbox(self.members[node_id])

    def take(self, answer: SecureAnswer, name: str) -> bool:
        """Hand a reply's field `name` to the server half; whether it was taken. Why not is kept and logged."""
        accept = {
            "advert": self.server.accept_advert,
            "shares": self.server.accept_shares,
            "confirmation": self.server.accept_confirmation,
            "answer": self.server.accept_answer,
        }[name]
        if answer.reply is None:
            return self.failed(answer.node_id, f"no {name}: {answer.failure}")
        data = getattr(answer.reply, name)
        if not data:
            if answer.reply.refusal:
                self.refusers.add(answer.node_id)
            return self.failed(answer.node_id, f"no {name}: {answer.reply.refusal or 'the reply holds none'}")
        try:
            accept(self.members[answer.node_id], data)
        except SecureSumError as error:
            return self.failed(answer.node_id, str(error))
        return True

    def take_all(self, answers: Iterable[SecureAnswer], name: str, asked: Collection[str]) -> list[str]:
        """The nodes whose field `name` was taken; who of `asked` did not answer at all is kept as late."""
        heard, taken = set(), []
        for answer in answers:
            heard.add(answer.node_id)
            if self.take(answer, name):
                taken.append(answer.node_id)
        for node_id in sorted(set(asked) - heard):
            self.failed(node_id, f"no {name} in time")
        return taken

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Ask these nodes, which shared their secrets, for no vector, and note why."""
        for node_id, reason in reasons.items():
            self.shared.remove(node_id)
            self.failed(node_id, reason)

    def failed(self, node_id: str, reason: str) -> bool:
        """Note that a node fell out, for the first reason that it gave; answers False."""
        self.failures.setdefault(node_id, reason)
        log.warning("round %d: client %s: %s", self.terms.round, node_id, reason)
        return False

    def told_failures(self) -> str:
        """Why nodes fell out, the first few."""
        return told_failures(dict(sorted(self.failures.items())))


def new_session(
    run_id: str,
    number: int,
    config: RunConfig,
    members: Mapping[str, Member],
    cohort: Collection[str],
    values: int,
    model_fingerprint: str,
    entropy: Callable[[int], bytes] = os.urandom,
) -> SecureSession:
    """A session for round `number` over the nodes of `cohort`, for vectors of `values` coordinates, weight and tally.

    `values` 0 is a judgement's, which has no weight either. The cohort MUST be of two or more. Raises ConfigError where
    its threshold or its numbers are impossible.
    """
    graph = session_graph(config, len(cohort))
    named = {node_id: members[node_id] for node_id in cohort}
    terms = Terms(
        run=run_id,
        round=number,
        nonce=entropy(NONCE_BYTES),
        members=tuple(sorted(named.values(), key=lambda member: member.client_id)),
        threshold=graph.threshold,
        degree=graph.degree,
        size=(values + 1 if values else 0) + TALLY_SIZE,
        ring_bits=encoding(config, len(cohort), graph.threshold).bits,
        model_fingerprint=model_fingerprint,
        settings_sha256=config.sha256(),
    )
    return SecureSession(
        terms, terms.session_id, SecureServer(terms), {node: member.client_id for node, member in named.items()}
    )


def session_graph(config: RunConfig, clients: int) -> GraphPlan:
    """Who shares with whom among so many clients, and how many a sum needs. Raises ConfigError as `new_session`."""
    policy = Policy()
    graph = plan_graph(clients, corrupt=policy.corrupt, dropout=policy.dropout)
    if not config.secagg_threshold:
        return graph
    if not graph.neighbourhood < 2 * config.secagg_threshold <= 2 * graph.neighbourhood:
        raise ConfigError(
            f"secagg-threshold is {config.secagg_threshold}; among {graph.neighbourhood} who hold a client's shares it "
            f"must be {graph.neighbourhood // 2 + 1} to {graph.neighbourhood}"
        )
    return replace(graph, threshold=config.secagg_threshold)
