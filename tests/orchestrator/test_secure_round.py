"""A secure round over scripted nodes: three exchanges, what it commits, and every way in which clients are lost."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from aggregation.ring import plan
from aggregation.terms import Policy
from contract import adapter
from contract.config import ConfigValue
from contract.errors import QuorumError, RoundError
from contract.identity import public_key_text
from orchestrator.desk import Desk, Version
from orchestrator.membership import Membership
from orchestrator.secure_round import judge_last_secure, play_secure_round
from orchestrator.secure_run import SecureRun
from tests.orchestrator.conftest import Bench
from tests.orchestrator.fakes import FakeNode
from tests.orchestrator.secure_fakes import FINGERPRINT, SecureClient, asked_of
from tests.orchestrator.test_round import expected_client, expected_trunk

MakeBench = Callable[..., Bench]
WEIGHTS = {1: 100, 2: 60, 3: 20, 4: 90}


class Played:
    """A bench of secure clients and the run that it plays."""

    def __init__(self, bench: Bench, *, enrolled: bool = False) -> None:
        self.bench = bench
        weights = {number: client.weight for number, client in bench.clients.items()}
        self.clients = {number: self.add(number, weight) for number, weight in weights.items()}
        self.desk: Desk = bench.desk()
        self.version: Version = bench.first(self.desk)
        self.run = SecureRun(self.desk, Membership(self.desk, enrolled=enrolled), FINGERPRINT)

    def add(self, number: int, weight: int) -> SecureClient:
        bench = self.bench
        client = SecureClient(
            bench.config, bench.trunk.contributions, weight, node_id=number, home=bench.home / "sites"
        )
        bench.clients[number], bench.grid.nodes[number] = client, FakeNode(client)
        return client

    def play(self) -> Version:
        """One round; the version that it committed."""
        before, self.version = self.version, play_secure_round(self.run, self.version)
        self.check(before)
        return self.version

    def survivors(self, number: int) -> list[int]:
        attempt = max(row.attempt for row in self.rounds() if row.number == number)
        rows = self.desk.store.participations(self.desk.run_id, number)
        return [int(row.node_id) for row in rows if row.attempt == attempt and row.status == "trained"]

    def rounds(self) -> list:  # type: ignore[type-arg]
        return self.desk.store.rounds(self.desk.run_id)

    def check(self, before: Version) -> None:
        """The committed adapter is the weighted mean of what the survivors trained, in both halves."""
        number = self.version.number
        survivors = self.survivors(number)
        cohort = max(len(client.orders) and int(client.orders[-1]["clients"]) for client in self.clients.values())
        point = plan(cohort, self.bench.config.max_trained_tokens(), self.bench.config.update_clip)
        bound = 2 * point.error_bound(len(survivors), sum(self.clients[n].weight for n in survivors)) + 1e-7
        expected = expected_client(self.bench, before.client, number, survivors)
        assert np.abs(self.version.client.vector_d - expected).max() <= bound
        found = adapter.from_bytes(self.bench.artifacts.get(self.version.trunk_sha256))
        for name, value in expected_trunk(self.bench, before, number, survivors).items():
            np.testing.assert_allclose(found[name].numpy(), value, atol=1e-6)


@pytest.fixture
def start(make_bench: MakeBench) -> Callable[..., Played]:
    def started(weights: dict[int, int] | None = None, *, enrolled: bool = False, **settings: ConfigValue) -> Played:
        return Played(make_bench(weights or WEIGHTS, **{"secagg": "on", **settings}), enrolled=enrolled)

    return started


Start = Callable[..., Played]


def test_a_steady_round_costs_three_exchanges_and_the_first_its_set_up(start: Start) -> None:
    played = start(num_rounds=3)
    asked = []
    for _ in range(3):
        before = played.desk.exchange.asked
        played.play()
        asked.append(played.desk.exchange.asked - before)
    assert asked == [6, 3, 3]  # the first: who is there, keys, shares
    before = played.desk.exchange.asked
    judge_last_secure(played.run, played.version)
    assert played.desk.exchange.asked - before == 3
    told = played.clients[1].asked
    assert told[3:6] == [["train", "join"], ["confirm", "share"], ["unmask"]]


def test_no_number_of_a_client_reaches_the_orchestrator_but_all_totals_do(start: Start) -> None:
    played = start()
    played.play()
    rows = played.desk.store.participations(played.desk.run_id, 1)
    assert [(row.status, dict(row.metrics)) for row in rows] == [("trained", {})] * 4
    told = {(row.number, row.name): row.value for row in played.desk.store.metrics(played.desk.run_id)}
    assert all(row.node_id is None for row in played.desk.store.metrics(played.desk.run_id))
    assert told[0, "eval_loss"] == pytest.approx(5.0)
    assert told[0, "eval_tokens"] == 40
    assert (told[1, "trained_tokens"], told[1, "steps"]) == (270, 8)
    assert told[1, "train_loss"] == pytest.approx(3.0)
    assert played.rounds()[0].threshold == 3


def test_the_last_version_is_judged_by_a_sum_of_its_own(start: Start) -> None:
    played = start(num_rounds=1)
    played.play()
    judge_last_secure(played.run, played.version)
    metrics = played.desk.store.metrics(played.desk.run_id)
    told = {row.name: row.value for row in metrics if row.number == 1 and row.attempt == 0}
    assert told == {"eval_loss": pytest.approx(4.0), "eval_tokens": 40}


def test_a_run_that_stopped_early_has_its_last_version_judged_too(start: Start) -> None:
    played = start(num_rounds=9)
    played.play()  # round 2's session waits now, for vectors of another size
    judge_last_secure(played.run, played.version)
    assert [row.value for row in played.desk.store.metrics(played.desk.run_id) if row.number == 1 and not row.attempt]


@pytest.mark.parametrize("stage", ["join", "share", "train", "confirm", "unmask"])
def test_one_client_of_four_is_lost_at_any_stage_and_the_round_commits(start: Start, stage: str) -> None:
    played = start()
    played.clients[3].dies = lambda asked, number: asked == stage
    played.play()
    gone_before_its_vector = stage in ("join", "share", "train")
    assert played.survivors(1) == ([1, 2, 4] if gone_before_its_vector else [1, 2, 3, 4])
    assert played.rounds()[0].status == "committed"
    assert len(played.rounds()) == 1


@pytest.mark.parametrize(
    ("stage", "outcome", "waits_s"),
    [("join", "failed", 60.0), ("share", "failed", 60.0), ("train", "late", 30.0), ("confirm", "trained", 60.0)],
)
def test_a_client_that_never_answers_is_waited_for_in_that_stage_and_no_longer(
    start: Start, stage: str, outcome: str, waits_s: float
) -> None:
    played = start()
    played.bench.grid.silent = lambda node_id, message: node_id == 3 and stage in asked_of(message)
    began = played.bench.clock.now
    played.play()
    statuses = {row.node_id: row.status for row in played.desk.store.participations(played.desk.run_id, 1)}
    assert statuses == {"1": "trained", "2": "trained", "3": outcome, "4": "trained"}
    assert waits_s <= played.bench.clock.now - began < waits_s + 20.0
    reasons = {row.node_id: row.reason for row in played.desk.store.participations(played.desk.run_id, 1)}
    assert (reasons["3"] is None) == (outcome == "trained")


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ("join", "2 adverts; the threshold is 3; client 3: no advert: its ClientApp raised an error: killed"),
        ("share", "only 2 shared secrets; threshold 3; client 3: no shares: its ClientApp raised an error: killed"),
        ("train", "2 of 4 clients' masked updates came; quorum is 2, the secure sum's threshold 3; client 3: its"),
        ("confirm", "only 2 of 4 confirmed the survivors; threshold 3; client 3: no confirmation: its ClientApp"),
        ("unmask", "only 2 of 4 answered; threshold 3; client 3: no answer: its ClientApp raised an error: killed"),
    ],
)
def test_below_the_threshold_the_attempt_is_aborted_with_its_reason_and_the_next_one_starts_afresh(
    start: Start, stage: str, reason: str
) -> None:
    played = start()
    for number in (3, 4):
        played.clients[number].dies = _once(stage)
    played.play()
    first, second = played.rounds()
    assert (first.status, second.status) == ("aborted", "committed")
    assert reason in (first.reason or "")
    assert played.survivors(1) == [1, 2, 3, 4]
    attempts = [order["attempt"] for order in played.clients[1].orders]
    assert attempts == ([2] if stage in ("join", "share") else [1, 2])


def test_aborts_are_counted_for_each_round_anew(start: Start) -> None:
    played = start(secagg_aborts=1, num_rounds=3)
    for _ in range(3):
        for number in (3, 4):
            played.clients[number].dies = _once("train")
        played.play()
    assert [row.status for row in played.rounds()] == ["aborted", "committed"] * 3


def test_a_session_that_too_few_shared_in_is_not_the_next_rounds(start: Start) -> None:
    played = start(num_rounds=3)
    for number in (3, 4):
        played.clients[number].refuses_shares = 2
    played.play()
    played.play()
    assert [row.status for row in played.rounds()] == ["committed", "committed"]
    assert played.clients[1].asked[3:9] == [
        *(["train", "join"], ["confirm", "share"], ["unmask"]),
        *(["join"], ["share"], ["train", "join"]),
    ]


def test_after_an_abort_clients_that_still_work_on_it_are_waited_for(start: Start) -> None:
    played = start(secagg_stage_timeout_s=5.0, round_timeout_s=5.0, secagg_aborts=1)
    for number in (3, 4):
        played.clients[number].dies = _slow_once(played, number)
    played.play()
    assert [row.status for row in played.rounds()] == ["aborted", "committed"]
    assert played.survivors(1) == [1, 2, 3, 4]


def test_who_is_only_asked_for_keys_holds_the_training_up_for_a_stage_and_no_longer(start: Start) -> None:
    played = start(dict.fromkeys(range(1, 9), 50), cohort_size=3, round_timeout_s=600.0, num_rounds=9)
    played.bench.grid.silent = lambda node_id, message: asked_of(message) == ["join"] and "round" not in message.content
    played.bench.grid.silent_from = float("inf")
    played.play()
    played.bench.grid.silent_from = began = played.bench.clock.now
    played.play()
    assert 60.0 <= played.bench.clock.now - began < 120.0


def test_sites_that_want_more_clients_are_waited_for_until_more_come(start: Start) -> None:
    played = start(dict.fromkeys(range(1, 11), 50), node_wait_s=100.0)
    for number, client in played.clients.items():
        client.policy = Policy()
        played.bench.grid.nodes[number].connects_after_s = 0.0 if number < 7 else 10.0 * (number - 6)
    played.play()
    assert sorted(played.survivors(1)) == list(range(1, 11))
    assert [row.status for row in played.rounds()][-1] == "committed"
    assert "fewer than 10" in (played.rounds()[0].reason or "")


def test_a_federation_goes_on_without_a_site_that_is_lost_for_good(start: Start) -> None:
    played = start(num_rounds=4)
    for client in played.clients.values():
        client.policy = Policy(min_members=3)  # of four: what a sum over them may lose
    played.play()
    del played.bench.grid.nodes[4]
    played.bench.grid.nodes[4] = FakeNode(None, connects_after_s=1e9)
    for _ in range(3):
        played.play()
    assert played.survivors(4) == [1, 2, 3]


def test_enrolled_sites_are_waited_for_while_strangers_are_connected(start: Start) -> None:
    played = start({1: 10, 2: 20, 3: 30, 4: 40, 5: 50}, enrolled=True)
    for number in (3, 4, 5):
        key = played.clients[number].identity.public_key().public_bytes_raw()
        played.desk.store.enroll_client(f"site-{number}", public_key_text(key), "tester")
        played.bench.grid.nodes[number].connects_after_s = 5.0
    played.play()
    assert played.survivors(1) == [3, 4, 5]


def test_strangers_alone_are_named_with_the_reason(start: Start) -> None:
    played = start({1: 10, 2: 20}, enrolled=True)
    played.desk.store.enroll_client("elsewhere", public_key_text(bytes(31) + b"\x09"), "tester")
    with pytest.raises(QuorumError, match="0 of 2 connected .* node 1: its identity key is not enrolled"):
        play_secure_round(played.run, played.version)


def test_a_client_that_contributes_nothing_to_the_trunk_costs_an_attempt_and_not_the_run(start: Start) -> None:
    played = start(secagg_aborts=1)
    played.clients[2].keeps_from_trunk = 1
    played.play()
    first, second = played.rounds()
    assert (first.status, second.status) == ("aborted", "committed")
    assert "no contribution from 2" in (first.reason or "")


def test_after_a_number_of_aborts_the_run_ends_with_the_last_reason(start: Start) -> None:
    played = start(secagg_aborts=2)
    for number in (2, 3):
        played.clients[number].dies = lambda asked, number: asked == "train"
    with pytest.raises(RoundError, match=r"round 1 was aborted 3 times in a row \(secagg-aborts is 2\).*killed"):
        play_secure_round(played.run, played.version)
    assert [row.status for row in played.rounds()] == ["aborted"] * 3
    assert played.desk.store.get_run(played.desk.run_id).committed_rounds == 0


def test_a_client_that_lies_about_its_weight_commits_nothing(start: Start) -> None:
    played = start(secagg_aborts=0)
    played.clients[2].lies_about_weight = 7
    with pytest.raises(RoundError, match="the trunk averaged over 270 trained tokens, the clients' updates over 277"):
        play_secure_round(played.run, played.version)
    assert [row.status for row in played.rounds()] == ["aborted"]


def test_a_site_that_wants_more_clients_refuses_and_says_so_in_the_reason(start: Start) -> None:
    played = start(secagg_aborts=0)
    for client in played.clients.values():
        client.policy = Policy()
    with pytest.raises(RoundError, match="takes part in no sum over fewer than 10 .secagg-min-members"):
        play_secure_round(played.run, played.version)


def test_nobody_trains_where_too_few_for_the_quorum_share_secrets(start: Start) -> None:
    played = start(quorum=4, secagg_aborts=1)
    played.clients[4].dies = lambda asked, number: asked == "share"
    with pytest.raises(RoundError, match="only 3 shared secrets; threshold 3, quorum 4; client 4: no shares"):
        play_secure_round(played.run, played.version)
    assert [row.status for row in played.rounds()] == ["aborted"] * 2
    assert not any("train" in asked_of(message) for message in played.bench.grid.sent)


def test_a_site_that_always_refuses_and_one_that_is_lost_for_a_moment_cost_an_attempt(start: Start) -> None:
    played = start(dict.fromkeys(range(1, 8), 50), quorum=6, secagg_aborts=1)
    played.clients[7].policy = Policy(min_members=8)
    played.clients[4].dies = _once("share")
    played.play()
    assert [row.status for row in played.rounds()] == ["aborted", "committed"]
    assert played.survivors(1) == [1, 2, 3, 4, 5, 6]


def test_one_client_alone_is_no_sum(start: Start) -> None:
    played = start({1: 100}, quorum=1)
    with pytest.raises(QuorumError, match="1 of 1 connected clients can take part in a secure sum, 2 are needed"):
        play_secure_round(played.run, played.version)


def test_a_client_that_comes_late_waits_one_round(start: Start) -> None:
    played = start(num_rounds=4)
    played.play()
    played.clients[5] = played.add(5, 40)
    played.bench.tell_shapes(played.version.client)
    played.play()  # its cohort was drawn before the fifth one came
    assert played.survivors(2) == [1, 2, 3, 4]
    played.play()
    assert played.survivors(3) == [1, 2, 3, 4, 5]


def test_only_enrolled_identities_take_part_under_their_own_names(start: Start) -> None:
    played = start(enrolled=True, num_rounds=3)
    store = played.desk.store
    for number in (1, 2, 3):
        key = played.clients[number].identity.public_key().public_bytes_raw()
        store.enroll_client(f"site-{number}", public_key_text(key), "tester")
    played.play()
    assert played.survivors(1) == [1, 2, 3]
    bound = {row.node_id: row.client_id for row in store.node_bindings(played.desk.run_id)}
    assert bound == {"1": "site-1", "2": "site-2", "3": "site-3"}
    store.revoke_client("site-3", "tester", "laptop stolen")
    played.play()  # set up before the revocation
    played.play()
    assert played.survivors(3) == [1, 2]


def test_a_site_that_came_back_as_another_node_is_heard_once(start: Start) -> None:
    played = start()
    twin = played.add(9, 10)
    twin.identity = played.clients[3].identity
    played.bench.tell_shapes(played.version.client)
    played.clients[9] = twin
    played.play()
    assert played.survivors(1) == [1, 2, 4, 9]


@pytest.mark.parametrize("seed", range(6))
def test_clients_lost_at_random_leave_the_right_average_or_nothing(start: Start, seed: int) -> None:
    draw = random.Random(seed)
    played = start({number: draw.randint(1, 120) for number in range(1, 8)}, num_rounds=4, secagg_aborts=30)
    for client in played.clients.values():
        client.dies = lambda asked, number: asked != "greet" and draw.random() < 0.08
    for _ in range(4):
        played.play()
    statuses = [row.status for row in played.rounds()]
    assert statuses.count("committed") == 4
    assert set(statuses) <= {"committed", "aborted"}
    for row in played.rounds():
        assert row.status == "committed" or row.reason


def _once(stage: str) -> Callable[[str, int], bool]:
    left = [stage]

    def dies(asked: str, number: int) -> bool:
        if asked in left:
            left.remove(asked)
            return True
        return False

    return dies


def _slow_once(played: Played, number: int) -> Callable[[str, int], bool]:
    """Its first training takes longer than anybody waits for it."""

    def slows(asked: str, round_number: int) -> bool:
        node = played.bench.grid.nodes[number]
        node.after_s = 8.0 if round_number and len(played.rounds()) == 1 else 0.2
        return False

    return slows
