"""What goes to a client and what comes back, as Flower records. docs/wire.md lists the same fields.

To a client (`train.round`, `evaluate.final`): the array `adapter` holds the client part's flat float32 vector, the
config record `round` the facts below. Back comes the array `update` (the upload's bytes, uint8; training only) and the
metric record `metrics`.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from aggregation.rules import trainable_factor
from contract.config import RunConfig
from contract.errors import FrameError, UpdateError
from contract.flat_array import HEADER_BYTES, read_flat
from contract.records import Factor, RoundKey
from contract.traces import HEADER
from orchestrator.desk import Version
from orchestrator.exchange import MESSAGE_TTL_S

log = logging.getLogger("trunkline.orchestrator")

TRAIN, JUDGE = "train.round", "evaluate.final"
METRIC_NAMES = frozenset(
    {
        "eval_loss",
        "eval_tokens",
        "train_loss",
        "trained_tokens",
        "steps",
        "seconds",
        "sent_bytes",
        "received_bytes",
    }
)
"""All that a client may tell about itself; anything else is dropped unread."""

_LARGEST_COUNT, _LARGEST_LOSS = 1e12, 1e3
"""Far above any count, and any loss in nats; a product of two, summed over any cohort, is still a finite number."""


@dataclass(frozen=True, slots=True)
class RoundOrder:
    """What a client is told of its round, beside the adapter itself.

    `clients` is the cohort's size, which fixes the fixed point's scale. `final` asks for a judgement only.
    """

    run: str
    round: int
    attempt: int
    client_sha256: str
    trunk_sha256: str
    factor: Factor
    clients: int
    final: bool


def round_order(config: RunConfig, version: Version, key: RoundKey, clients: int, *, final: bool = False) -> RoundOrder:
    """What the clients of a cohort of this size are told of the round that begins with `version`."""
    return RoundOrder(
        run=key.run,
        round=key.round,
        attempt=key.attempt,
        client_sha256=version.client_sha256,
        trunk_sha256=version.trunk_sha256,
        factor=trainable_factor(config.aggregation, key.round),
        clients=clients,
        final=final,
    )


def adapter_record(vector_d: npt.NDArray[np.float32]) -> ArrayRecord:
    """The adapter's record; one record serves all clients."""
    return ArrayRecord({"adapter": Array(vector_d)})


def order_message(
    node_id: str, order: RoundOrder, adapter: ArrayRecord, ticket: bytes = b"", traceparent: str = ""
) -> Message:
    """The message that asks one client to train, or, when the order is final, to judge; `ticket` is its, if any.

    `traceparent` names the span that its work is a part of, where the run is traced.
    """
    facts = ConfigRecord({**asdict(order), "client_id": node_id})
    if ticket:
        facts["ticket"] = ticket
    if traceparent:
        facts[HEADER] = traceparent
    return Message(
        RecordDict({"adapter": adapter, "round": facts}),
        dst_node_id=int(node_id),
        message_type=JUDGE if order.final else TRAIN,
        ttl=MESSAGE_TTL_S,
        group_id=str(order.round),
    )


def read_update(content: RecordDict, due_bytes: int) -> bytes:
    """The upload in a training reply. Raises UpdateError unless it is one uint8 array of `due_bytes` bytes at most."""
    record = content.get("update")
    if not isinstance(record, ArrayRecord):
        raise UpdateError("the reply holds no array record 'update'")
    arrays = list(record.values())
    if len(arrays) != 1:
        raise UpdateError(f"the reply's 'update' holds {len(arrays)} arrays; it must hold one")
    data = arrays[0].data
    if len(data) > due_bytes + HEADER_BYTES:
        raise UpdateError(f"the reply's 'update' has {len(data)} bytes; about {due_bytes} are due")
    try:
        return read_flat(data, np.uint8, "the reply's 'update'").tobytes()
    except FrameError as error:
        raise UpdateError(str(error)) from error


def read_metrics(content: RecordDict, node_id: str) -> dict[str, float]:
    """The metrics of a reply with a known name that are one number of a sane size, 0 or more; no other enters SQL."""
    record = content.get("metrics")
    if not isinstance(record, MetricRecord):
        return {}
    kept = {}
    for name, value in record.items():
        largest = _LARGEST_LOSS if name.endswith("_loss") else _LARGEST_COUNT
        if name in METRIC_NAMES and isinstance(value, int | float) and 0 <= value <= largest:
            kept[name] = float(value)
        else:
            log.warning("dropped a metric of client %s that is unknown or no number of a sane size", node_id)
    return kept
