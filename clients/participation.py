"""One client's part in one round: judge the incoming adapter, train it, tell the trunk its weight, make the update.

Nothing of an update exists outside this process before the trunk has acknowledged the weight that goes with it.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel

from aggregation import tally
from aggregation.protocol import PlainSumClient
from clients.admission import Admission
from clients.data import SiteData, load_dataset, load_tokenizer, order_key, repeated_order_key
from clients.link import WireCodecs
from clients.replay import await_trunk, played
from clients.secure import SecureTurn
from clients.site import Site
from clients.split_model import RoundStart, SplitSettings, close, closing_session, open_split_model, remote_layers
from clients.trainer import Announce, Judgement, Training, judge, train
from clients.trunk_route import TrunkRoute
from clients.update import encode_update, subtract_from, trained_vector
from clients.wire_log import WireLog
from clients.wire_privacy import wire_mechanism
from contract import adapter, traces
from contract.config import RunConfig
from contract.errors import ConfigError, NonFiniteError
from contract.identity import read_private_key
from contract.model_files import resolve_model
from contract.records import Factor, RoundKey
from privacy.stream import SecretStream

if TYPE_CHECKING:
    from clients.spending import SiteSpending

logger = logging.getLogger("trunkline.clients")

_METRIC_BYTES = 8

Done = tuple[Judgement, Training | None, bytes | None]
"""What judging and training came to, and the update's bytes."""


@dataclass(frozen=True, slots=True)
class RoundOrder:
    """What the orchestrator asks of one client. `clients` is the cohort's size, which fixes the fixed point's scale.

    `ticket` is empty where the trunk needs none.
    """

    key: RoundKey
    client_id: str
    client_sha256: str
    trunk_sha256: str
    factor: Factor
    clients: int
    adapter_d: npt.NDArray[np.float32]
    ticket: bytes = b""
    traceparent: str = ""

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

    With a `turn` in a secure sum all that goes back is masked: update, weight, losses and counts. Under `dp` the site's
    own ledger pays before anything of its text is released, and keeps the head that came of the orchestrator's.

    Raises SecureSumError where this site does not take that turn, BudgetError where its budget is spent, UpdateError
    for an update that is not finite or too large, and whatever reading the data, loading the model and talking to the
    trunk raise. After an error the trunk holds nothing of this client's for the round.
    """
    key = order.key
    about: dict[str, str | int] = {"run": key.run, "round": key.round, "attempt": key.attempt, "client": site.name}
    with _traced(order.traceparent, about):
        return _take_part(order, config, site, training=training, turn=turn)


@contextmanager
def _traced(traceparent: str, about: dict[str, str | int]) -> Iterator[None]:
    """A span for the block, under the orchestrator's, where this site traces; sent before the block is left."""
    tracer = traces.tracer("trunkline-client")
    if tracer is None:
        yield
        return
    try:
        with tracer.begin("client round", traceparent, **about).entered():
            yield
    finally:
        tracer.close()


def _take_part(
    order: RoundOrder, config: RunConfig, site: Site, *, training: bool, turn: SecureTurn | None
) -> RoundWork:
    started = time.monotonic()
    if order.factor not in get_args(Factor):
        raise ConfigError(f"the round's factor is {order.factor!r}; it must be one of {', '.join(get_args(Factor))}")
    if config.threads:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(resolve_model(site.model))
    data = load_dataset(site.data, tokenizer, config.max_length, config.eval_fraction, config.seed)
    with closing(WireLog(site.wire_log or None)) as wire_log:
        served = await_trunk(site, config, order.client_id, wire_log)
        if turn is not None:
            turn.check(order.key, config, order.factor, order.clients, served.model.fingerprint, training=training)
        admission = Admission(order.ticket, read_private_key(site.identity_key)) if order.ticket else None
        attempt = _Attempt(order, config, site, data, training, turn, admission)
        judgement, training_done, upload = played(attempt, site, config, order.client_id, wire_log)
        metrics = _metrics(judgement, training_done) | {"seconds": time.monotonic() - started}
        logger.info("round=%d site=%s %s", order.key.round, site.name, _told_here(metrics))
        told = () if turn is not None or config.metrics == "off" else (*metrics, "sent_bytes", "received_bytes")
        _note_reply(wire_log, upload, told, training=training)
        metrics |= {"sent_bytes": wire_log.sent_bytes, "received_bytes": wire_log.received_bytes}
        logger.info("wire round=%d site=%s %s", order.key.round, site.name, wire_log.summary())
    return RoundWork(upload, {name: metrics[name] for name in told})


