"""A round through the trunk: contributions, their average, and what survives a restart, a crash or a full disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from contract import errors
from contract import trunk_pb2 as pb
from contract.adapter import from_bytes, is_factor, sha256_hex, to_bytes
from contract.records import RoundKey
from server_trunk.contributions import Contributions
from tests.server_trunk.conftest import HIDDEN, RunningTrunk
from tests.server_trunk.wire_client import Refused, WireClient

RUN = "20260101-000000-abcd"
KEY = RoundKey(RUN, 1, 1)


def adapter(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("layer.lora_A.weight", "layer.lora_B.weight")
    return {name: torch.randn(3, 5, generator=generator) for name in names}


@pytest.fixture
def state(tmp_path: Path) -> Contributions:
    return Contributions(tmp_path / "state")


@pytest.fixture
def base(state: Contributions) -> str:
    return state.adapters.put(to_bytes(adapter(0)))


def contribute(state: Contributions, base: str, key: RoundKey = KEY, clients: dict[str, int] | None = None) -> None:
    for seed, (client, tokens) in enumerate((clients or {"1": 3, "2": 5, "3": 11}).items(), start=1):
        state.add(key, client, base, tokens, to_bytes(adapter(seed)))


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_average_is_weighted_by_tokens_over_exactly_the_survivors(state: Contributions, base: str) -> None:
    contribute(state, base)
    candidate = state.commit(KEY, base, ["3", "1"])
    assert candidate.trained_tokens == 14
    data = state.adapters.get(candidate.adapter_sha256)
    assert sha256_hex(data) == candidate.adapter_sha256
    one, three = adapter(1), adapter(3)
    for name, got in from_bytes(data).items():
        for index in ((0, 0), (2, 4), (1, 3)):
            exact = (3 * Fraction(float(one[name][index])) + 11 * Fraction(float(three[name][index]))) / 14
            assert float(got[index]) == float(torch.tensor(float(exact), dtype=torch.float32))


def test_a_factor_that_nobody_trained_stays_bit_for_bit(state: Contributions, base: str) -> None:
    frozen = adapter(0)["layer.lora_A.weight"]
    for client, tokens in (("1", 7), ("2", 13), ("3", 1_000_003)):
        state.add(KEY, client, base, tokens, to_bytes({**adapter(int(client)), "layer.lora_A.weight": frozen}))
    candidate = state.commit(KEY, base, ["1", "2", "3"])
    assert torch.equal(from_bytes(state.adapters.get(candidate.adapter_sha256))["layer.lora_A.weight"], frozen)


def test_the_same_commit_gives_the_same_answer_in_any_order_and_after_a_restart(
    state: Contributions, base: str, tmp_path: Path
) -> None:
    contribute(state, base)
    first = state.commit(KEY, base, ["1", "2", "3"])
    assert state.commit(KEY, base, ["3", "2", "1"]) == first
    state.add(KEY, "1", base, 999, to_bytes(adapter(77)))  # comes after the answer was given
    assert Contributions(tmp_path / "state").commit(KEY, base, ["2", "1", "3"]) == first


def test_other_survivors_and_other_attempts_give_other_candidates(state: Contributions, base: str) -> None:
    contribute(state, base)
    contribute(state, base, RoundKey(RUN, 1, 2), {"9": 1, "1": 1})
    found = {
        state.commit(KEY, base, ["1", "2", "3"]).adapter_sha256,
        state.commit(KEY, base, ["1", "2"]).adapter_sha256,
        state.commit(RoundKey(RUN, 1, 2), base, ["9", "1"]).adapter_sha256,
    }
    assert len(found) == 3


def test_a_clients_later_contribution_replaces_its_earlier_one(state: Contributions, base: str) -> None:
    state.add(KEY, "1", base, 5, to_bytes(adapter(1)))
    state.add(KEY, "1", base, 9, to_bytes(adapter(2)))
    candidate = state.commit(KEY, base, ["1"])
    assert candidate.trained_tokens == 9
    assert candidate.adapter_sha256 == sha256_hex(to_bytes(adapter(2)))


@pytest.mark.parametrize(
    ("survivors", "error", "line"),
    [
        (["1", "4", "5"], errors.SessionError, f"run {RUN} round 1 attempt 1: no contribution from 4, 5"),
        ([], errors.FrameError, "survivors has 0 names"),
        (["1", "1"], errors.FrameError, "survivors has 2 names, 1 of them different"),
        (["../1"], errors.FrameError, "survivors is '../1'"),
    ],
)
def test_survivors_that_cannot_be_averaged_are_named(
    state: Contributions, base: str, survivors: list[str], error: type[Exception], line: str
) -> None:
    contribute(state, base)
    before = everything(Path(state.adapters.path(base)).parents[1])
    with pytest.raises(error, match=line):
        state.commit(KEY, base, survivors)
    assert everything(Path(state.adapters.path(base)).parents[1]) == before


def test_bases_shapes_and_weights_must_fit(state: Contributions, base: str) -> None:
    other = state.adapters.put(to_bytes(adapter(50)))
    contribute(state, base, clients={"1": 3})
    state.add(KEY, "2", other, 5, to_bytes(adapter(2)))
    state.add(KEY, "3", base, 5, to_bytes({"layer.lora_A.weight": torch.zeros(2, 2)}))
    state.add(KEY, "4", base, 0, to_bytes(adapter(4)))
    with pytest.raises(errors.AgreementError, match=f"client 2 started from adapter {other}; the round commits on"):
        state.commit(KEY, base, ["1", "2"])
    with pytest.raises(errors.AgreementError, match="of client [13] and client [13] have different tensors"):
        state.commit(KEY, base, ["1", "3"])
    with pytest.raises(errors.UpdateError, match="trained no tokens"):
        state.commit(KEY, base, ["4"])
    with pytest.raises(errors.SessionError, match="does not hold adapter"):
        state.commit(KEY, "0" * 64, ["1"])
    assert state.commit(KEY, base, ["1", "4"]).trained_tokens == 3


def test_a_later_commit_removes_earlier_rounds_contributions_of_its_run_only(
    state: Contributions, base: str, tmp_path: Path
) -> None:
    other_run = RoundKey("other", 1, 1)
    for key in (KEY, RoundKey(RUN, 2, 1), other_run):
        contribute(state, base, key)
    first = state.commit(KEY, base, ["1", "2"])
    state.commit(RoundKey(RUN, 2, 1), base, ["1", "2"])
    assert not (tmp_path / "state/rounds" / RUN / "1").exists()
    assert (tmp_path / "state/rounds" / RUN / "2").exists()
    assert (tmp_path / "state/rounds/other/1").exists()
    assert state.commit(KEY, base, ["1", "2"]) == first  # the answer itself is kept
    with pytest.raises(errors.SessionError, match="no contribution from 1, 3"):
        state.commit(KEY, base, ["1", "3"])


def test_a_changed_contribution_is_noticed(state: Contributions, base: str, tmp_path: Path) -> None:
    contribute(state, base)
    for path in (tmp_path / "state/rounds" / RUN / "1/artifacts").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(errors.IntegrityError, match="hashes to"):
        state.commit(KEY, base, ["1", "2"])


def test_a_record_that_is_none_is_named(state: Contributions, base: str, tmp_path: Path) -> None:
    contribute(state, base)
    (tmp_path / "state/rounds" / RUN / "1/1/2.json").write_text("{}")
    with pytest.raises(errors.StorageError, match="2.json is not a readable contribution"):
        state.commit(KEY, base, ["1", "2"])


@pytest.mark.parametrize("call", ["contribute", "commit"])
@pytest.mark.parametrize("writes", [0, 1])
def test_a_full_disk_leaves_everything_as_it_was(
    state: Contributions, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, writes: int
) -> None:
    """`writes` files still fit: none, or the adapter but not the record that makes it count."""
    contribute(state, base)
    whole = everything(tmp_path / "state")
    real, left = os.fsync, [2 * writes]  # a file and its directory

    def fsync(descriptor: int) -> None:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        real(descriptor)

    def attempt() -> Any:
        if call == "commit":
            return state.commit(KEY, base, ["1", "2"])
        return state.add(KEY, "9", base, 5, to_bytes(adapter(9)))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(
            errors.StorageError, match="cannot .*[Ww]rit.*No space left on device|written: No space left"
        ):
            attempt()
    after = everything(tmp_path / "state")
    new = {name for name in after if after.get(name) != whole.get(name)}
    assert len(new) <= writes
    assert all(name.endswith(".safetensors") for name in new)
    with pytest.raises(errors.SessionError, match="no contribution from 9"):
        state.commit(KEY, base, ["9"])
    attempt()
    assert state.commit(KEY, base, ["1", "2"]).trained_tokens == 8


# ---- over the wire -------------------------------------------------------------------------------------------------


def first_adapter(client: WireClient, lora: pb.Lora) -> str:
    session = client.session(client.hello(lora, seed=3))
    data = session.read()
    session.close()
    return client.put_adapter(sha256_hex(data), data)


def train(
    client: WireClient, lora: pb.Lora, base: str, client_id: str, tokens: int, number: int = 1, **close: Any
) -> tuple[pb.CloseReply, bytes]:
    hello = client.hello(
        lora,
        client_id=client_id,
        adapter_sha256=base,
        round=pb.RoundId(run=RUN, round=number, attempt=1),
        trainable="B",
    )
    session = client.session(hello)
    generator = torch.Generator().manual_seed(int(client_id))
    for _ in range(2):
        session.forward(torch.randn(1, 4, HIDDEN, generator=generator))
        session.backward(torch.randn(1, 4, HIDDEN, generator=generator))
        session.step()
    data = session.read()
    return session.close(trained_tokens=tokens, **{"contribute": True, **close}), data


def commit(client: WireClient, base: str, *survivors: str, number: int = 1) -> pb.CommitRoundReply:
    round_id = pb.RoundId(run=RUN, round=number, attempt=1)
    request = pb.CommitRoundRequest(round=round_id, base_sha256=base, survivors=survivors)
    reply: pb.CommitRoundReply = client.call("CommitRound", request)
    return reply


def test_a_round_over_the_wire_survives_a_restart_of_the_trunk(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    client = WireClient(start_trunk().address)
    base = first_adapter(client, lora)
    trained = {}
    for client_id, tokens in (("1", 10), ("2", 30)):
        reply, trained[client_id] = train(client, lora, base, client_id, tokens)
        assert reply.adapter_sha256 == sha256_hex(trained[client_id])
        assert reply.trained_tokens == tokens
    train(client, lora, base, "3", 50, contribute=False)
    with pytest.raises(Refused) as caught:
        commit(client, base, "1", "3")
    assert caught.value.error is errors.SessionError
    assert caught.value.line == f"run {RUN} round 1 attempt 1: no contribution from 3"

    restarted = WireClient(start_trunk().address)  # on the same state directory
    reply = commit(restarted, base, "2", "1")
    assert reply.trained_tokens == 40
    assert commit(client, base, "1", "2") == reply
    average = from_bytes(restarted.get_adapter(reply.adapter_sha256))
    one, two, start = from_bytes(trained["1"]), from_bytes(trained["2"]), from_bytes(restarted.get_adapter(base))
    for name, got in average.items():
        expected = (10 * one[name].double() + 30 * two[name].double()) / 40
        assert torch.equal(got, expected.float()), name
        assert torch.equal(got, start[name]) == is_factor(name, "A"), name

    session = restarted.session(restarted.hello(lora, adapter_sha256=reply.adapter_sha256))
    assert session.read() == restarted.get_adapter(reply.adapter_sha256)


def test_progress_rises_with_a_rounds_sessions(start_trunk: Callable[..., RunningTrunk], lora: pb.Lora) -> None:
    client = WireClient(start_trunk().address)
    base = first_adapter(client, lora)
    round_id = pb.RoundId(run=RUN, round=1, attempt=1)
    assert client.call("Progress", round_id) == pb.ProgressReply()
    first, _ = train(client, lora, base, "1", 10)
    second, _ = train(client, lora, base, "2", 10)
    done = client.call("Progress", round_id)
    assert (done.sessions, done.steps, done.tokens) == (2, 4, 16)
    assert done.received_bytes == first.received_bytes + second.received_bytes
    assert done.sent_bytes > first.sent_bytes + second.sent_bytes  # the close replies themselves are in it


def test_bytes_are_counted_both_ways(client: WireClient, lora: pb.Lora) -> None:
    session = client.session(client.hello(lora))
    session.forward(torch.zeros(1, 4, HIDDEN))
    session.backward(torch.zeros(1, 4, HIDDEN))
    before = session.received_bytes
    reply = session.close()
    assert reply.received_bytes == session.sent_bytes
    assert reply.sent_bytes == before


def test_a_poisoned_adapter_is_not_taken(start_trunk: Callable[..., RunningTrunk], lora: pb.Lora) -> None:
    client = WireClient(start_trunk().address)
    base = first_adapter(client, lora)
    round_id = pb.RoundId(run=RUN, round=1, attempt=1)
    session = client.session(client.hello(lora, adapter_sha256=base, round=round_id))
    for _ in range(4):
        session.forward(torch.ones(1, 4, HIDDEN))
        session.backward(torch.ones(1, 4, HIDDEN))
        session.step(lr=1e6, weight_decay=1e6)
    with pytest.raises(Refused) as caught:
        session.close(trained_tokens=1, contribute=True)
    assert caught.value.error is errors.UpdateError
    assert "holds a NaN or an infinity in base_model.model.model.layers" in caught.value.line
    with pytest.raises(Refused, match="no contribution from 1"):
        commit(client, base, "1")


def test_a_full_disk_is_told_to_the_client_and_the_trunk_goes_on(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = WireClient(start_trunk().address)
    base = first_adapter(client, lora)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(Refused) as caught:
            train(client, lora, base, "1", 10)
    assert caught.value.error is errors.StorageError
    assert "No space left on device" in caught.value.line
    with pytest.raises(Refused, match="no contribution from 1"):
        commit(client, base, "1")
    train(client, lora, base, "1", 10)
    assert commit(client, base, "1").trained_tokens == 10


def test_a_trunk_removes_what_a_killed_one_left_half_written_and_put_aside(
    start_trunk: Callable[..., RunningTrunk], tmp_path: Path
) -> None:
    half, aside = tmp_path / "state" / "artifacts" / ".partial-1", tmp_path / "state" / "spill-1" / "request-1"
    for path in (half, aside):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half of an adapter, or somebody's activations")
        os.utime(path, (0, 0))
    start_trunk()
    assert not half.exists()
    assert not aside.parent.exists()
