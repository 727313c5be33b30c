"""The yardstick of the secure sum: Flower's own SecAgg+, client and server, on stand-in neighbours.

A client's reading is `flwr.client.mod.secure_aggregation.secaggplus_mod.secaggplus_mod` itself in all four stages. The
server's is `flwr.server.workflow.secure_aggregation.secaggplus_workflow.SecAggPlusWorkflow.unmask_stage` itself over
replies that wait in a stand-in for the grid; its other stages are left out, in Flower's favour. What the neighbours
say is made with Flower's functions too, unread: keys and sealed shares of the right kind and length.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat
from flwr.common.serde import recorddict_to_proto
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import SecAggPlusWorkflow, WorkflowState
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from flwr.supercore.task_identity import TaskIdentity

from aggregation.graph import GraphPlan
from benchmarks.meters import Stopwatch

OWN = 1
"""The node id of the client that is read; the others of its neighbourhood follow."""
MAX_WEIGHT = 1000.0
EXAMPLES = 10
LARGEST_WHOLE = 32
"""Up to so many members the server's reading is no part but the whole."""
CLIPPING_RANGE, TARGET_RANGE, MOD_RANGE = 8.0, 1 << 22, 1 << 32
"""The workflow's own defaults."""

logging.getLogger("flwr").setLevel(logging.ERROR)
# A message can be made only within a task.
TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


@dataclass(frozen=True)
class Peer:
    """A neighbour's keys: the first pair masks, the second seals."""

    first: Any
    second: Any
    public: list[bytes]

    @classmethod
    def new(cls) -> Peer:
        (first, first_public), (second, second_public) = generate_key_pairs(), generate_key_pairs()
        return cls(first, second, [public_key_to_bytes(first_public), public_key_to_bytes(second_public)])


@dataclass(frozen=True)
class Part:
    """How many survivors' and dropped members' masks one reading of the server takes away, and how many there are."""

    survivors: int
    all_survivors: int
    dropped: int
    all_dropped: int

    def __str__(self) -> str:
        if (self.survivors, self.dropped) == (self.all_survivors, self.all_dropped):
            return "whole"
        return (
            f"extrapolated from {self.survivors} of {self.all_survivors} survivors and {self.dropped} of "
            f"{self.all_dropped} dropped"
        )


@dataclass
class ClientReading:
    watch: Stopwatch
    up: dict[str, int]