@dataclass(slots=True)
class _Attempt:
    """The round's work with one trunk session, from opening the model to the trunk's acknowledgement."""

    order: RoundOrder
    config: RunConfig
    site: Site
    data: SiteData
    training: bool
    turn: SecureTurn | None
    admission: Admission | None = None
    opened: bool = False
    released: bool = False

    def play(self, route: TrunkRoute) -> Done:
        model = _open_model(self.order, self.config, self.site, route, self.admission)
        self.opened = True
        with closing_session(model), _spending(self.site, self.config) as spending:
            if spending is not None and self.turn is not None and self.turn.head:
                spending.keep_head(self.turn.head)
            return _work(model, self, spending)


@contextmanager
def _spending(site: Site, config: RunConfig) -> Iterator[SiteSpending | None]:
    """The site's ledger, open for the block; None in a run without differential privacy."""
    if config.dp == "off":
        yield None
        return
    from clients.spending import open_spending  # with SQL, which no other run needs at a site

    with open_spending(site, config) as spending:
        yield spending


def _open_model(
    order: RoundOrder, config: RunConfig, site: Site, route: TrunkRoute, admission: Admission | None
) -> PeftModel:
    settings = SplitSettings(
        model_path=site.model,
        cut=config.cut,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        codecs=WireCodecs(config.codec, config.gradient_codec),
        timeout_s=config.round_timeout_s,
        mechanism=wire_mechanism(config),
        arithmetic=config.trunk_arithmetic,
    )
    spec = adapter.resolve_lora(resolve_model(site.model), adapter.run_lora(config))
    start = RoundStart(
        key=order.key,
        client_id=order.client_id,
        trainable=order.factor,
        client_vector=order.adapter_d,
        client_sha256=order.client_sha256,
        trunk_sha256=order.trunk_sha256,
        trunk_frozen=config.trunk_adapter == "frozen",
        quiet=config.dp != "off",
        admission=admission,
    )
    return open_split_model(settings, spec, route, start)


def _work(model: PeftModel, attempt: _Attempt, spending: SiteSpending | None) -> Done:
    order, config, turn, data = attempt.order, attempt.config, attempt.turn, attempt.data
    update_d = trained_vector(model, order.factor) if attempt.training else None
    if spending is not None and update_d is not None and turn is not None:
        spending.reserve(order.key, order.clients, turn.threshold, update_d.size, remote_layers(model).trunk.events)
    announce = remote_layers(model).trunk.announce
    judgement = judge(model, data.heldout_rows, config, announce) if config.metrics == "sum" else Judgement(math.nan, 0)
    if update_d is None:
        close(model)
        attempt.released = True
        told = None if turn is None else turn.upload(order.adapter_sha256, None, _tally(judgement, None, config))
        return judgement, None, told
    done = _train(model, data, order, config, attempt.site, announce)
    subtract_from(model, order.factor, update_d)
    encoded = encode_update(
        update_d, done.trained_tokens, order.clients, config, None if turn is None else turn.threshold
    )
    del update_d  # what is left holds no more than three vectors of the ring at once
    attempt.released = turn is not None
    if turn is None:
        upload = PlainSumClient(encoded.size, 8 * encoded.itemsize).upload(encoded)
    else:
        upload = turn.upload(order.adapter_sha256, encoded, _tally(judgement, done, config))
    if config.trunk_adapter == "frozen":
        close(model)
    else:
        close(model, trained_tokens=1 if config.dp != "off" else done.trained_tokens, contribute=True)
    if spending is not None:
        spending.committed(order.key)
    return judgement, done, upload


def _train(
    model: PeftModel, data: SiteData, order: RoundOrder, config: RunConfig, site: Site, announce: Announce
) -> Training:
    if config.dp == "example":
        from clients.private_training import train_privately  # with Opacus, which no other run needs

        return train_privately(model, data.train_rows, config, SecretStream(os.urandom), announce)
    if config.deterministic:
        key = repeated_order_key(config.seed, order.key.round, site.name)
    else:
        key = order_key(config.seed, order.key.run, order.key.round, order.client_id, order.key.attempt)
    return train(model, data.train_rows, config, key, announce)


def _tally(judgement: Judgement, done: Training | None, config: RunConfig) -> dict[str, int]:
    """The numbers as a secure sum carries them; none where the run tells none."""
    if config.metrics == "off":
        return {}
    values = {"eval_tokens": judgement.tokens}
    if judgement.tokens:
        if not math.isfinite(judgement.loss):
            raise NonFiniteError("the incoming adapter's held-out loss is not finite: a sum cannot carry it")
        values["eval_nats"] = round(judgement.loss * judgement.tokens * tally.NATS_STEPS)
    if done is not None:
        values |= {"train_nats": round(done.loss * done.trained_tokens * tally.NATS_STEPS)}
        values |= {"train_tokens": done.trained_tokens, "steps": done.steps}
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
