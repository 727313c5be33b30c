"""Messages out, answers back: in any order, with errors, late, twice, or never."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict

from contract.records import NOTHING_SEEN, RoundProgress
from orchestrator.deadline import ProgressDeadline
from orchestrator.exchange import MESSAGE_TTL_S, POLL_S, Answer, Exchange
from orchestrator.messages import RoundOrder, adapter_record, order_message
from tests.orchestrator.fakes import Content, FakeClock, FakeGrid, FakeNode

ORDER = RoundOrder("run", 1, 1, "c" * 64, "t" * 64, "B", 3, False)


def message_for(node_id: str) -> Message:
    return order_message(node_id, ORDER, adapter_record(np.zeros(4, dtype=np.float32)))


def says(name: str) -> Content:
    return RecordDict({name: adapter_record(np.zeros(1, dtype=np.float32))})


def quiet_deadline(clock: FakeClock, timeout_s: float = 5.0) -> ProgressDeadline:
    return ProgressDeadline(clock, timeout_s, lambda: NOTHING_SEEN)


@dataclass
class Setting:
    clock: FakeClock
    grid: FakeGrid
    exchange: Exchange

    def ask(self, nodes: list[str], timeout_s: float = 5.0) -> list[Answer]:
        return list(self.exchange.ask(nodes, message_for, quiet_deadline(self.clock, timeout_s)))


def setting(nodes: dict[int, FakeNode]) -> Setting:
    clock = FakeClock()
    grid = FakeGrid(clock, nodes)
    return Setting(clock, grid, Exchange(grid, clock))


def test_answers_come_as_they_are_ready_and_one_at_a_time() -> None:
    found = setting({n: FakeNode(lambda m: says("x"), after_s=1.0 / n) for n in (1, 2, 3)})
    assert [answer.node_id for answer in found.ask(["1", "2", "3"])] == ["3", "2", "1"]
    assert {len(ids) for ids in found.grid.pulled} == {1}
    assert min(found.clock.sleeps) >= POLL_S


def test_the_next_reply_is_not_pulled_before_the_last_one_was_used() -> None:
    found = setting({n: FakeNode(lambda m: says("x"), after_s=0.0) for n in (1, 2, 3)})
    answers = found.exchange.ask(["1", "2", "3"], message_for, quiet_deadline(found.clock))
    next(answers)
    assert len(found.grid.pulled) == 1


def test_every_message_carries_its_own_time_to_live_and_kind() -> None:
    found = setting({1: FakeNode(lambda m: says("x"))})
    found.ask(["1"])
    metadata = found.grid.sent[0].metadata
    assert (metadata.ttl, metadata.message_type, metadata.group_id) == (MESSAGE_TTL_S, "train.round", "1")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (Error(1000, "DataError: no rows\nin the file"), "DataError: no rows in the file"),
        (Error(5, "node left"), "the node is not connected any more: node left"),
        (Error(2), "its ClientApp raised an error"),
        (Error(8), "its ClientApp process died"),
        (Error(77), "it answered with error code 77"),
    ],
)
def test_an_error_reply_is_an_answer_with_its_reason_in_one_line(error: Error, told: str) -> None:
    found = setting({1: FakeNode(lambda m: error), 2: FakeNode(lambda m: says("x"))})
    answers = {answer.node_id: answer for answer in found.ask(["1", "2"])}
    assert answers["1"].failure == told
    assert answers["1"].content is None
    assert answers["2"].failure is None


def test_a_node_that_flower_gives_no_message_to_blocks_nobody() -> None:
    found = setting({1: FakeNode(lambda m: says("x")), 2: FakeNode(lambda m: says("x"))})
    found.grid.refuse = {1}
    answers = {answer.node_id: answer.failure for answer in found.ask(["1", "2"])}
    assert answers == {"1": "Flower did not take the message to it", "2": None}


def test_a_silent_node_is_late_and_the_wait_for_it_bounded() -> None:
    found = setting({1: FakeNode(lambda m: says("x"), after_s=2.0), 2: FakeNode(None)})
    started = found.clock.now
    assert [answer.node_id for answer in found.ask(["1", "2"], timeout_s=5.0)] == ["1"]
    assert found.clock.now - started == pytest.approx(2.0 + 5.0, abs=0.5)  # the deadline counts from the last reply


def test_a_late_node_is_busy_until_its_answer_has_come() -> None:
    found = setting({1: FakeNode(lambda m: says("x")), 2: FakeNode(lambda m: says("x"), after_s=60.0)})
    found.ask(["1", "2"], timeout_s=5.0)
    assert found.exchange.busy() == {"2"}
    found.clock.sleep(60.0)
    assert found.exchange.busy() == set()
    assert [answer.node_id for answer in found.ask(["2"], timeout_s=100.0)] == ["2"]


def test_replies_that_nobody_awaits_are_dropped() -> None:
    found = setting({1: FakeNode(lambda m: says("x"), after_s=0.5), 2: FakeNode(lambda m: says("x"))})
    earlier = message_for("2")
    earlier.metadata.__dict__["_message_id"] = "earlier"
    found.grid.strays = [Message(says("stray"), reply_to=earlier)]
    answers = found.ask(["1", "2"])
    assert sorted(answer.node_id for answer in answers) == ["1", "2"]
    assert all(answer.content is not None and "stray" not in answer.content for answer in answers)


def test_a_reply_that_comes_twice_is_one_answer() -> None:
    class TwiceGrid(FakeGrid):
        def pull_messages(self, message_ids: list[str]) -> list[Message]:
            return [reply for reply in super().pull_messages(message_ids) for _ in range(2)]

    clock = FakeClock()
    grid = TwiceGrid(clock, {1: FakeNode(lambda m: says("x"))})
    assert len(list(Exchange(grid, clock).ask(["1"], message_for, quiet_deadline(clock)))) == 1


def test_work_seen_by_the_trunk_extends_the_deadline_and_silence_ends_it() -> None:
    found = setting({1: FakeNode(lambda m: says("x"), after_s=30.0), 2: FakeNode(None)})
    started = found.clock.now

    def steps_for_40_s() -> RoundProgress:
        steps = int(min(found.clock.now - started, 40.0))
        return RoundProgress(sessions=2, steps=steps, tokens=0, received_bytes=0, sent_bytes=0)

    deadline = ProgressDeadline(found.clock, 5.0, steps_for_40_s)
    assert [answer.node_id for answer in found.exchange.ask(["1", "2"], message_for, deadline)] == ["1"]
    assert found.clock.now - started == pytest.approx(45.0, abs=1.5)
