"""Sessions of attempts that are over end, and no more of them are taken; all others go on."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest
import torch

from contract import trunk_pb2 as pb
from contract.errors import FrameError, RoundError
from contract.records import OUTSIDE_ROUNDS, RoundKey
from server_trunk.conversation import Conversation
from server_trunk.memory import MemoryBudget
from server_trunk.requests import Opening
from server_trunk.servicer import TrunkServicer
from server_trunk.session_adapter import SessionAdapter
from tests.server_trunk.conftest import HIDDEN, RunningTrunk
from tests.server_trunk.wire_client import Refused, WireClient, WireSession

HIDDEN_BTD = torch.ones(1, 4, HIDDEN)
Open = Callable[..., WireSession]


def named(run: str, number: int, attempt: int) -> pb.RoundId:
    return pb.RoundId(run=run, round=number, attempt=attempt)


@pytest.fixture
def base(client: WireClient, lora: pb.Lora) -> str:
    return client.first_adapter(lora)


@pytest.fixture
def opened(client: WireClient, lora: pb.Lora, base: str) -> Open:
    """`opened(run, round, attempt)`: a session of a client in it."""

    def session(run: str, number: int, attempt: int, who: str = "ward") -> WireSession:
        key = named(run, number, attempt)
        return client.session(client.hello(lora, client_id=who, adapter_sha256=base, round=key))

    return session


def test_what_comes_before_an_attempt_ends_and_nothing_else_does(
    client: WireClient, lora: pb.Lora, opened: Open
) -> None:
    run = "ends-before"
    over = [opened(run, 1, 7), opened(run, 2, 1), opened(run, 2, 1, "lab")]
    going_on = [
        opened(run, 2, 2),
        opened(run, 3, 1),
        opened(run, 2, OUTSIDE_ROUNDS),
        opened("another-run", 1, 1),
        client.session(client.hello(lora, client_id="alone")),
    ]
    over[1].forward(HIDDEN_BTD)  # whose graph waits
    assert client.call("EndBefore", named(run, 2, 2)).sessions == 3
    for session, told in zip(over, ("round 1, attempt 7", "round 2, attempt 1", "round 2, attempt 1"), strict=True):
        ended = session.ending()
        assert (ended.status, ended.error) == (grpc.StatusCode.ABORTED, RoundError)
        assert ended.line == f"{told} of run {run} is over: what is computed for it counts for nothing"
    for session in going_on:
        session.forward(HIDDEN_BTD)
        session.backward(HIDDEN_BTD)
        session.close()
    assert client.call("EndBefore", named(run, 2, 2)).sessions == 0


def test_who_comes_late_to_an_attempt_is_told_that_it_is_over(client: WireClient, opened: Open) -> None:
    run = "comes-late"
    client.call("EndBefore", named(run, 2, 2))
    for number, attempt in ((1, 1), (1, 9), (2, 1)):
        with pytest.raises(Refused, match=f"round {number}, attempt {attempt} of run {run} is over") as refused:
            opened(run, number, attempt)
        assert refused.value.error is RoundError
    for number, attempt in ((2, 2), (3, 1), (1, OUTSIDE_ROUNDS)):
        opened(run, number, attempt).close()


def test_a_run_that_was_restored_from_a_backup_goes_on_where_the_backup_was_made(
    client: WireClient, opened: Open
) -> None:
    run = "restored"
    client.call("EndBefore", named(run, 20, 2))
    with pytest.raises(Refused, match="round 5, attempt 2 of run restored is over"):
        opened(run, 5, 2)
    client.call("EndBefore", named(run, 5, 2))
    opened(run, 5, 2).close()
    with pytest.raises(Refused):
        opened(run, 5, 1)


def test_a_session_that_is_ended_before_it_is_welcomed_ends_and_leaves_no_memory_taken(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, plain = start_trunk(), Conversation.run
    client = WireClient(trunk.address)
    base, key = client.first_adapter(lora), named("early", 1, 1)
    budgets: list[MemoryBudget] = []

    async def run(self: Conversation) -> None:
        budgets.append(self._memory)
        assert self._memory.taken > 0
        self.end(RoundError("ended before its first answer"))
        await plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Conversation, "run", run)
        hello = client.hello(lora, client_id="ward", adapter_sha256=base, round=key, codecs=["int4-delta", "identity"])
        session = client.session(hello)
        assert session.welcome.sample_cache_bytes > 0
        assert session.ending().error is RoundError
    assert [budget.taken for budget in budgets] == [0]
    client.session(client.hello(lora, client_id="ward", adapter_sha256=base, round=key)).close()
    client.close()


def test_an_attempt_that_ends_while_its_adapter_is_opened_takes_no_session(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, plain = start_trunk(max_sessions=1), TrunkServicer._first_adapter_in_time
    client = WireClient(trunk.address)
    base = client.first_adapter(lora)

    async def slowly(self: TrunkServicer, opening: Opening) -> SessionAdapter:
        adapter = await plain(self, opening)
        assert self._table.end_before(RoundKey("meanwhile", 1, 2)) == []
        return adapter

    monkeypatch.setattr(TrunkServicer, "_first_adapter_in_time", slowly)
    hello = client.hello(lora, client_id="ward", adapter_sha256=base, round=named("meanwhile", 1, 1))
    for _ in range(2):  # the first gave its only place back
        with pytest.raises(Refused, match="round 1, attempt 1 of run meanwhile is over") as refused:
            client.session(hello)
        assert refused.value.error is RoundError
    client.close()


def test_a_run_that_none_can_be_called_is_refused(client: WireClient) -> None:
    with pytest.raises(Refused, match="run is '../x'; it must be 1 to 128 letters") as refused:
        client.call("EndBefore", named("../x", 1, 1))
    assert refused.value.error is FrameError


def test_sessions_that_were_ended_give_back_their_places(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    trunk = start_trunk(max_sessions=2)
    client = WireClient(trunk.address)
    base = client.first_adapter(lora)

    def session(attempt: int) -> WireSession:
        key = named("full", 1, attempt)
        return client.session(client.hello(lora, client_id="ward", adapter_sha256=base, round=key))

    for attempt in (1, 2, 3):
        pair = [session(attempt), session(attempt)]
        client.call("EndBefore", named("full", 1, attempt + 1))
        for ended in pair:
            assert ended.ending().error is RoundError
    client.close()
