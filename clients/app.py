"""The Flower ClientApp of a site: one message is one round's work.

torch, transformers and PEFT are imported when a message has come: in a deployment every message starts a process, and
this module is imported in all of them.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.site import in_simulation, read_site
from contract.config import RunConfig
from contract.errors import FrameError, TrunklineError
from contract.flat_array import read_flat
from contract.openmp import waiting
from contract.records import RoundKey

if TYPE_CHECKING:
    from clients.participation import RoundOrder

app = ClientApp()
logger = logging.getLogger("trunkline.clients")

_REASON_LETTERS = 1000
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


def _answer(message: Message, context: Context, *, training: bool) -> Message:
    try:
        return Message(_work(message, context, training=training), reply_to=message)
    except TrunklineError as error:
        logger.error("round refused: %s: %s", type(error).__name__, error)
        return Message(Error(REFUSED, _one_line(error)), reply_to=message)
    # A fault's own text may quote what it choked on, which may be a row: it stays in this site's log.
    except Exception as error:
        logger.exception("round failed")
        return Message(Error(FAULT, f"{type(error).__name__} at the client; its log says more"), reply_to=message)


def _speak() -> None:
    """Let a site's SuperNode log say what this app does: Flower configures only its own logger."""
    root = logging.getLogger("trunkline")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)-7s trunkline: %(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)


def _one_line(error: TrunklineError) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_REASON_LETTERS]


def _work(message: Message, context: Context, *, training: bool) -> RecordDict:
    simulated = in_simulation()
    if not simulated:
        _speak()
    config = RunConfig.from_flower(context.run_config)
    site = read_site(context.node_config, config, str(context.node_id), simulated=simulated)
    os.environ.update(waiting(os.environ))
    from clients.participation import take_part

    done = take_part(_read_order(message.content), config, site, training=training)
    content = RecordDict({"metrics": MetricRecord(dict(done.metrics))})
    if done.upload is not None:
        content["update"] = ArrayRecord({"update": Array(np.frombuffer(done.upload, dtype=np.uint8))})
    return content


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
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError(f"the message's config record 'round' is incomplete: {error}") from error
