"""One round: what it commits, what it drops, and what makes it fail with nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from numpy.lib import format as npy

from aggregation.ring import plan
from aggregation.rules import trainable_factor
from contract import adapter
from contract.errors import AgreementError, ConfigError, QuorumError, StorageError
from orchestrator.adapters import ClientPart
from orchestrator.desk import Desk, Version
from orchestrator.round import judge_last, play_round
from storage.artifacts import ArtifactStore
from tests.orchestrator.conftest import Bench
from tests.orchestrator.fakes import Content, FakeNode, ScriptedClient, drift

MakeBench = Callable[..., Bench]


def expected_client(bench: Bench, before: ClientPart, number: int, survivors: list[int]) -> np.ndarray:
    """The float64 weighted mean of what the survivors trained, computed apart from the code under test."""
    factor = trainable_factor(bench.config.aggregation, number)
    where = np.concatenate(
        [
            np.full(int(np.prod(before.shapes[name])), factor == "AB" or name.endswith(f"lora_{factor}.weight"))
            for name in before.names
        ]
    )
    total = sum(bench.clients[n].weight for n in survivors)
    mean = sum(bench.clients[n].weight * bench.clients[n].updates[number] for n in survivors) / total
    expected = before.vector_d.astype(np.float64)
    expected[where] += mean
    return expected


def expected_trunk(bench: Bench, version: Version, number: int, survivors: list[int]) -> dict[str, np.ndarray]:
    tensors = adapter.from_bytes(bench.artifacts.get(version.trunk_sha256))
    factor = trainable_factor(bench.config.aggregation, number)
    total = sum(bench.clients[n].weight for n in survivors)
    expected = {}
    for name, tensor in tensors.items():
        expected[name] = tensor.numpy().astype(np.float64)
        if name in adapter.trainable_names(tensors, factor):
            for n in survivors:
                moved = drift(tensor.numel(), f"trunk {n} {number} {name}").reshape(tensor.shape)
                expected[name] += bench.clients[n].weight / total * moved
    return expected


def step_bound(bench: Bench, cohort: int, survivors: list[int]) -> float:
    point = plan(cohort, bench.config.max_trained_tokens(), bench.config.update_clip)
    return point.error_bound(len(survivors), sum(bench.clients[n].weight for n in survivors))


def outcomes(desk: Desk, number: int = 1) -> dict[str, str]:
    return {row.node_id: row.status for row in desk.store.participations(desk.run_id, number)}


def reasons(desk: Desk, number: int = 1) -> dict[str, str | None]:
    return {row.node_id: row.reason for row in desk.store.participations(desk.run_id, number)}


def require_mean(bench: Bench, before: Version, after: Version, survivors: list[int], cohort: int) -> None:
    expected = expected_client(bench, before.client, after.number, survivors)
    rounding = np.abs(expected).max() * 2**-23
    assert np.abs(after.client.vector_d - expected).max() <= step_bound(bench, cohort, survivors) + rounding
    trunk = adapter.from_bytes(bench.artifacts.get(after.trunk_sha256))
    for name, wanted in expected_trunk(bench, before, after.number, survivors).items():
        np.testing.assert_allclose(trunk[name].numpy(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", ["ffa", "rolora", "fedavg"])
def test_two_rounds_move_both_halves_by_the_weighted_mean(make_bench: MakeBench, rule: str) -> None:
    bench = make_bench(aggregation=rule)
    desk = bench.desk()
    version = bench.first(desk)
    for _ in range(2):
        after = play_round(desk, version)
        require_mean(bench, version, after, [1, 2, 3], 3)
        assert not np.array_equal(after.client.vector_d, version.client.vector_d)
        version = after
    committed = desk.store.adapter_version(desk.run_id, 2)
    assert (committed.client_sha256, committed.trunk_sha256) == (version.client_sha256, version.trunk_sha256)
    assert committed.trained_tokens == 180
    assert ClientPart.from_bytes(bench.artifacts.get(version.client_sha256)).vector_d.tolist() == (
        version.client.vector_d.tolist()
    )


def test_what_a_round_does_not_train_stays_bit_for_bit(make_bench: MakeBench) -> None:
    bench = make_bench(aggregation="ffa")
    desk = bench.desk()
    before = bench.first(desk)
    after = play_round(desk, before)
    frozen = ~before.client.trained("B")
    assert frozen.any()
    assert before.client.vector_d[frozen].tobytes() == after.client.vector_d[frozen].tobytes()


def test_each_client_is_told_its_round_and_nothing_else(make_bench: MakeBench) -> None:
    bench = make_bench()
    desk = bench.desk()
    version = bench.first(desk)
    play_round(desk, version)
    order = bench.clients[2].orders[0]
    assert order == {
        "run": desk.run_id,
        "round": 1,
        "attempt": 1,
        "client_id": "2",
        "client_sha256": version.client_sha256,
        "trunk_sha256": version.trunk_sha256,
        "factor": "B",
        "clients": 3,
        "final": False,
    }
    assert set(bench.grid.sent[0].content) == {"adapter", "round"}
    assert bench.clients[2].received[1].tolist() == version.client.vector_d.tolist()


def test_sql_holds_metrics_by_client_and_weighted_over_all(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60})
    bench.clients[1].lost = lambda number: 4.0
    bench.clients[2].lost = lambda number: 2.0
    desk = bench.desk()
    play_round(desk, bench.first(desk))
    rows = {(row.number, row.attempt, row.node_id, row.name): row.value for row in desk.store.metrics(desk.run_id)}
    assert rows[0, 0, "1", "eval_loss"] == 4.0
    assert rows[0, 0, None, "eval_loss"] == 3.0  # 10 held-out tokens each, and it judges version 0
    assert rows[1, 1, "2", "trained_tokens"] == 60
    assert rows[1, 1, None, "trained_tokens"] == 160
    committed = desk.store.rounds(desk.run_id)[0]
    assert set(committed.phase_seconds) == {"cohort", "training", "averaging", "storing"}
    assert committed.seconds == pytest.approx(sum(committed.phase_seconds.values()))


# ---- clients that fail -----------------------------------------------------------------------------------------------


def truncated(client: ScriptedClient) -> Callable[[Message], Content]:
    return with_update(client, lambda data: data[:-4])


def oversized(client: ScriptedClient) -> Callable[[Message], Content]:
    return with_update(client, lambda data: np.concatenate([data, np.zeros(8, dtype=np.uint8)]))


def huge(client: ScriptedClient) -> Callable[[Message], Content]:
    return with_update(client, lambda data: np.zeros(data.size + 100_000, dtype=np.uint8))


def as_floats(client: ScriptedClient) -> Callable[[Message], Content]:
    return with_update(client, lambda data: data.view(np.float32))


def with_update(client: ScriptedClient, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Message], Content]:
    def work(message: Message) -> Content:
        reply = client(message)
        assert isinstance(reply, RecordDict)
        data = reply["update"]["update"].numpy()
        reply["update"] = ArrayRecord({"update": Array(change(data))})
        return reply

    return work


def without_update(client: ScriptedClient) -> Callable[[Message], Content]:
    return lambda message: RecordDict({"metrics": MetricRecord({"eval_loss": 1.0})})


def two_arrays(client: ScriptedClient) -> Callable[[Message], Content]:
    one = Array(np.zeros(4, dtype=np.uint8))
    return lambda message: RecordDict({"update": ArrayRecord({"a": one, "b": one})})


def no_array_at_all(client: ScriptedClient) -> Callable[[Message], Content]:
    broken = Array(dtype="uint8", shape=(4,), stype="numpy.ndarray", data=b"not a numpy file")
    return lambda message: RecordDict({"update": ArrayRecord({"update": broken})})


def claiming_a_terabyte(client: ScriptedClient) -> Callable[[Message], Content]:
    header = BytesIO()
    npy.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40,)})
    claim = Array(dtype="uint8", shape=(1 << 40,), stype="numpy.ndarray", data=header.getvalue() + b"few")
    return lambda message: RecordDict({"update": ArrayRecord({"update": claim})})


def refusing(client: ScriptedClient) -> Callable[[Message], Content]:
    return lambda message: Error(1000, "UpdateError: coordinate 7 of the update is nan; it must be finite")


def gone(client: ScriptedClient) -> Callable[[Message], Content]:
    return lambda message: Error(5)


@pytest.mark.parametrize(
    ("misbehave", "status", "told"),
    [
        (truncated, "refused", "truncated update"),
        (oversized, "refused", "oversized update"),
        (huge, "refused", "bytes; about"),
        (as_floats, "refused", "must be flat uint8"),
        (without_update, "refused", "holds no array record 'update'"),
        (two_arrays, "refused", "holds 2 arrays"),
        (no_array_at_all, "refused", "is no array"),
        (claiming_a_terabyte, "refused", "(1099511627776,) in 3 bytes; it must be flat uint8"),
        (refusing, "failed", "coordinate 7 of the update is nan"),
        (gone, "failed", "not connected any more"),
    ],
)
def test_an_unusable_answer_is_recorded_and_the_survivors_average_is_exact(
    make_bench: MakeBench, misbehave: Callable[[ScriptedClient], Callable[[Message], Content]], status: str, told: str
) -> None:
    bench = make_bench({1: 100, 2: 60, 3: 20})
    bench.grid.nodes[2] = FakeNode(misbehave(bench.clients[2]), after_s=0.1)
    desk = bench.desk()
    before = bench.first(desk)
    after = play_round(desk, before)
    assert outcomes(desk) == {"1": "trained", "2": status, "3": "trained"}
    assert told in (reasons(desk)["2"] or "")
    require_mean(bench, before, after, [1, 3], 3)


def test_a_late_client_is_recorded_left_out_and_not_asked_again_while_it_works(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60, 3: 20})
    bench.grid.nodes[3].after_s = 500.0
    desk = bench.desk()
    before = bench.first(desk)
    after = play_round(desk, before)
    assert outcomes(desk) == {"1": "trained", "2": "trained", "3": "late"}
    assert reasons(desk)["3"] == "no answer, and no progress for 30 s"
    require_mean(bench, before, after, [1, 2], 3)
    play_round(desk, after)
    assert outcomes(desk, 2) == {"1": "trained", "2": "trained"}


def test_a_client_that_tells_odd_metrics_still_counts_but_they_do_not(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60})

    def odd(message: Message) -> Content:
        reply = bench.clients[1](message)
        assert isinstance(reply, RecordDict)
        reply["metrics"] = MetricRecord(
            {"eval_loss": float("nan"), "rows_of_text": 3, "steps": 2, "train_loss": [1.0], "eval_tokens": 1e308}
        )
        return reply

    bench.grid.nodes[1] = FakeNode(odd)
    desk = bench.desk()
    play_round(desk, bench.first(desk))
    told = {row.node_id: dict(row.metrics) for row in desk.store.participations(desk.run_id, 1)}
    assert told["1"] == {"steps": 2.0}


# ---- rounds that fail ------------------------------------------------------------------------------------------------


def require_nothing_committed(desk: Desk) -> None:
    assert [row.number for row in desk.store.adapter_versions(desk.run_id)] == [0]
    assert [row.status for row in desk.store.rounds(desk.run_id)] in ([], ["open"])


def test_too_few_updates_end_the_round_with_every_reason(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60, 3: 20}, quorum=3)
    bench.grid.nodes[2] = FakeNode(refusing(bench.clients[2]))
    desk = bench.desk()
    version = bench.first(desk)
    with pytest.raises(QuorumError) as caught:
        play_round(desk, version)
    assert str(caught.value) == (
        "round 1: 2 of 3 clients' updates can be used, quorum is 3; "
        "client 2: UpdateError: coordinate 7 of the update is nan; it must be finite"
    )
    require_nothing_committed(desk)


def test_a_trunk_that_averaged_with_other_weights_ends_the_round(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60})
    bench.clients[2].told_trunk = 61
    desk = bench.desk()
    version = bench.first(desk)
    with pytest.raises(AgreementError, match="the trunk averaged over 161 trained tokens, the clients' updates over"):
        play_round(desk, version)
    require_nothing_committed(desk)


def test_a_survivor_that_the_trunk_never_saw_ends_the_round(make_bench: MakeBench, tmp_path: Path) -> None:
    bench = make_bench({1: 100, 2: 60})
    from server_trunk.contributions import Contributions

    elsewhere = Contributions(tmp_path / "elsewhere")
    desk = bench.desk()
    version = bench.first(desk)
    elsewhere.adapters.put(bench.artifacts.get(version.trunk_sha256))
    bench.clients[2].contributions = elsewhere
    with pytest.raises(AgreementError, match="no average over the same clients: .* no contribution from 2"):
        play_round(desk, version)
    require_nothing_committed(desk)


def test_artifacts_that_cannot_be_written_leave_sql_as_it_was(make_bench: MakeBench, tmp_path: Path) -> None:
    bench = make_bench({1: 100, 2: 60})
    desk = bench.desk()
    version = bench.first(desk)
    (tmp_path / "a file").write_text("")
    bench.artifacts = ArtifactStore(tmp_path / "a file" / "artifacts")
    broken = Desk(desk.run_id, desk.config, desk.exchange, desk.trunk, desk.store, bench.artifacts, desk.clock)
    with pytest.raises(StorageError, match="cannot write artifact"):
        play_round(broken, version)
    require_nothing_committed(desk)


def test_a_fixed_point_that_could_wrap_is_refused_before_anybody_is_asked(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60, 3: 50}, max_tokens=2**31 - 1)
    desk = bench.desk()
    version = bench.first(desk)
    with pytest.raises(ConfigError, match="wraps"):
        play_round(desk, version)
    assert bench.grid.sent == []
    assert desk.store.rounds(desk.run_id) == []


def test_a_failed_round_can_be_played_again(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60})
    bench.clients[2].told_trunk = 61
    desk = bench.desk()
    version = bench.first(desk)
    with pytest.raises(AgreementError):
        play_round(desk, version)
    bench.clients[2].told_trunk = None
    after = play_round(desk, version)
    require_mean(bench, version, after, [1, 2], 2)
    assert [(row.attempt, row.status) for row in desk.store.rounds(desk.run_id)] == [(1, "aborted"), (2, "committed")]
    assert {order["attempt"] for order in bench.clients[1].orders} == {1, 2}


def test_the_last_adapter_is_judged_without_training(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60})
    desk = bench.desk()
    version = play_round(desk, bench.first(desk))
    judge_last(desk, version)
    assert [message.metadata.message_type for message in bench.grid.sent] == ["train.round"] * 2 + [
        "evaluate.final"
    ] * 2
    rows = {(row.number, row.attempt, row.node_id, row.name): row.value for row in desk.store.metrics(desk.run_id)}
    assert rows[1, 0, None, "eval_loss"] == 4.0
    assert [row.number for row in desk.store.rounds(desk.run_id)] == [1]


def test_nobody_to_judge_the_last_adapter_fails_nothing(make_bench: MakeBench) -> None:
    bench = make_bench({1: 100, 2: 60})
    desk = bench.desk()
    version = play_round(desk, bench.first(desk))
    bench.grid.nodes.clear()
    judge_last(desk, version)
    assert [row.number for row in desk.store.adapter_versions(desk.run_id)] == [0, 1]
