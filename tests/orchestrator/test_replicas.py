"""Several trunks as one: what they are asked, what is made of their answers, and whole runs over two of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from contract import trunk_pb2 as pb
from contract.adapter import from_bytes, to_bytes
from contract.config import ConfigValue
from contract.errors import (
    AgreementError,
    ConfigError,
    ConnectionFailedError,
    SessionError,
    TrunklineError,
    UpdateError,
)
from contract.records import CutLayers, RoundKey, RoundProgress
from contract.trunk_pb2_grpc import TrunkServicer
from orchestrator.replicas import Replicas, connect
from orchestrator.trunk import Trunk
from server_trunk.contributions import Contributions
from server_trunk.server import ServeOptions
from tests.orchestrator.conftest import Bench, LiveTrunk, make_bench_at
from tests.orchestrator.test_secure_round import Played
from tests.orchestrator.test_trunk import serving
from tests.server_trunk.conftest import RunningTrunk, running

KEY = RoundKey("a-run", 1, 1)
MakeBench = Callable[..., Bench]


def drawn(seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return to_bytes({f"layer.lora_{factor}.weight": torch.randn(3, 5, generator=generator) for factor in "AB"})


@dataclass
class Pair:
    """Two trunks with disks of their own, and both as one."""

    servers: tuple[RunningTrunk, RunningTrunk]
    disks: tuple[Contributions, Contributions]
    both: Replicas
    lost: set[int] = field(default_factory=set)

    @property
    def address(self) -> str:
        return self.both.address

    def lose(self, where: int) -> None:
        """Trunk `where` answers nobody any more; it may be lost twice."""
        if where not in self.lost:
            self.lost.add(where)
            self.servers[where].stop()

    def contribute(self, where: int, base: str, clients: dict[int, int]) -> None:
        """`clients` (number: tokens) leave what they trained at trunk `where`."""
        for number, tokens in clients.items():
            self.disks[where].add(KEY, str(number), base, tokens, drawn(number))


@pytest.fixture
def pair(tiny_model: Path, tmp_path: Path) -> Iterator[Pair]:
    folders = (tmp_path / "trunk 0", tmp_path / "trunk 1")
    started = [
        ServeOptions(str(tiny_model), CutLayers(1, 1), "127.0.0.1:0", folder, device="cpu") for folder in folders
    ]
    one, other = RunningTrunk(started[0]), RunningTrunk(started[1])
    both = connect(f"{one.address},{other.address}")
    assert isinstance(both, Replicas)
    made = Pair((one, other), (Contributions(folders[0]), Contributions(folders[1])), both)
    yield made
    both.close()
    made.lose(0)
    made.lose(1)


def answering(reply: pb.CommitRoundReply) -> TrunkServicer:
    """A trunk that says `reply` to every commit."""

    class Answering(TrunkServicer):
        def CommitRound(self, request: pb.CommitRoundRequest, context: object) -> pb.CommitRoundReply:  # noqa: N802
            assert request.partial
            return reply

    return Answering()


# ---- one question to all ---------------------------------------------------------------------------------------------


def test_one_address_is_a_trunk_as_ever_and_a_bad_one_is_refused() -> None:
    with closing(connect("127.0.0.1:1")) as alone:
        assert type(alone) is Trunk
    with pytest.raises(ConfigError, match="one of its addresses is 'nowhere'"):
        connect("127.0.0.1:1,nowhere")


def test_what_all_serve_is_described_once(pair: Pair) -> None:
    assert pair.both.describe() == Trunk(pair.servers[0].address).describe()
    assert pair.address == f"{pair.servers[0].address},{pair.servers[1].address}"


def test_trunks_that_serve_something_else_are_named_with_both_sides(
    pair: Pair, tiny_model: Path, tmp_path: Path
) -> None:
    options = ServeOptions(str(tiny_model), CutLayers(2, 1), "127.0.0.1:0", tmp_path / "third", device="cpu")
    with running(options) as third, closing(connect(f"{pair.address},{third.address}")) as three:
        with pytest.raises(AgreementError) as caught:
            three.describe()
    assert f"cut is CutLayers(head=1, tail=1) at {pair.servers[0].address} and " in str(caught.value)
    assert f"CutLayers(head=2, tail=1) at {third.address}" in str(caught.value)


def test_a_trunk_that_is_down_at_the_start_is_named(pair: Pair) -> None:
    pair.lose(1)
    with pytest.raises(ConnectionFailedError, match=f"trunk at {pair.servers[1].address} does not answer"):
        pair.both.describe()


def test_an_adapter_is_put_to_every_trunk_and_got_from_any(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    data = drawn(1)
    sha256 = pair.both.put_adapter(data)
    assert [disk.adapters.has(sha256) for disk in pair.disks] == [True, True]
    only_there = Trunk(pair.servers[1].address).put_adapter(drawn(2))
    assert pair.both.get_adapter(only_there) == drawn(2)
    with pytest.raises(SessionError, match="does not hold adapter 0000"):
        pair.both.get_adapter("0" * 64)
    pair.lose(0)
    with caplog.at_level(logging.WARNING, "trunkline"):
        assert pair.both.get_adapter(pair.both.put_adapter(drawn(3))) == drawn(3)
    assert f"trunk {pair.servers[0].address} did not get the adapter" in caplog.text
    pair.lose(1)
    with pytest.raises(ConnectionFailedError, match=f"trunk at {pair.servers[0].address} does not answer"):
        pair.both.put_adapter(data)


def test_progress_is_the_sum_and_never_falls_when_a_trunk_is_lost() -> None:
    class Counting(TrunkServicer):
        seen = pb.ProgressReply(sessions=2, steps=30, tokens=400, received_bytes=5000, sent_bytes=60000)

        def Progress(self, request: pb.RoundId, context: object) -> pb.ProgressReply:  # noqa: N802
            return self.seen if request.round == 1 else pb.ProgressReply(steps=1)

    lasting = Counting()
    with serving(lasting) as here:
        with serving(Counting()) as there:
            both = connect(f"{here},{there}")
            assert both.progress(KEY) == RoundProgress(4, 60, 800, 10000, 120000)
        lasting.seen = pb.ProgressReply(sessions=2, steps=31, tokens=401, received_bytes=5001, sent_bytes=60001)
        assert both.progress(KEY) == RoundProgress(4, 61, 801, 10001, 120001)
        assert both.progress(RoundKey("a-run", 2, 1)).steps == 1
    with pytest.raises(ConnectionFailedError):
        both.progress(KEY)
    both.close()


def test_every_trunk_is_told_what_is_over_and_one_that_is_silent_holds_up_nobody() -> None:
    class Listening(TrunkServicer):
        def __init__(self) -> None:
            self.told: list[pb.RoundId] = []

        def EndBefore(self, request: pb.RoundId, context: object) -> pb.EndBeforeReply:  # noqa: N802
            self.told.append(request)
            return pb.EndBeforeReply()

    lasting, lost = Listening(), Listening()
    with serving(lasting) as here:
        with serving(lost) as there:
            both = connect(f"{here},{there}")
            both.end_before(KEY)
        both.end_before(RoundKey("a-run", 2, 1))
    assert [(key.run, key.round) for key in lasting.told] == [("a-run", 1), ("a-run", 2)]
    assert [(key.run, key.round) for key in lost.told] == [("a-run", 1)]
    both.close()


# ---- commits ---------------------------------------------------------------------------------------------------------


def test_the_average_of_averages_is_the_average_over_all_and_lies_at_every_trunk(pair: Pair, tmp_path: Path) -> None:
    """Compared with one trunk's commit over the same contributions, to 1e-6 of the largest value."""
    weights = {1: 3, 2: 500, 3: 11, 4: 70_000, 5: 7}
    base, alone = pair.both.put_adapter(drawn(0)), Contributions(tmp_path / "alone")
    alone.adapters.put(drawn(0))
    for number, tokens in weights.items():
        pair.contribute(number % 2, base, {number: tokens})
        alone.add(KEY, str(number), base, tokens, drawn(number))
    names = [str(number) for number in weights if number != 5]
    average, wanted = pair.both.commit_round(KEY, base, names), alone.commit(KEY, base, names)
    assert average.trained_tokens == wanted.trained_tokens == 70_514
    held = [disk.adapters.get(average.sha256) for disk in pair.disks]
    assert held[0] == held[1]
    for name, tensor in from_bytes(alone.adapters.get(wanted.adapter_sha256)).items():
        assert torch.allclose(from_bytes(held[0])[name], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max()))


