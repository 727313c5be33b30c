"""What one of several trunks answers to a commit: the average over those survivors that contributed to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from contract import errors
from contract import trunk_pb2 as pb
from contract.adapter import to_bytes
from contract.records import RoundKey
from server_trunk.contributions import Contributions, PartialCandidate
from tests.server_trunk.conftest import RunningTrunk
from tests.server_trunk.test_rounds import KEY, RUN, adapter, contribute, first_adapter, train
from tests.server_trunk.wire_client import WireClient

EVERYBODY = ["1", "2", "3", "8", "9"]


@pytest.fixture
def state(tmp_path: Path) -> Contributions:
    return Contributions(tmp_path / "state")


@pytest.fixture
def base(state: Contributions) -> str:
    return state.adapters.put(to_bytes(adapter(0)))


def test_a_part_is_the_average_over_the_survivors_that_are_here(state: Contributions, base: str) -> None:
    contribute(state, base)
    part = state.commit_part(KEY, base, ["9", "3", "1"])
    whole = state.commit(KEY, base, ["1", "3"])
    assert part == PartialCandidate(whole.adapter_sha256, whole.trained_tokens, ["1", "3"])


def test_a_trunk_without_any_of_them_answers_with_nobody(state: Contributions, base: str) -> None:
    contribute(state, base)
    assert state.commit_part(KEY, base, ["8", "9"]) == PartialCandidate("", 0, [])
    # One that joined late holds no base either, and still has nothing to object to.
    assert state.commit_part(KEY, "0" * 64, ["8"]) == PartialCandidate("", 0, [])


def test_a_client_that_trained_no_tokens_is_named_and_weighs_nothing(state: Contributions, base: str) -> None:
    state.add(KEY, "1", base, 0, to_bytes(adapter(1)))
    assert state.commit_part(KEY, base, EVERYBODY) == PartialCandidate("", 0, ["1"])


def test_the_same_question_gets_the_same_answer_after_a_restart_and_after_the_round(
    state: Contributions, base: str, tmp_path: Path
) -> None:
    contribute(state, base)
    first, nobody = state.commit_part(KEY, base, EVERYBODY), state.commit_part(KEY, base, ["8", "9"])
    state.add(KEY, "1", base, 999, to_bytes(adapter(77)))  # both come after the answers were given
    state.add(KEY, "9", base, 999, to_bytes(adapter(78)))
    contribute(state, base, RoundKey(RUN, 2, 1))
    state.commit(RoundKey(RUN, 2, 1), base, ["1", "2"])  # which removes round 1's contributions
    again = Contributions(tmp_path / "state")
    assert again.commit_part(KEY, base, EVERYBODY[::-1]) == first
    assert again.commit_part(KEY, base, ["8", "9"]) == nobody


def test_a_part_and_a_whole_are_not_taken_for_each_other(state: Contributions, base: str) -> None:
    contribute(state, base)
    part = state.commit_part(KEY, base, EVERYBODY)
    assert part.clients == ["1", "2", "3"]
    with pytest.raises(errors.SessionError, match="no contribution from 8, 9"):
        state.commit(KEY, base, EVERYBODY)
    assert state.commit(KEY, base, ["1", "2", "3"]).adapter_sha256 == part.adapter_sha256


def test_survivors_twice_bad_names_and_other_bases_are_refused_as_in_a_whole(state: Contributions, base: str) -> None:
    contribute(state, base)
    other = state.adapters.put(to_bytes(adapter(50)))
    with pytest.raises(errors.FrameError, match="2 names, 1 of them different"):
        state.commit_part(KEY, base, ["1", "1"])
    with pytest.raises(errors.FrameError, match="survivors is '../1'"):
        state.commit_part(KEY, base, ["../1"])
    with pytest.raises(errors.AgreementError, match=f"client 1 started from adapter {base}"):
        state.commit_part(KEY, other, ["1"])


def test_over_the_wire_only_a_part_names_its_clients(start_trunk: Callable[..., RunningTrunk], lora: pb.Lora) -> None:
    client = WireClient(start_trunk().address)
    base = first_adapter(client, lora)
    for client_id, tokens in (("1", 10), ("2", 30)):
        train(client, lora, base, client_id, tokens)

    def commit(*survivors: str, partial: bool) -> pb.CommitRoundReply:
        round_id = pb.RoundId(run=RUN, round=1, attempt=1)
        request = pb.CommitRoundRequest(round=round_id, base_sha256=base, survivors=survivors, partial=partial)
        reply: pb.CommitRoundReply = client.call("CommitRound", request)
        return reply

    part, whole = commit("3", "2", "1", partial=True), commit("1", "2", partial=False)
    assert (list(part.clients), part.trained_tokens) == (["1", "2"], 40)
    assert list(whole.clients) == []
    assert whole.adapter_sha256 == part.adapter_sha256
    assert commit("3", partial=True) == pb.CommitRoundReply()


def test_a_commit_of_nobody_leaves_nothing_and_removes_nothing(state: Contributions, base: str, tmp_path: Path) -> None:
    """Anybody who reaches the port can name a later round of a run that trains."""
    contribute(state, base)
    before = sorted((tmp_path / "state").rglob("*"))
    assert state.commit_part(RoundKey(RUN, 4_000_000_000, 1), base, ["1"]) == PartialCandidate("", 0, [])
    assert sorted((tmp_path / "state").rglob("*")) == before
    assert state.commit(KEY, base, ["1", "2"]).trained_tokens
