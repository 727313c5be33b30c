"""Whatever is asked of the ledger, in whatever order, it agrees with a small model and its chains are sound."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from contract.errors import LedgerError
from contract.privacy_records import ALL_DATASETS, PricedRelease, Unit
from storage.ledger import Ledger, open_ledger
from storage.records import Charge, Settled
from tests.storage.conftest import Clock
from tests.storage.ledger_cases import BUDGET, Key, cap, charge, release, unit

CLIENTS = ("a", "b")
DATASETS = ("x", "y")
RELEASES = (release(1.0), release(2.0, "wire_forward"))
UNIT_MOST, CLIENT_MOST = 4, 6
Key4 = tuple[Unit, int, int, str]


class LedgerStates(RuleBasedStateMachine):
    """One run over fresh clients under every sequence of calls; the model is a dictionary of charges."""

    ledger: ClassVar[Ledger]
    fresh: ClassVar[Any] = itertools.count()

    @initialize()
    def begin(self) -> None:
        self.run = f"run-{next(self.fresh)}"
        self.charges: dict[Key4, tuple[str, PricedRelease]] = {}
        self.budgets: Counter[Unit] = Counter()

    def named(self, client: str, dataset: str) -> Unit:
        return unit(f"{self.run}-{client}", dataset)

    def spent(self, unit: Unit | None, client: str) -> int:
        return sum(
            state != "VOID" and of.client == client and unit in (None, of)
            for (of, *_), (state, _) in self.charges.items()
        )

    def expect(self, allowed: bool, call: Any) -> Any:
        try:
            result = call()
        except LedgerError:
            assert not allowed, "the ledger refused what its contract allows"
            return None
        assert allowed, "the ledger took what its contract forbids"
        return result

    @rule(
        pairs=st.lists(st.tuples(st.sampled_from(CLIENTS), st.sampled_from(DATASETS)), unique=True, min_size=1),
        paid=st.lists(st.sampled_from(RELEASES), min_size=1, max_size=2, unique_by=lambda one: one.channel),
        number=st.integers(1, 3),
        attempt=st.integers(1, 2),
    )
    def reserve(
        self, pairs: Sequence[tuple[str, str]], paid: Sequence[PricedRelease], number: int, attempt: int
    ) -> None:
        units = [self.named(*pair) for pair in pairs]
        charges = [charge(one, number, attempt, kind, self.run) for one in units for kind in paid]
        allowed = not any(self.key(one) in self.charges for one in charges)
        refused = self.expect(allowed, lambda: self.ledger.reserve(charges, cap(UNIT_MOST, CLIENT_MOST)))
        if not allowed:
            return
        expected = []
        for one in units:
            fits = self.spent(one, one.client) + len(paid) <= UNIT_MOST
            if fits and self.spent(None, one.client) + len(paid) <= CLIENT_MOST:
                mine = [taken for taken in charges if taken.unit == one]
                self.charges |= {self.key(taken): ("RESERVED", taken.release) for taken in mine}
            else:
                expected.append(one)
        assert [refusal.unit for refusal in refused] == expected

    @rule(
        number=st.integers(1, 3),
        attempt=st.integers(1, 2),
        state=st.sampled_from(["COMMITTED", "VOID"]),
        pairs=st.none() | st.lists(st.tuples(st.sampled_from(CLIENTS), st.sampled_from(DATASETS)), unique=True),
    )
    def settle(self, number: int, attempt: int, state: Settled, pairs: Sequence[tuple[str, str]] | None) -> None:
        named = None if pairs is None else [self.named(*pair) for pair in pairs]
        mine = {
            key: was
            for key, (was, _) in self.charges.items()
            if key[1:3] == (number, attempt) and (named is None or key[0] in named)
        }
        of_each = [[was for key, was in mine.items() if key[0] == one] for one in named or ()]
        settled = set(mine.values()) - {"RESERVED"}
        allowed = bool(mine) and all(of_each)
        if state == "VOID":
            allowed = allowed and "COMMITTED" not in settled and "RESERVED" in mine.values()
            allowed = allowed and (named is None or not settled)
        elif named is not None:
            allowed = allowed and "VOID" not in settled
        self.expect(allowed, lambda: self.ledger.settle(self.run, number, attempt, state, named))
        if allowed:
            self.charges |= {key: (state, self.charges[key][1]) for key, was in mine.items() if was == "RESERVED"}

    @rule(client=st.sampled_from(CLIENTS), dataset=st.sampled_from((*DATASETS, ALL_DATASETS)), anew=st.booleans())
    def budget(self, client: str, dataset: str, anew: bool) -> None:
        of = self.named(client, dataset)
        if anew:
            self.ledger.set_budget(of, BUDGET, "ops", "because")
        else:
            self.ledger.register_budgets([of], BUDGET, self.run)
        self.budgets[of] += anew or not self.budgets[of]

    def teardown(self) -> None:
        """What there is at the end agrees with the model; on the way admissions and refusals had to."""
        counted: Counter[tuple[Unit, str]] = Counter()
        rows: Counter[Unit] = Counter(self.budgets)
        for (of, *_), (state, paid) in self.charges.items():
            rows[of] += 1 if state == "RESERVED" else 2
            counted[of, paid.canonical()] += state != "VOID"
        expected = {(of, text, count) for (of, text), count in counted.items() if count}
        assert {(one.unit, one.release, one.count) for one in self.ledger.accounts(self.run)} == expected
        for of, length in rows.items():
            standing = self.ledger.standing(of)
            own = {text: count for one, text, count in expected if one == of}
            assert standing.spent == ({self.run: own} if own else {})
            assert sum(standing.client_spent.values()) == self.spent(None, of.client)
            assert (standing.budget == BUDGET) is (self.budgets[of] > 0)
            assert [row.seq for row in self.ledger.rows(of)] == list(range(1, length + 1))

    @staticmethod
    def key(one: Charge) -> Key4:
        return one.unit, one.round, one.attempt, one.release.channel


def test_the_ledger_agrees_with_a_model_in_every_order_of_calls(database_url: str) -> None:
    LedgerStates.ledger = open_ledger(database_url, Clock(), Key())
    machine: Any = LedgerStates.TestCase
    machine.settings = settings(
        max_examples=10, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine().runTest()
    assert LedgerStates.ledger.verify() == []
    LedgerStates.ledger.close()