def test_the_same_commit_gives_the_same_answer_whatever_came_since(pair: Pair) -> None:
    base = pair.both.put_adapter(drawn(0))
    pair.contribute(0, base, {1: 3, 2: 5})
    pair.contribute(1, base, {3: 7})
    first = pair.both.commit_round(KEY, base, ["1", "2", "3"])
    pair.contribute(0, base, {1: 999, 3: 999})
    assert pair.both.commit_round(KEY, base, ["3", "2", "1"]) == first


def test_all_clients_at_one_trunk_give_its_average_bit_for_bit(pair: Pair) -> None:
    base = pair.both.put_adapter(drawn(0))
    pair.contribute(1, base, {1: 3, 2: 5})
    wanted = Trunk(pair.servers[1].address).commit_round(KEY, base, ["1", "2"])
    assert pair.both.commit_round(KEY, base, ["1", "2"]) == wanted
    assert pair.disks[0].adapters.has(wanted.sha256)


def test_a_client_at_no_trunk_or_at_two_is_named_and_nothing_is_put(pair: Pair) -> None:
    base = pair.both.put_adapter(drawn(0))
    pair.contribute(0, base, {1: 3, 2: 5})
    pair.contribute(1, base, {2: 5, 3: 7})
    with pytest.raises(AgreementError, match="round 1: of the clients, 2 contributed at more than one$"):
        pair.both.commit_round(KEY, base, ["1", "2", "3"])
    with pytest.raises(AgreementError, match="round 1: of the clients, 8, 9 contributed nowhere$"):
        pair.both.commit_round(KEY, base, ["1", "3", "8", "9"])
    assert pair.both.commit_round(KEY, base, ["1", "3"]).trained_tokens == 10


