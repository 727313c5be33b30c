"""What a run charges: before it asks, to those that it asks, and to nobody whose budget is spent."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregation.terms import Policy
from contract.config import ConfigValue
from contract.errors import BudgetError, RoundError
from contract.identity import public_key_text
from contract.privacy_records import Budget, Unit
from orchestrator.membership import Membership
from orchestrator.protection import told_run_privacy
from orchestrator.secure_round import end_secure_run, play_secure_round
from orchestrator.secure_run import SecureRun
from orchestrator.spending import Spending
from privacy.plan import expected_spend, register_budget
from storage.ledger import Admit, Ledger, open_ledger
from storage.ledger_chain import head_fault
from storage.records import Charge, Refusal, SignedHead
from storage.store import Store
from tests.orchestrator.conftest import Bench
from tests.orchestrator.fakes import FakeNode
from tests.orchestrator.secure_fakes import FINGERPRINT, SecureClient, asked_of

MakeBench = Callable[..., Bench]
DP: dict[str, ConfigValue] = {
    "secagg": "on",
    "dp": "client",
    "trunk_adapter": "frozen",
    "metrics": "off",
    "dp_noise_multiplier": 4.0,
    "num_rounds": 3,
}


class Key:
    """Signs heads."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
        self.public_key_text = public_key_text(self._key.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)