class FlowerSum:
    """One neighbourhood of `graph`, all members alike, of whom `gone` drop out before upload; vectors of `size`."""

    def __init__(self, graph: GraphPlan, size: int, gone: int) -> None:
        shares, threshold = graph.neighbourhood, graph.threshold
        self._shares, self._threshold = shares, threshold
        whole = not graph.degree and graph.members <= LARGEST_WHOLE
        alive = graph.members - gone
        self.part = Part(alive if whole else 2, alive, gone if whole else min(gone, 1), gone)
        dropped = max(round(gone * shares / graph.members), self.part.dropped)
        self._nodes = range(OWN, OWN + shares)
        self._dead = set(self._nodes[shares - dropped :])
        self._peers = {node: Peer.new() for node in self._nodes}
        self._seed = os.urandom(32)
        self._seed_shares = create_shares(self._seed, threshold, shares)
        self._key_shares = create_shares(private_key_to_bytes(self._peers[OWN].first), threshold, shares)
        masked = np.random.default_rng(0)
        self._aggregate = [masked.integers(1, MOD_RANGE, 1), masked.integers(0, MOD_RANGE, size)]

    def client(self, update: npt.NDArray[np.float32]) -> ClientReading:
        """One surviving client's four stages."""
        fit = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([update]), EXAMPLES, {})
        trained = fitres_to_recorddict(fit, False)
        context = Context(run_id=1, node_id=OWN, node_config={}, state=RecordDict(), run_config={})
        reading = ClientReading(Stopwatch(), {})

        def ask(stage: str, record: dict[str, Any]) -> Any:
            content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord({**record, Key.STAGE: stage})})
            message = Message(content, dst_node_id=OWN, message_type="train")
            with reading.watch.running(stage):
                reply = secaggplus_mod(message, context, lambda asked, _: Message(trained, reply_to=asked))
            reading.up[stage] = len(recorddict_to_proto(reply.content).SerializeToString())
            return reply.content.config_records[RECORD_KEY_CONFIGS]

        own = ask(Stage.SETUP, self._settings())
        public = {str(node): peer.public for node, peer in self._peers.items()}
        public[str(OWN)] = [own[Key.PUBLIC_KEY_1], own[Key.PUBLIC_KEY_2]]
        ask(Stage.SHARE_KEYS, public)
        ask(Stage.COLLECT_MASKED_VECTORS, self._inbox(own[Key.PUBLIC_KEY_2]))
        active = [node for node in self._nodes if node not in self._dead]
        ask(Stage.UNMASK, {Key.ACTIVE_NODE_ID_LIST: active, Key.DEAD_NODE_ID_LIST: sorted(self._dead)})
        return reading

    def server(self) -> Stopwatch:
        """The seconds of unmasking everybody, scaled from the `part` that is read."""
        part = self.part
        alive = [node for node in self._nodes if node not in self._dead][: part.survivors]
        fixed = self._unmask([])
        own = self._unmask(alive)
        pairs = self._unmask(sorted(self._dead)[: part.dropped])
        scales = (part.all_survivors / part.survivors, part.all_dropped / max(part.dropped, 1))

        def whole(base: float, of_own: float, of_pairs: float) -> float:
            return base + (of_own - base) * scales[0] + (of_pairs - base) * scales[1]

        watch = Stopwatch()
        watch.cpu["unmask"] = whole(fixed.cpu_seconds, own.cpu_seconds, pairs.cpu_seconds)
        watch.wall["unmask"] = whole(fixed.wall_seconds, own.wall_seconds, pairs.wall_seconds)
        return watch

    def _settings(self) -> dict[str, Any]:
        return {
            Key.SAMPLE_NUMBER: self._shares,
            Key.SHARE_NUMBER: self._shares,
            Key.THRESHOLD: self._threshold,
            Key.CLIPPING_RANGE: CLIPPING_RANGE,
            Key.TARGET_RANGE: TARGET_RANGE,
            Key.MOD_RANGE: MOD_RANGE,
            Key.MAX_WEIGHT: MAX_WEIGHT,
        }

    def _inbox(self, own_key: bytes) -> dict[str, Any]:
        """What the neighbours sealed for the client: real shares, though all of one member's secrets."""
        sources, sealed = [], []
        for node in self._nodes[1:]:
            plain = share_keys_plaintext_concat(node, OWN, self._seed_shares[0], self._key_shares[0])
            key = generate_shared_key(self._peers[node].second, bytes_to_public_key(own_key))
            sources.append(node)
            sealed.append(encrypt(key, plain))
        return {Key.CIPHERTEXT_LIST: sealed, Key.SOURCE_LIST: sources}

    def _unmask(self, owners: list[int]) -> Stopwatch:
        """The workflow's unmask stage where only `owners` ever shared secrets; everybody's are the same two."""
        alive = {node for node in self._nodes if node not in self._dead}
        state = WorkflowState(
            sampled_node_ids=set(owners),
            active_node_ids=alive,
            threshold=self._threshold,
            clipping_range=CLIPPING_RANGE,
            quantization_range=TARGET_RANGE,
            mod_range=MOD_RANGE,
            nid_to_neighbours={node: set(self._nodes) for node in self._nodes},
            nid_to_publickeys={node: peer.public for node, peer in self._peers.items()},
            aggregate_ndarrays=self._aggregate,
        )
        records = RecordDict({MAIN_CONFIGS_RECORD: ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})})
        strategy = SimpleNamespace(aggregate_fit=lambda *_: (None, {}))
        context = SimpleNamespace(state=records, strategy=strategy)
        grid = SimpleNamespace(send_and_receive=_replies(self._answers(owners, alive)))
        workflow = SecAggPlusWorkflow(self._shares, self._threshold)
        watch = Stopwatch()
        with watch.running("unmask"):
            done = workflow.unmask_stage(grid, context, state)
        if not done:
            raise AssertionError("Flower's workflow did not unmask")
        return watch

    def _answers(self, owners: list[int], alive: set[int]) -> list[Any]:
        replies = []
        for node in sorted(alive):
            shares = [(self._key_shares if owner in self._dead else self._seed_shares)[node - OWN] for owner in owners]
            content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord({Key.NODE_ID_LIST: owners, Key.SHARE_LIST: shares})})
            asked = Message(RecordDict(), dst_node_id=node, message_type="train")
            replies.append(Message(content, reply_to=asked))
        return replies


def _replies(waiting: list[Any]) -> Callable[..., list[Any]]:
    """In place of the grid's: takes the workflow's messages and gives the replies that wait."""

    def send_and_receive(messages: Iterable[Any], timeout: float | None = None) -> list[Any]:
        list(messages)
        return waiting

    return send_and_receive