def test_a_trunk_that_names_somebody_else_is_refused(pair: Pair) -> None:
    base = pair.both.put_adapter(drawn(0))
    pair.contribute(0, base, {1: 3})
    with serving(answering(pb.CommitRoundReply(clients=["7"]))) as lying:
        with closing(connect(f"{pair.servers[0].address},{lying}")) as both:
            with pytest.raises(AgreementError, match="7 contributed but did not survive"):
                both.commit_round(KEY, base, ["1"])


def test_a_trunk_that_does_not_know_partial_commits_is_noticed(pair: Pair) -> None:
    """It would answer an average over all that it was asked for, and name nobody."""
    base = pair.both.put_adapter(drawn(0))
    old = answering(pb.CommitRoundReply(adapter_sha256=base, trained_tokens=3))
    old.GetAdapter = lambda request, context: iter([pb.AdapterChunk(data=drawn(0))])  # type: ignore[method-assign]
    with serving(old) as one, serving(answering(pb.CommitRoundReply())) as other:
        with closing(connect(f"{one},{other}")) as both, pytest.raises(AgreementError, match="1 contributed nowhere"):
            both.commit_round(KEY, base, ["1"])


def test_no_tokens_at_all_are_no_average_and_a_client_without_any_is_still_counted(pair: Pair) -> None:
    base = pair.both.put_adapter(drawn(0))
    pair.contribute(0, base, {1: 0})
    pair.contribute(1, base, {2: 0, 3: 4})
    with pytest.raises(UpdateError, match="the survivors trained no tokens"):
        pair.both.commit_round(KEY, base, ["1", "2"])
    average = pair.both.commit_round(KEY, base, ["1", "3"])
    assert (average.trained_tokens, pair.disks[0].adapters.get(average.sha256)) == (4, drawn(3))


def test_a_lost_trunk_is_missed_only_where_a_survivor_worked_with_it(pair: Pair) -> None:
    base = pair.both.put_adapter(drawn(0))
    pair.contribute(0, base, {1: 3, 2: 5})
    pair.contribute(1, base, {3: 7})
    pair.lose(1)
    address = pair.servers[1].address
    with pytest.raises(AgreementError, match=f"3 contributed nowhere; trunk {address} is silent: .*does not answer"):
        pair.both.commit_round(KEY, base, ["1", "2", "3"])
    assert pair.both.commit_round(KEY, base, ["1", "2"]).trained_tokens == 8
    pair.lose(0)
    with pytest.raises(ConnectionFailedError):
        pair.both.commit_round(KEY, base, ["1", "2"])


# ---- whole runs ------------------------------------------------------------------------------------------------------


