"""One client's part in one round: judge the incoming adapter, train it, tell the trunk its weight, make the update.

Nothing of an update exists outside this process before the trunk has acknowledged the weight that goes with it.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel

from aggregation.protocol import PlainSumClient
from aggregation.ring import plan
from clients.connection import TrunkConnection
from clients.data import SiteData, load_dataset, load_tokenizer, order_key
from clients.site import Site
from clients.split_model import RoundStart, SplitSettings, close, closing_session, open_split_model
from clients.trainer import Judgement, Training, judge, train
from clients.wire_log import WireLog
from contract import adapter
from contract.config import RunConfig
from contract.errors import ConfigError
from contract.model_files import resolve_model
from contract.records import Factor, RoundKey

logger = logging.getLogger("trunkline.clients")

_METRIC_BYTES = 8


@dataclass(frozen=True, slots=True)
class RoundOrder:
    """What the orchestrator asks of one client. `clients` is the cohort's size, which fixes the fixed point's scale."""

    key: RoundKey
    client_id: str
    client_sha256: str
    trunk_sha256: str
    factor: Factor
    clients: int
    adapter_d: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RoundWork:
    """What goes back: the upload's bytes (None from a judgement alone) and the metrics by name."""

    upload: bytes | None
    metrics: dict[str, float]


def take_part(order: RoundOrder, config: RunConfig, site: Site, *, training: bool) -> RoundWork:
    """One round's work at this site; without `training` the adapter is only judged.

    Raises UpdateError for an update that is not finite or too large, and whatever reading the data, loading the model
    and talking to the trunk raise. After an error the trunk holds nothing of this client's for the round.
    """
    started = time.monotonic()
    if order.factor not in get_args(Factor):
        raise ConfigError(f"the round's factor is {order.factor!r}; it must be one of {', '.join(get_args(Factor))}")
    if config.threads:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(resolve_model(site.model))
    data = load_dataset(site.data, tokenizer, config.max_length, config.eval_fraction, config.seed)
    with closing(WireLog(site.wire_log or None)) as wire_log:
        connection = TrunkConnection(site.trunk_address, wire_log=wire_log)
        with closing(connection):
            connection.describe()
            model = _open_model(order, config, site, connection)
            with closing_session(model):
                judgement, training_done, upload = _work(model, data, order, config, training=training)
        metrics = _metrics(judgement, training_done)
        metrics["seconds"] = time.monotonic() - started
        _note_reply(wire_log, upload, metrics, training=training)
        metrics["sent_bytes"], metrics["received_bytes"] = wire_log.sent_bytes, wire_log.received_bytes
        logger.info("wire round=%d site=%s %s", order.key.round, site.name, wire_log.summary())
    return RoundWork(upload, metrics)


def _open_model(order: RoundOrder, config: RunConfig, site: Site, connection: TrunkConnection) -> PeftModel:
    settings = SplitSettings(
        model_path=site.model,
        cut=config.cut,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        codec=config.codec,
        timeout_s=config.round_timeout_s,
    )
    spec = adapter.resolve_lora(resolve_model(site.model), adapter.run_lora(config))
    start = RoundStart(
        key=order.key,
        client_id=order.client_id,
        trainable=order.factor,
        client_vector=order.adapter_d,
        client_sha256=order.client_sha256,
        trunk_sha256=order.trunk_sha256,
    )
    return open_split_model(settings, spec, connection, start)


def _work(
    model: PeftModel, data: SiteData, order: RoundOrder, config: RunConfig, *, training: bool
) -> tuple[Judgement, Training | None, bytes | None]:
    judgement = judge(model, data.heldout_rows, config)
    if not training:
        close(model)
        return judgement, None, None
    before = _trained_vector(model, order.factor)
    key = order_key(config.seed, order.key.run, order.key.round, order.client_id)
    done = train(model, data.train_rows, config, key)
    delta = _trained_vector(model, order.factor) - before
    fixed_point = plan(order.clients, config.max_trained_tokens(), config.update_clip)
    fixed_point.require_resolved(delta, done.trained_tokens)
    upload = PlainSumClient(delta.size + 1, fixed_point.bits).upload(fixed_point.encode(delta, done.trained_tokens))
    close(model, trained_tokens=done.trained_tokens, contribute=True)
    return judgement, done, upload


def _trained_vector(model: PeftModel, factor: Factor) -> npt.NDArray[np.float64]:
    """The client part's coordinates that this round trains, in sorted-name order; float64, so differences are exact."""
    tensors = adapter.adapter_parameters(model)
    return adapter.flatten(tensors, adapter.trainable_names(tensors, factor)).astype(np.float64)


def _metrics(judgement: Judgement, done: Training | None) -> dict[str, float]:
    metrics: dict[str, float] = {"eval_tokens": judgement.tokens}
    if judgement.tokens:
        metrics["eval_loss"] = judgement.loss
    if done is not None:
        metrics |= {"train_loss": done.loss, "trained_tokens": done.trained_tokens, "steps": done.steps}
    return metrics


def _note_reply(wire_log: WireLog, upload: bytes | None, metrics: dict[str, float], *, training: bool) -> None:
    fields = {f"metrics.{name}": _METRIC_BYTES for name in (*metrics, "sent_bytes", "received_bytes")}
    if upload is not None:
        fields["update"] = len(upload)
    wire_log.sent("flower", "train.round" if training else "evaluate.final", sum(fields.values()), fields)
