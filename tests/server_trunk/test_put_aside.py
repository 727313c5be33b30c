"""A session's replies and graphs that go to disk for others' sake, while its client takes them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft import LoraConfig

from contract.adapter import resolve_lora
from server_trunk.conversation import Conversation
from server_trunk.engine import Engine
from server_trunk.memory import Hold, MemoryBudget, Spill
from server_trunk.outgoing import Outgoing
from server_trunk.sessions import PendingGraphs
from tests.server_trunk.conftest import CUT, save_llama, trunk_only
from tests.server_trunk.test_lane import ask, request


def test_a_reply_that_is_taken_before_its_turn_comes_takes_no_graph_from_what_is_put_aside(tmp_path: Path) -> None:
    """Else a graph stays in memory that is counted no longer, and its adapter may leave without it."""
    directory = save_llama(tmp_path / "model")
    engine = Engine(directory, CUT, dtype="float32", attn_implementation="sdpa", device="cpu", lanes=1)
    spec = trunk_only(resolve_lora(directory, LoraConfig(r=4, target_modules="all-linear")))
    asked, lane = request(engine.open(spec, 1, "AB"), 2, 6, 1), engine.lanes[0]

    async def play() -> None:
        spill, pending = Spill(tmp_path, 1 << 30), PendingGraphs(4, 600, time.monotonic)
        budget = MemoryBudget(1 << 30)
        hold = Hold(budget)
        pending.reserve(1, hold)
        hold.grow(1000)
        hold.keep_graph(5000)
        ((output_BTD, graph),) = lane.forward([asked])
        out = Outgoing(None, memoryview(b"a reply"), hold, graph=graph)
        turn = asyncio.Event()

        async def done(work: Any) -> None:
            await turn.wait()
            work()

        conversation: Any = object.__new__(Conversation)
        conversation._session, conversation._seat = SimpleNamespace(pending=pending), None
        conversation._unsent, conversation._spill = [out], spill
        conversation._scheduler = SimpleNamespace(other=lambda seat, work: asyncio.ensure_future(done(work)))
        putting = asyncio.create_task(conversation.put_aside())
        await asyncio.sleep(0)
        pending.add(1, graph)
        out.graph = None
        turn.set()
        await putting
        assert (graph.output_BTD, graph.input_BTD) == (None, None)
        assert budget.taken == 0
        ((_, norm),) = lane.backward([ask(asked, pending.pop(1))])
        assert norm > 0
        spill.close()

    asyncio.run(play())
