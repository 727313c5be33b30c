"""The Flower ClientApp of a site: one message is one round's work.

torch, transformers and PEFT are imported when a message has come: in a deployment every message starts a process, and
this module is imported in all of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.heap import keep_freed
from clients.secure import SecureSite, open_secure_site, tellable, withheld
from clients.site import Site, in_simulation, read_site
from clients.starter import end_after_starter
from clients.vault import Vault
from clients.wire_log import WireLog
from contract import collector, logs, traces
from contract.config import RunConfig
from contract.errors import FrameError, SecureSumError, TrunklineError
from contract.failpoint import failpoint
from contract.flat_array import read_flat
from contract.openmp import waiting
from contract.records import RoundKey
from contract.secure_records import SecureOrder, order_from, to_record
from contract.ticket import MAX_TICKET_BYTES

if TYPE_CHECKING:
    from clients.participation import RoundOrder

app = ClientApp()
logger = logging.getLogger("trunkline.clients")

_REASON_LETTERS = 1000
_NAME_LETTERS = 128
REFUSED, FAULT = 1000, 1001
"""Codes of an error reply: raised on purpose (the reason is the error's own line), or a fault of this program."""


@app.train("round")  # type: ignore[untyped-decorator]
def train_round(message: Message, context: Context) -> Message:
    """Judges the incoming adapter on held-out text, trains it, and answers the encoded update."""
    return _answer(message, context, training=True)


@app.evaluate("final")  # type: ignore[untyped-decorator]
def judge_final(message: Message, context: Context) -> Message:
    """Judges the incoming adapter only."""
    return _answer(message, context, training=False)


@app.query("secure")  # type: ignore[untyped-decorator]
def secure_stage(message: Message, context: Context) -> Message:
    """The stages of secure sums beside the training: who this client is, its keys, its shares, its signature."""
    return _answer(message, context, training=None)


def _answer(message: Message, context: Context, *, training: bool | None) -> Message:
    end_after_starter()
    masked = context.run_config.get("secagg", "on") != "off"
    failpoint("site.asked")
    with logs.about(**_about(message, context)):
        try:
            content = _talk(message, context) if training is None else _work(message, context, training=training)
            failpoint("site.reply")
            return Message(content, reply_to=message)
        except TrunklineError as error:
            logger.error("round refused: %s: %s", type(error).__name__, error)
            return Message(Error(REFUSED, _reason(error, masked=masked)), reply_to=message)
        # A fault's own text may quote what it choked on, which may be a row: it stays in this site's log.
        except Exception as error:
            logger.exception("round failed")
            return Message(Error(FAULT, withheld(error)), reply_to=message)


def _about(message: Message, context: Context) -> dict[str, str | int]:
    """What the log is to name in each line of this message's work, as far as it can be told before it is checked."""
    told: dict[str, str | int] = {"client": str(context.node_config.get("name") or context.node_id)}
    facts = message.content.get("round") if message.has_content() else None
    if isinstance(facts, ConfigRecord):
        for name in ("run", "round", "attempt"):
            if isinstance(value := facts.get(name), str | int):
                told[name] = value[:_NAME_LETTERS] if isinstance(value, str) else value
    return told


def _speak() -> None:
    """Let a site's SuperNode log say what this app does: Flower configures only its own logger."""
    root = logging.getLogger("trunkline")
    if not root.handlers:
        root.addHandler(logs.handler("%(levelname)-7s trunkline: %(message)s"))
        root.setLevel(logging.INFO)


def _reason(error: TrunklineError, *, masked: bool) -> str:
    """What the orchestrator is told of an error. Under masked sums no words that may quote this site's data."""
    words = tellable(error) if masked else " ".join(str(error).split())
    if words is None:
        return withheld(error)
    return f"{type(error).__name__}: {words}"[:_REASON_LETTERS]


def _work(message: Message, context: Context, *, training: bool) -> RecordDict:
    config, site = _settings(context)
    if not site.simulated:  # where it is only said, and once is enough
        _refuse_unpriced(config, site)
    os.environ.update(waiting(os.environ))
    keep_freed()
    if config.secagg == "off":
        site.require_clear_allowed()
        with collector.paused():
            from clients.participation import take_part

        done = take_part(_read_order(message.content), config, site, training=training)
        return _content(done.upload, done.metrics)
    asked = _secure_order(message.content, config)
    with Vault(site.state_dir).alone():
        secure = open_secure_site(site, str(context.node_id))
        with collector.paused():
            from clients.participation import take_part

        upload, failure = None, ""
        try:
            order = _read_order(message.content)
            upload = take_part(order, config, site, training=training, turn=secure.turn(asked)).upload
        except TrunklineError as error:  # told beside the answer to the next sum's set-up, which it spoils nothing of
            logger.error("round refused: %s: %s", type(error).__name__, error)
            failure = _reason(error, masked=True)
        content = _content(upload, {})
        content["secure"] = _secure_record(secure, asked, config, site, failure)
        return content


def _content(upload: bytes | None, metrics: Mapping[str, float]) -> RecordDict:
    content = RecordDict({"metrics": MetricRecord(dict(metrics))})
    if upload is not None:
        content["update"] = ArrayRecord({"update": Array(np.frombuffer(upload, dtype=np.uint8))})
    return content


def _talk(message: Message, context: Context) -> RecordDict:
    config, site = _settings(context)
    asked = _secure_order(message.content, config)
    if asked.greet:  # the stages after it release nothing: what does is asked again before it does
        _require_willing(config, site)
    with Vault(site.state_dir).alone():
        if asked.head:
            _keep_head(asked.head, config, site)
        secure = open_secure_site(site, str(context.node_id))
        return RecordDict({"secure": _secure_record(secure, asked, config, site)})


def _refuse_unpriced(config: RunConfig, site: Site) -> None:
    """Raise ConfigError where the run prices nothing and the site's own ledger holds a budget for its data."""
    if config.dp == "off" and site.ledger.exists():
        from clients.spending import refuse_unpriced  # with SQL, which a site without a ledger never needs

        refuse_unpriced(site)


def _require_willing(config: RunConfig, site: Site) -> None:
    """Raise what this site would refuse each round of the run with, before the orchestrator charges anything for it."""
    if config.dp == "off":
        _refuse_unpriced(config, site)
        return
    from clients.spending import open_spending  # with SQL, which no other run needs at its greeting

    with open_spending(site, config) as spending:
        spending.require_willing()


def _keep_head(head: bytes, config: RunConfig, site: Site) -> None:
    from clients.spending import open_spending  # with SQL, which no other stage needs

    with open_spending(site, config) as spending:
        spending.keep_head(head)


def _secure_record(
    secure: SecureSite, asked: SecureOrder, config: RunConfig, site: Site, failure: str = ""
) -> ConfigRecord:
    """What this site answers to `asked`, noted in its wire log before it leaves."""
    record = to_record(replace(secure.answer(asked, config), failure=failure))
    fields = {f"secure.{name}": len(value) for name, value in record.items()}
    with closing(WireLog(site.wire_log or None)) as wire_log:
        wire_log.sent("flower", "secure", sum(fields.values()), fields)
    return ConfigRecord(dict(record))


def _secure_order(content: RecordDict, config: RunConfig) -> SecureOrder:
    record = content.get("secure")
    if not isinstance(record, ConfigRecord):
        raise SecureSumError("the message holds no config record 'secure', but secagg is on: nothing is sent in clear")
    asked = order_from(record)
    if asked.head and config.dp == "off":
        raise SecureSumError(
            "the message brings the head of a privacy ledger, but the run's dp is off: it charges nothing"
        )
    return asked


def _settings(context: Context) -> tuple[RunConfig, Site]:
    simulated = in_simulation()
    if not simulated:
        _speak()
    config = RunConfig.from_flower(context.run_config)
    return config, read_site(
        context.node_config, config, str(context.node_id), str(context.run_id), simulated=simulated
    )


def _read_order(content: RecordDict) -> RoundOrder:
    """Raises FrameError unless `content` is what the orchestrator sends."""
    from clients.participation import RoundOrder

    facts, arrays = content.get("round"), content.get("adapter")
    if not isinstance(facts, ConfigRecord) or not isinstance(arrays, ArrayRecord) or len(arrays) != 1:
        raise FrameError("the message must hold a config record 'round' and one array in 'adapter'")
    adapter_d = read_flat(next(iter(arrays.values())).data, np.float32, "the adapter vector")
    try:
        return RoundOrder(
            key=RoundKey(str(facts["run"]), int(facts["round"]), int(facts["attempt"])),
            client_id=str(facts["client_id"]),
            client_sha256=str(facts["client_sha256"]),
            trunk_sha256=str(facts["trunk_sha256"]),
            factor=facts["factor"],
            clients=int(facts["clients"]),
            adapter_d=adapter_d,
            ticket=_ticket(facts),
            traceparent=str(facts.get(traces.HEADER, "")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError(f"the message's config record 'round' is incomplete: {error}") from error


def _ticket(facts: ConfigRecord) -> bytes:
    """What the order to a client brings for its trunk; nothing where that needs none. Raises ValueError."""
    ticket = facts.get("ticket", b"")
    if not isinstance(ticket, bytes) or len(ticket) > MAX_TICKET_BYTES:
        raise ValueError(f"ticket is no more than {MAX_TICKET_BYTES} bytes")
    return ticket
