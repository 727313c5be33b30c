"""No session outlives its attempt at the trunk by more than it takes the orchestrator to say so, or to be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Error, Message
from peft import LoraConfig

from contract import trunk_pb2 as pb
from contract.adapter import resolve_lora
from contract.errors import ConnectionFailedError, QuorumError, RoundError
from contract.records import RoundKey
from contract.wire import lora_to_wire
from orchestrator.trunk import Trunk
from orchestrator.trunk_sessions import TrunkSessions
from storage.records import RoundCommit
from tests.orchestrator.conftest import Bench, LiveTrunk
from tests.orchestrator.fakes import Content, FakeNode
from tests.server_trunk.conftest import trunk_only
from tests.server_trunk.wire_client import Refused, WireClient, WireSession

MakeBench = Callable[..., Bench]
Train = Callable[[str, int, int], WireSession]


@pytest.fixture
def train(live_trunk: LiveTrunk, tiny_model: Path) -> Iterator[Train]:
    """`train(run, round, attempt)`: the session of a site that trains for it and is not done yet."""
    client = WireClient(live_trunk.address)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = lora_to_wire(trunk_only(resolve_lora(tiny_model, config)))
    base = client.first_adapter(lora)

    def session(run: str, number: int, attempt: int) -> WireSession:
        key = pb.RoundId(run=run, round=number, attempt=attempt)
        return client.session(client.hello(lora, client_id="ward", adapter_sha256=base, round=key))

    yield session
    client.close()


def trains_on(bench: Bench, train: Train, number: int) -> list[WireSession]:
    """From round `number` on the second of two clients fails and leaves a session open; they come to the list."""
    left: list[WireSession] = []
    healthy = bench.clients[2]

    def leaves(message: Message) -> Content:
        if int(message.metadata.group_id or 0) < number:
            return healthy(message)
        row = bench.store.rounds(bench.store.get_run("last").run_id)[-1]
        left.append(train(row.run_id, row.number, row.attempt))
        return Error(8)

    bench.grid.nodes[2] = FakeNode(leaves)
    return left


def test_a_run_that_ends_leaves_no_session_of_its_last_attempt(make_bench: MakeBench, train: Train) -> None:
    bench = make_bench({1: 100, 2: 60}).tell_shapes_ahead()
    left = trains_on(bench, train, 2)
    with pytest.raises(QuorumError):
        bench.conduct()
    (session,) = left
    assert session.ending().error is RoundError


def test_a_resumed_run_ends_what_its_dead_attempt_left_and_goes_on(
    make_bench: MakeBench, train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench({1: 100, 2: 60}).tell_shapes_ahead()
    left = trains_on(bench, train, 2)

    def silent(self: Trunk, key: RoundKey) -> None:
        raise ConnectionFailedError("nothing answers")

    with monkeypatch.context() as patch:  # a run that was killed says nothing more to its trunk
        patch.setattr(Trunk, "end_before", silent)
        with pytest.raises(QuorumError):
            bench.conduct()
    assert "sites that train for an attempt that is over do so until they are done: nothing answers" in caplog.text
    run = bench.store.get_run("last")
    left.append(train(run.run_id, 2, 1))
    ended: list[object] = []

    def answers(message: Message) -> Content:
        while left:  # freed before anybody is asked for anything
            ended.append(left.pop().ending().error)
        return bench.clients[2](message)

    bench.grid.nodes[2] = FakeNode(answers)
    assert bench.conduct(resume_run=run.run_id).round == 2
    assert ended == [RoundError, RoundError]


@pytest.mark.parametrize("committed", [False, True])
def test_an_attempt_that_is_aborted_or_committed_is_over_and_the_next_one_goes_on(
    live_trunk: LiveTrunk, train: Train, committed: bool
) -> None:
    trunk, run = Trunk(live_trunk.address), f"committed-{committed}"
    sessions, key = TrunkSessions(trunk, run), RoundKey(run, 3, 1)
    sessions.end()  # before the first attempt there is nothing to end
    sessions.opened(key, 2)
    over, next_one = train(run, 3, 1), train(run, 3, 2)
    if committed:
        sessions.committed(RoundCommit(run, 3, 1, "c" * 64, "d" * 64, 10, ["1"], 1.0))
    else:
        sessions.aborted(key)
    assert over.ending().error is RoundError
    next_one.read()
    next_one.close()
    trunk.close()


def test_a_run_whose_backup_was_made_before_its_first_round_begins_anew(live_trunk: LiveTrunk, train: Train) -> None:
    trunk = Trunk(live_trunk.address)
    trunk.end_before(RoundKey("restored-early", 7, 1))
    with pytest.raises(Refused, match="round 1, attempt 1 of run restored-early is over"):
        train("restored-early", 1, 1)
    TrunkSessions(trunk, "restored-early").take_over([])
    session = train("restored-early", 1, 1)
    assert session.close().trained_tokens == 0
    trunk.close()
