"""One client's part in one round: judge the incoming adapter, train it, tell the trunk its weight, make the update.

Nothing of an update exists outside this process before the trunk has acknowledged the weight that goes with it.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel

from aggregation import tally
from aggregation.dither import SecretDither
from aggregation.protocol import PlainSumClient
from aggregation.ring import plan
from clients.connection import TrunkConnection
from clients.data import SiteData, load_dataset, load_tokenizer, order_key
from clients.secure import SecureTurn
from clients.site import Site
from clients.split_model import RoundStart, SplitSettings, close, closing_session, open_split_model
from clients.trainer import Judgement, Training, judge, train
from clients.wire_log import WireLog
from contract import adapter
from contract.config import RunConfig
from contract.errors import ConfigError, NonFiniteError
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

    @property
    def adapter_sha256(self) -> str:
        """Both halves of the adapter, as the members of a secure sum name it to each other."""
        return f"{self.client_sha256}:{self.trunk_sha256}"


@dataclass(frozen=True, slots=True)
class RoundWork:
    """What goes back: the upload's bytes and the metrics by name; under a secure sum the upload holds those too."""

    upload: bytes | None
    metrics: dict[str, float]


def take_part(
    order: RoundOrder, config: RunConfig, site: Site, *, training: bool, turn: SecureTurn | None = None
) -> RoundWork:
    """One round's work at this site; without `training` the adapter is only judged.

    With a `turn` in a secure sum all that goes back is masked: update, weight, losses and counts. Raises SecureSumError
    where this site does not take that turn, UpdateError for an update that is not finite or too large, and whatever
    reading the data, loading the model and talking to the trunk raise. After an error the trunk holds nothing of this
    client's for the round.
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
            served = connection.describe()
            if turn is not None:
                turn.check(order.key, config, order.factor, order.clients, served.model.fingerprint, training=training)
            model = _open_model(order, config, site, connection)
            with closing_session(model):
                judgement, training_done, upload = _work(model, data, order, config, training=training, turn=turn)
        metrics = _metrics(judgement, training_done) | {"seconds": time.monotonic() - started}
        logger.info("round=%d site=%s %s", order.key.round, site.name, _told_here(metrics))
        told = () if turn is not None else (*metrics, "sent_bytes", "received_bytes")
        _note_reply(wire_log, upload, told, training=training)
        metrics |= {"sent_bytes": wire_log.sent_bytes, "received_bytes": wire_log.received_bytes}
        logger.info("wire round=%d site=%s %s", order.key.round, site.name, wire_log.summary())
    return RoundWork(upload, {name: metrics[name] for name in told})


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
    model: PeftModel,
    data: SiteData,
    order: RoundOrder,
    config: RunConfig,
    *,
    training: bool,
    turn: SecureTurn | None,
) -> tuple[Judgement, Training | None, bytes | None]:
    judgement = judge(model, data.heldout_rows, config)
    if not training:
        close(model)
        told = None if turn is None else turn.upload(order.adapter_sha256, None, _tally(judgement, None))
        return judgement, None, told
    update_d = _trained_vector(model, order.factor)
    key = order_key(config.seed, order.key.run, order.key.round, order.client_id, order.key.attempt)
    done = train(model, data.train_rows, config, key)
    _subtract_from(model, order.factor, update_d)
    fixed_point = plan(order.clients, config.max_trained_tokens(), config.update_clip)
    fixed_point.require_resolved(update_d, done.trained_tokens)
    encoded = fixed_point.encode(update_d, done.trained_tokens, None if turn is None else SecretDither(os.urandom))
    del update_d  # what is left holds no more than three vectors of the ring at once
    if turn is None:
        upload = PlainSumClient(encoded.size, fixed_point.bits).upload(encoded)
    else:
        upload = turn.upload(order.adapter_sha256, encoded, _tally(judgement, done))
    close(model, trained_tokens=done.trained_tokens, contribute=True)
    return judgement, done, upload


def _trained_vector(model: PeftModel, factor: Factor) -> npt.NDArray[np.float64]:
    """The client part's coordinates that this round trains, in sorted-name order; float64, so differences are exact."""
    tensors = adapter.adapter_parameters(model)
    return adapter.flatten(tensors, adapter.trainable_names(tensors, factor)).astype(np.float64)


def _subtract_from(model: PeftModel, factor: Factor, before_d: npt.NDArray[np.float64]) -> None:
    """Turn the trained coordinates from before the round into their change, in place: after less before."""
    tensors = adapter.adapter_parameters(model)
    start = 0
    for name in adapter.trainable_names(tensors, factor):
        after = adapter.flatten(tensors, [name])
        part = before_d[start : start + after.size]
        np.subtract(after, part, out=part)
        start += after.size


def _tally(judgement: Judgement, done: Training | None) -> dict[str, int]:
    """The numbers as a secure sum carries them."""
    values = {"eval_tokens": judgement.tokens}
    if judgement.tokens:
        if not math.isfinite(judgement.loss):
            raise NonFiniteError("the incoming adapter's held-out loss is not finite: a sum cannot carry it")
        values["eval_nats"] = round(judgement.loss * judgement.tokens * tally.NATS_STEPS)
    if done is not None:
        values |= {"train_nats": round(done.loss * done.trained_tokens * tally.NATS_STEPS), "steps": done.steps}
    return values


def _told_here(metrics: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.6g}" for name, value in metrics.items())


def _metrics(judgement: Judgement, done: Training | None) -> dict[str, float]:
    metrics: dict[str, float] = {"eval_tokens": judgement.tokens}
    if judgement.tokens:
        metrics["eval_loss"] = judgement.loss
    if done is not None:
        metrics |= {"train_loss": done.loss, "trained_tokens": done.trained_tokens, "steps": done.steps}
    return metrics


def _note_reply(wire_log: WireLog, upload: bytes | None, metrics: Collection[str], *, training: bool) -> None:
    fields = {f"metrics.{name}": _METRIC_BYTES for name in metrics}
    if upload is not None:
        fields["update"] = len(upload)
    wire_log.sent("flower", "train.round" if training else "evaluate.final", sum(fields.values()), fields)