def spread(bench: Bench, pair: Pair, at_second: set[int]) -> None:
    """Let the scripted clients in `at_second` work with the second trunk, the others with the first."""
    for number, client in bench.clients.items():
        client.contributions = pair.disks[number in at_second]


@pytest.fixture
def paired_bench(pair: Pair, tiny_model: Path, tmp_path: Path, make_bench: MakeBench) -> Iterator[Callable[..., Bench]]:
    """`paired_bench({client: weight}, **settings)`, whose trunk is the pair; all clients work with the first one."""
    made: list[Bench] = []

    def make(weights: dict[int, int], **settings: ConfigValue) -> Bench:
        home = tmp_path / "home"  # which make_bench has made this test's own
        made.append(make_bench_at(home, tiny_model, LiveTrunk(pair.address, pair.disks[0]), weights, settings))
        return made[-1]

    yield make
    for bench in made:
        bench.store.close()


def last_trunk_part(bench: Bench, number: int) -> dict[str, torch.Tensor]:
    version = bench.store.adapter_version(bench.store.get_run("last").run_id, number)
    return from_bytes(bench.artifacts.get(version.trunk_sha256))


@pytest.mark.parametrize("rule", ["ffa", "fedavg"])
def test_a_run_of_two_rounds_over_two_trunks_ends_with_the_adapter_of_one(
    paired_bench: Callable[..., Bench], make_bench: MakeBench, pair: Pair, rule: str
) -> None:
    """Compared: the clients' half bit for bit, the trunk's half to 1e-6 of its largest value, after each round."""
    weights = {1: 100, 2: 60, 3: 20, 4: 90}
    single = make_bench(weights, aggregation=rule).tell_shapes_ahead()
    single.conduct()
    wanted = {number: last_trunk_part(single, number) for number in (1, 2)}
    client = single.store.adapter_version(single.store.get_run("last").run_id, 2).client_sha256
    double = paired_bench(weights, aggregation=rule).tell_shapes_ahead()
    spread(double, pair, {2, 3})
    double.conduct()
    run = double.store.get_run("last")
    assert (run.status, run.reason, run.committed_rounds) == ("finished", None, 2)
    assert double.store.adapter_version(run.run_id, 2).client_sha256 == client
    for number, tensors in wanted.items():
        for name, tensor in last_trunk_part(double, number).items():
            np.testing.assert_allclose(tensor, tensors[name], rtol=0, atol=1e-6 * float(tensors[name].abs().max()))


def test_a_run_goes_on_when_a_trunk_is_lost_between_two_rounds(paired_bench: Callable[..., Bench], pair: Pair) -> None:
    bench = paired_bench({1: 100, 2: 60}).tell_shapes_ahead()
    spread(bench, pair, {2})
    second = bench.clients[2]
    lost = second.lost

    def loses_its_trunk(number: int) -> float:
        if number == 1:  # asked at the beginning of round 2
            pair.lose(1)
            spread(bench, pair, set())
        return lost(number)

    second.lost = loses_its_trunk
    bench.conduct()
    assert bench.store.get_run("last").committed_rounds == 2


def test_without_masks_a_trunk_lost_with_its_clients_work_ends_the_run_with_the_reason(
    paired_bench: Callable[..., Bench], pair: Pair
) -> None:
    bench = paired_bench({1: 100, 2: 60}).tell_shapes_ahead()
    spread(bench, pair, {2})
    pair.disks[1].add = lambda *given: pair.lose(1)  # type: ignore[method-assign]
    with pytest.raises(TrunklineError):
        bench.conduct()
    run = bench.store.get_run("last")
    assert (run.status, run.committed_rounds) == ("failed", 0)
    assert "2 contributed nowhere; trunk " in (run.reason or "")


def test_under_masks_a_trunk_lost_with_its_clients_work_costs_an_attempt(
    paired_bench: Callable[..., Bench], pair: Pair
) -> None:
    played = Played(paired_bench({1: 100, 2: 60, 3: 20, 4: 90}, secagg="on"))
    spread(played.bench, pair, {2, 3})
    played.play()
    pair.disks[1].add = lambda *given: pair.lose(1)  # type: ignore[method-assign]
    played.clients[4].lost = lambda number: spread(played.bench, pair, set()) or 3.0  # type: ignore[func-returns-value]
    played.play()
    second = [(row.number, row.attempt, row.status) for row in played.rounds() if row.number == 2]
    assert second == [(2, 1, "aborted"), (2, 2, "committed")]