class Charged:
    """A bench of secure clients called client-1 and so on, and the run that charges them."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        url, signer = f"sqlite:///{bench.home / 'trunkline.db'}", Key()
        bench.store = Store(bench.store._engine, signer=signer)
        self.ledger: Ledger = open_ledger(url, signer=signer)
        self.clients: dict[int, SecureClient] = {}
        for number in list(bench.clients):
            client = SecureClient(bench.config, bench.trunk.contributions, node_id=number, home=bench.home / "sites")
            self.clients[number] = client
            bench.clients[number], bench.grid.nodes[number] = client, FakeNode(client)
        self.desk = bench.desk()
        self.version = bench.first(self.desk)
        spending = Spending(self.desk.run_id, bench.config, self.ledger)
        self.run = SecureRun(self.desk, Membership(self.desk, enrolled=False), FINGERPRINT, spending)

    def play(self) -> None:
        self.version = play_secure_round(self.run, self.version)

    def unit(self, number: int) -> Unit:
        return Unit(f"client-{number}", "texts", "client")

    def states(self, number: int) -> list[tuple[int, int, str]]:
        """(round, attempt, state) of every charge to a client."""
        rows = self.ledger.rows(self.unit(number))
        return [(row.round, row.attempt, row.state) for row in rows if row.kind == "charge"]

    def give(self, number: int, rounds: float) -> None:
        """A budget that has room for this many rounds."""
        config = self.bench.config.model_copy(update={"num_rounds": int(rounds)})
        size = int(np.count_nonzero(self.version.client.trained("B")))
        epsilon = expected_spend(config, scale=2.0**20, size=size)["orchestrator"] * 1.01
        own = register_budget(self.bench.config)
        budget = Budget(epsilon, own.delta, own.order, own.gaussian_share)
        self.ledger.set_budget(self.unit(number), budget, "a test", "to be spent soon")


@pytest.fixture
def start(make_bench: MakeBench) -> Iterator[Callable[..., Charged]]:
    made: list[Charged] = []

    def started(**settings: ConfigValue) -> Charged:
        made.append(Charged(make_bench(dict.fromkeys(range(1, 6), 100), **{**DP, "quorum": 4, **settings})))
        return made[-1]

    yield started
    for charged in made:
        charged.ledger.close()


Start = Callable[..., Charged]


def test_a_round_is_charged_before_it_is_asked_and_committed_with_it(start: Start) -> None:
    charged = start()
    seen: list[list[tuple[int, int, str]]] = []
    told = charged.clients[1]._answer

    def answer(message: object) -> object:
        if "train" in asked_of(message):  # type: ignore[arg-type]
            seen.append(charged.states(1))
        return told(message)  # type: ignore[arg-type]

    charged.clients[1]._answer = answer  # type: ignore[method-assign,assignment]
    charged.play()
    assert seen == [[(1, 1, "RESERVED")]]
    for number in charged.clients:
        assert charged.states(number) == [(1, 1, "RESERVED"), (1, 1, "COMMITTED")]
    assert charged.ledger.verify() == []


def test_the_mean_is_over_all_that_were_asked_and_carries_noise(start: Start) -> None:
    charged = start(dp_clip=0.05, dp_noise_multiplier=2.0**-10, dp_epsilon=1e9)
    before = charged.version
    charged.play()
    clipped = []
    for client in charged.clients.values():
        update = client.updates[1]
        clipped.append(update * min(1.0, 0.05 / float(np.linalg.norm(update))))
    moved = (charged.version.client.vector_d - before.client.vector_d)[before.client.trained("B")]
    mean = sum(clipped) / 5
    noise = moved - mean
    sigma = 0.05 * 2.0**-10 / 5 * (5 / 3) ** 0.5  # shares for threshold 4 less 1 colluder; all five stayed
    assert 0.7 * sigma < float(noise.std()) < 1.4 * sigma
    assert float(np.abs(mean).max()) > 10 * sigma


def test_a_client_whose_budget_is_spent_sits_out_and_the_run_goes_on(start: Start) -> None:
    charged = start()
    charged.give(5, 1)
    for _ in range(3):
        charged.play()
    assert charged.states(5) == [(1, 1, "RESERVED"), (1, 1, "COMMITTED")]
    assert len(charged.states(1)) == 6
    trained = charged.desk.store.participations(charged.desk.run_id, 3)
    assert {row.node_id for row in trained} == {"1", "2", "3", "4"}
    ((node, reason),) = charged.run.membership.excluded(["5"])
    assert node == "5"
    assert "over the budget of" in reason
    assert "client client-5" in reason


def test_the_run_ends_with_the_reason_once_a_quorum_cannot_pay(start: Start) -> None:
    charged = start()
    for number in (4, 5):
        charged.give(number, 1)
    charged.play()
    asked = len(charged.bench.grid.sent)
    with pytest.raises(BudgetError, match="3 of 5 clients can still pay for a round, 4 are needed; client 4: "):
        charged.play()
    orders = [asked_of(message) for message in charged.bench.grid.sent[asked:]]
    assert not any("train" in stages for stages in orders)


def test_a_second_run_over_the_same_dataset_goes_on_with_the_same_budget(start: Start) -> None:
    first = start()
    first.give(5, 2)
    first.play()
    again = Charged(first.bench)
    again.play()
    charges = [row for row in again.ledger.rows(again.unit(5)) if row.kind == "charge"]
    assert list(Counter(row.run for row in charges)) == [first.desk.run_id, again.desk.run_id]
    again.play()
    assert len(again.states(5)) == 4
    assert len(again.states(1)) == 6


def test_the_first_run_registers_its_budget_and_no_later_run_raises_it(start: Start) -> None:
    charged = start(dp_epsilon=1.5)
    charged.play()
    budget = charged.ledger.standing(charged.unit(1)).budget
    assert budget is not None
    assert budget.epsilon == 1.5
    charged.run.spending.config = charged.bench.config.model_copy(update={"dp_epsilon": 50.0})  # type: ignore[union-attr]
    charged.play()
    assert charged.ledger.standing(charged.unit(1)).budget == budget


def test_an_attempt_that_was_aborted_stays_charged_and_the_next_one_is_charged_anew(start: Start) -> None:
    charged = start()
    for number in (1, 2):
        charged.clients[number].dies = once("train")
    charged.play()
    assert charged.states(3) == [(1, 1, "RESERVED"), (1, 2, "RESERVED"), (1, 2, "COMMITTED")]
    assert charged.states(1)[0] == (1, 1, "RESERVED")
    assert charged.ledger.verify() == []


def once(wanted: str) -> Callable[[str, int], bool]:
    """Dies the first time that it is asked for this stage."""
    left = [True]
    return lambda stage, number: stage == wanted and bool(left) and left.pop()


def test_what_never_left_is_given_back(start: Start) -> None:
    charged = start()

    def refuse(sent: int) -> None:
        charged.bench.grid.refuse = {3} if sent else set()

    push = charged.bench.grid.push_messages

    def push_messages(messages: list) -> object:  # type: ignore[type-arg]
        (message,) = messages
        refuse(message.metadata.dst_node_id == 3 and "train" in asked_of(message))
        return push(messages)

    charged.bench.grid.push_messages = push_messages  # type: ignore[method-assign,assignment]
    charged.play()
    assert charged.states(3) == [(1, 1, "RESERVED"), (1, 1, "VOID")]
    assert charged.states(1) == [(1, 1, "RESERVED"), (1, 1, "COMMITTED")]
    assert charged.ledger.standing(charged.unit(3)).client_spent == {}


def test_a_site_that_refuses_by_its_own_ledger_is_asked_no_more(start: Start) -> None:
    charged = start()
    charged.clients[2].own_budget_is_spent = True
    charged.play()
    charged.play()
    assert charged.states(2) == [(1, 1, "RESERVED"), (1, 1, "COMMITTED")]  # it was asked, so what it sent is not known
    trained = [stages for stages in charged.clients[2].asked if "train" in stages]
    assert len(trained) == 1
    assert len(charged.states(1)) == 4


def test_two_nodes_that_name_one_dataset_do_not_spend_it_twice_in_a_round(start: Start) -> None:
    charged = start()
    charged.clients[5].name = "client-4"
    charged.play()
    assert charged.states(4) == [(1, 1, "RESERVED"), (1, 1, "COMMITTED")]
    assert charged.states(5) == []
    assert not any("train" in stages for stages in charged.clients[5].asked)


def test_at_client_level_a_client_is_asked_through_one_node_whatever_its_datasets(start: Start) -> None:
    charged = start()
    charged.clients[5].name, charged.clients[5].dataset = "client-4", "other-texts"
    charged.play()
    assert charged.states(4) == [(1, 1, "RESERVED"), (1, 1, "COMMITTED")]
    assert not any("train" in stages for stages in charged.clients[5].asked)
    ((_, reason),) = charged.run.membership.excluded(["5"])
    assert reason == "client client-4 takes part with dataset texts in this run"


def test_at_client_level_no_other_dataset_of_a_client_takes_over_in_a_run(start: Start) -> None:
    charged = start(quorum=3)
    charged.clients[5].name, charged.clients[5].dataset = "client-4", "other-texts"
    charged.clients[4].own_budget_is_spent = True
    for _ in range(3):
        charged.play()
    assert charged.states(5) == []
    assert len(charged.states(1)) == 6
    assert not any("train" in stages for stages in charged.clients[5].asked)


def test_a_dataset_that_spent_at_one_level_is_asked_at_the_other_only_where_a_person_says_so(start: Start) -> None:
    charged = start()
    rows = Unit("client-5", "texts", "example")
    release = charged.run.spending.releases(5, 4, 10)[0]  # type: ignore[union-attr]
    charged.ledger.reserve([Charge(rows, "before", 1, 1, release, "x")], lambda standing, proposed: None)
    charged.play()
    assert charged.states(5) == []
    ((_, reason),) = charged.run.membership.excluded(["5"])
    assert "spends at example level, and budgets at two levels" in reason
    charged.give(5, 4)
    charged.play()  # was set up before
    charged.play()
    assert charged.states(5) == [(3, 1, "RESERVED"), (3, 1, "COMMITTED")]


def test_sites_whose_own_ledgers_are_spent_end_the_run_for_budgets_too(start: Start) -> None:
    charged = start()
    charged.clients[2].own_budget_is_spent = True
    charged.play()
    charged.clients[3].own_budget_is_spent = True
    with pytest.raises(BudgetError, match="3 of 5 clients can still pay for a round, 4 are needed; client 2: Budget"):
        charged.play()


def test_clients_that_are_away_for_a_moment_are_waited_for_before_budgets_end_a_run(start: Start) -> None:
    charged = start(quorum=3, node_wait_s=60.0)
    charged.give(3, 1)
    charged.play()
    charged.run.ready = None
    away = {number: charged.bench.grid.nodes.pop(number) for number in (4, 5)}
    back_at = charged.bench.clock.now + 10.0
    listed = charged.bench.grid.get_node_ids

    def listing() -> Collection[int]:
        if charged.bench.clock.now >= back_at:
            charged.bench.grid.nodes.update(away)
        return listed()

    charged.bench.grid.get_node_ids = listing  # type: ignore[method-assign]
    charged.play()
    assert [len(charged.states(number)) for number in range(1, 6)] == [4, 4, 2, 4, 4]


def test_clients_that_stay_away_are_not_waited_for_without_end(start: Start) -> None:
    charged = start(quorum=3, node_wait_s=60.0)
    charged.give(3, 1)
    charged.play()
    charged.run.ready = None
    for number in (4, 5):
        del charged.bench.grid.nodes[number]
    began = charged.bench.clock.now
    with pytest.raises(BudgetError, match="2 of 3 clients can still pay for a round, 3 are needed"):
        charged.play()
    assert 60.0 <= charged.bench.clock.now - began < 200.0


def test_budgets_that_run_out_while_a_session_waits_count_as_no_abort(start: Start) -> None:
    charged = start(quorum=3, secagg_aborts=0)
    charged.play()  # and the next session, over all five, is set up
    for number in (3, 4):
        charged.give(number, 1)
    charged.play()
    assert [len(charged.states(number)) for number in range(1, 6)] == [6, 6, 2, 2, 6]
    assert [state for *_, state in charged.states(1)] == [
        *("RESERVED", "COMMITTED", "RESERVED", "VOID", "RESERVED", "COMMITTED")
    ]


def test_too_few_who_can_pay_when_it_is_charged_are_not_asked_and_get_it_back(start: Start) -> None:
    charged = start()
    charged.play()
    reserve = charged.run.spending.ledger.reserve  # type: ignore[union-attr]

    def spent_meanwhile(charges: Sequence[Charge], admit: Admit, **_: object) -> list[Refusal]:
        """Another run over the same datasets was quicker, after this round was set up."""
        for number in (4, 5):
            charged.give(number, 1)
        return reserve(charges, admit)

    charged.run.spending.ledger.reserve = spent_meanwhile  # type: ignore[union-attr,method-assign]
    asked = len(charged.bench.grid.sent)
    with pytest.raises(BudgetError, match="3 of 5 clients can still pay for a round, 4 are needed"):
        charged.play()
    assert not any("train" in asked_of(message) for message in charged.bench.grid.sent[asked:])
    assert charged.states(1)[2:] == [(2, 1, "RESERVED"), (2, 1, "VOID")]
    assert charged.ledger.verify() == []


def test_a_site_that_always_refuses_where_all_are_needed_ends_the_run_and_nobody_pays(start: Start) -> None:
    charged = start(quorum=5, node_wait_s=100.0)
    charged.clients[5].policy = Policy(min_members=6)
    with pytest.raises(RoundError, match="for 100 s no others came: only 4 shared secrets; threshold 4, quorum 5"):
        charged.play()
    assert not any("train" in asked_of(message) for message in charged.bench.grid.sent)
    assert [charged.states(number) for number in range(1, 6)] == [[]] * 5


def test_budgets_that_seem_to_suffice_and_never_do_end_the_run(start: Start) -> None:
    charged = start(secagg_aborts=2)
    reserve = charged.run.spending.ledger.reserve  # type: ignore[union-attr]

    def two_too_poor(charges: Sequence[Charge], admit: Admit, **options: Any) -> list[Refusal]:
        paid = [charge for charge in charges if charge.unit not in (charged.unit(4), charged.unit(5))]
        return [*reserve(paid, admit, **options), *(Refusal(charged.unit(number), "no room") for number in (4, 5))]

    charged.run.spending.ledger.reserve = two_too_poor  # type: ignore[union-attr,method-assign]
    with pytest.raises(RoundError, match="3 clients are left to pay for the round, 4 are needed"):
        charged.play()
    assert not any("train" in asked_of(message) for message in charged.bench.grid.sent)
    assert {state for *_, state in charged.states(1)} == {"RESERVED", "VOID"}


def test_every_client_keeps_the_signed_head_that_the_run_ends_with(start: Start) -> None:
    charged = start()
    charged.play()
    end_secure_run(charged.run, charged.version)
    for number, client in charged.clients.items():
        told = json.loads(client.heads[-1])
        head = SignedHead(**told["head"])
        assert Unit(**told["unit"]) == charged.unit(number)
        assert head_fault(head) is None
        rows = list(charged.ledger.rows(charged.unit(number)))
        assert (head.seq, head.hash) == (rows[-1].seq, rows[-1].hash)


def test_what_was_spent_is_told_with_its_adversary_and_withheld_from_who_sees_more(start: Start) -> None:
    charged = start()
    charged.give(5, 1)
    for _ in range(2):
        charged.play()
    run = charged.desk.store.get_run(charged.desk.run_id)
    config = charged.bench.config.model_copy(update={"num_rounds": 2})
    size = int(np.count_nonzero(charged.version.client.trained("B")))
    expected = expected_spend(config, scale=2.0**20, size=size)["holder"]
    holder, orchestrator, trunk, whole = told_run_privacy(run, charged.ledger)
    assert "by this run alone" in whole
    assert holder.startswith(
        f"epsilon {expected:.3g} at delta 1e-05 for who holds the released adapter (all of a client's"
    )
    assert orchestrator.startswith(f"epsilon {expected:.3g} at delta 1e-05 for the orchestrator and the other clients")
    assert trunk == "the trunk: no epsilon: the server can read the text"


def test_losses_that_nothing_prices_take_the_orchestrators_epsilon(start: Start) -> None:
    charged = start(metrics="sum")
    charged.play()
    told = told_run_privacy(charged.desk.store.get_run(charged.desk.run_id), charged.ledger)
    assert told[0].startswith("epsilon ")
    assert told[1] == ("the orchestrator and the other clients: no epsilon: totals of losses and counts have no noise")


def test_a_run_without_differential_privacy_has_no_epsilon_and_says_what_the_trunk_can_read(start: Start) -> None:
    charged = start()
    row = charged.desk.store.create_run("plain", "flower-2", {"dp": "off"}, "simulation", "f" * 64)
    assert told_run_privacy(row, charged.ledger) == [
        "wire privacy is off: the server can read the text",
        "dp is off: nothing of the run has an epsilon",
    ]


def test_after_a_resumption_a_client_keeps_the_dataset_that_was_charged_before(start: Start) -> None:
    charged = start()
    charged.play()
    membership = Membership(charged.desk, enrolled=False)
    membership.remember(account.unit for account in charged.ledger.accounts(charged.desk.run_id))
    charged.clients[1].dataset = "other-texts"
    members = membership.known([str(number) for number in charged.clients])
    units = membership.units(members, "client")
    assert "1" not in units
    assert membership.excluded(["1"]) == [("1", "client client-1 takes part with dataset texts in this run")]
