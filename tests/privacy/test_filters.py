"""The filters admit what fits in a budget, to its last digit, and nothing that is over."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import mpmath
import pytest
from dp_accounting.rdp import compute_epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.errors import BudgetError, ConfigError, UnpricedError
from contract.privacy_records import (
    ADVERSARIES,
    ALL_DATASETS,
    Adversary,
    Budget,
    PricedRelease,
    PrivacyEvent,
    Standing,
    Unit,
    View,
)
from privacy.accountant import Spent, count, epsilon
from privacy.filters import admit, admit_standing, require_affordable, require_sound, used
from privacy.gaussian import gaussian_event
from privacy.gaussian_curve import gaussian_allowance
from privacy.renyi import renyi_allowance
from privacy.skellam import skellam_event

UNIT = Unit("north", "letters", "example")
SECRET, SEEN = View(10, (0.05).hex(), "zero-out"), View(1, "1", "replace")


def budget(share: float, epsilon: float = 8.0, delta: float = 1e-5, order: float = 4.0) -> Budget:
    return Budget(epsilon, delta, order, dict.fromkeys(ADVERSARIES, share))


def release(multiplier: float, **views: View) -> PricedRelease:
    named: Any = views
    return PricedRelease("adapter_sum", gaussian_event(multiplier, 1.0), named)


def over(mu_squared: Fraction, epsilon: float, delta: float) -> bool:
    """Whether the exact curve says that mu^2 costs more than (epsilon, delta), in 60 digits."""
    mpmath.mp.dps = 60
    mu = mpmath.sqrt(mpmath.mpf(mu_squared.numerator) / mu_squared.denominator)
    e = mpmath.mpf(epsilon)
    delta_of = mpmath.ncdf(mu / 2 - e / mu) - mpmath.exp(e) * mpmath.ncdf(-mu / 2 - e / mu)
    return bool(delta_of > mpmath.mpf(delta))


# ---- the Gaussian filter ---------------------------------------------------------------------------------------------


@given(st.floats(1e-3, 200.0), st.floats(1e-12, 0.2))
@settings(max_examples=60, deadline=None)
def test_the_allowance_is_never_over_the_exact_curve_and_just_below_it(epsilon: float, delta: float) -> None:
    allowed = gaussian_allowance(epsilon, delta)
    assert not over(allowed, epsilon, delta)
    assert over(allowed * Fraction(10**8 + 1, 10**8), epsilon, delta)


def test_the_gaussian_filter_stops_at_the_last_digit() -> None:
    allowed = gaussian_allowance(8.0, 1e-5)
    assert math.sqrt(allowed) == pytest.approx(1.666, abs=1e-3)
    require_affordable(Spent(allowed / 2), Spent(allowed / 2), budget(1.0), UNIT, "trunk")
    assert used(Spent(allowed), budget(1.0), "trunk") == 1.0
    bit = Fraction(1, 10**40)
    assert used(Spent(allowed + bit), budget(1.0), "trunk") > 1.0
    with pytest.raises(BudgetError):
        require_affordable(Spent(allowed / 2), Spent(allowed / 2 + bit), budget(1.0), UNIT, "trunk")


@given(st.lists(st.tuples(st.floats(0.5, 30.0), st.booleans()), min_size=1, max_size=60), st.floats(0.2, 20.0))
@settings(max_examples=50, deadline=None)
def test_whatever_is_chosen_next_what_was_admitted_stays_under_the_exact_epsilon(
    asked: list[tuple[float, bool]], epsilon: float
) -> None:
    """A caller who picks each release by what happened before: here, who tries all and keeps what passes."""
    for_all, counted, total = budget(1.0, epsilon), dict[str, int](), Fraction(0)
    for multiplier, replaces in asked:
        one = release(multiplier, trunk=View(1, "1", "replace" if replaces else "zero-out"))
        try:
            admit(for_all, UNIT, counted, [one])
        except BudgetError:
            continue
        counted[one.canonical()] = counted.get(one.canonical(), 0) + 1
        total += (Fraction(2 if replaces else 1) / Fraction(multiplier)) ** 2
    assert not total or not over(total, epsilon, 1e-5)


# ---- the Renyi filter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1.5, 4.0, 64.0])
def test_the_renyi_filter_stops_where_the_report_reaches_the_budget(order: float) -> None:
    for_all = budget(0.0, epsilon=60.0, order=order)
    allowed = renyi_allowance(60.0, order, 1e-5)
    fits, not_quite = Spent(renyi=allowed), Spent(renyi=math.nextafter(allowed, math.inf))
    require_affordable(Spent(), fits, for_all, UNIT, "holder")
    assert used(fits, for_all, "holder") == 1.0 < used(not_quite, for_all, "holder")
    assert compute_epsilon([order], [allowed], 1e-5)[0] == pytest.approx(60.0, rel=1e-14)
    with pytest.raises(BudgetError):
        require_affordable(Spent(), not_quite, for_all, UNIT, "holder")


def test_rounds_of_a_noisy_sum_are_admitted_until_the_next_would_be_over() -> None:
    views: dict[Adversary, View] = {"holder": View(1, "1", "zero-out")}
    one = PricedRelease("adapter_sum", skellam_event(4.512, 1.0, 2.0**20, 10_000), views)
    admit(budget(0.0), UNIT, {one.canonical(): 49}, [one])
    with pytest.raises(BudgetError, match=r"epsilon 7\.9999\d* is spent at delta 1e-05, and this would make it 8\.098"):
        admit(budget(0.0), UNIT, {one.canonical(): 50}, [one])


def test_an_order_that_certifies_nothing_admits_nothing() -> None:
    assert used(Spent(renyi=1e-9), budget(0.0, epsilon=0.5, order=4.0), "holder") == math.inf
    assert used(Spent(renyi=math.inf), budget(0.0), "holder") == math.inf
    assert used(Spent(), budget(0.0, epsilon=0.5, order=4.0), "holder") == 0.0


# ---- both ------------------------------------------------------------------------------------------------------------


def test_a_unit_that_needs_both_filters_has_a_share_in_each() -> None:
    """The holder sees sampled steps and what the trunk's half learned of noised rows: two accounts."""
    steps, wire = release(1.0, holder=SECRET), release(3.0, holder=View(1, "1", "zero-out"))
    half = budget(0.5)
    rows = {steps.canonical(): 4, wire.canonical(): 6}
    admit(half, UNIT, rows, [steps, wire])
    with pytest.raises(BudgetError, match=r"over the 4 that the budget of 8 gives the Gaussian filter"):
        admit(half, UNIT, rows, [wire] * 2)
    with pytest.raises(BudgetError, match=r"over the 4 that the budget of 8 gives the Renyi filter"):
        admit(half, UNIT, rows, [steps] * 60)


@given(st.floats(0.05, 0.95), st.floats(0.01, 30.0), st.floats(0.0, 3.0), st.floats(0.5, 10.0))
@settings(max_examples=60, deadline=None)
def test_what_both_filters_admit_is_within_the_epsilon_that_is_reported(
    share: float, renyi: float, gaussian: float, epsilon_: float
) -> None:
    for_all, total = budget(share, epsilon_), Spent(Fraction(gaussian), renyi)
    if used(total, for_all, "holder") <= 1.0:
        assert epsilon(total, for_all, "holder") <= epsilon_ * (1 + 1e-9)
    assert used(total + Spent(renyi=1.0), for_all, "holder") >= used(total, for_all, "holder")


def test_a_budget_for_the_gaussian_filter_alone_refuses_the_rest_and_says_so() -> None:
    with pytest.raises(BudgetError, match="make it inf, over the 0 that the budget of 8 gives the Renyi filter"):
        admit(budget(1.0), UNIT, {}, [release(50.0, holder=SECRET)])


def test_a_budget_without_a_gaussian_share_still_takes_gaussians() -> None:
    assert used(Spent(Fraction(1, 2)), budget(0.0), "holder") == pytest.approx(1.0 / renyi_allowance(8.0, 4.0, 1e-5))


# ---- admitting -------------------------------------------------------------------------------------------------------


def test_each_adversary_is_asked_for_by_itself_and_named() -> None:
    one = release(1.0, holder=SECRET, trunk=SEEN)
    shares: dict[Adversary, float] = {"holder": 0.0, "trunk": 1.0}
    with pytest.raises(BudgetError) as refused:
        admit(Budget(8.0, 1e-5, 4.0, shares), UNIT, {}, [one])
    assert "dataset letters of client north (example level): against the trunk epsilon 0 is spent" in str(refused.value)
    assert "`trunkline budget set` raises a budget" in str(refused.value)
    admit(Budget(20.0, 1e-5, 4.0, shares), UNIT, {}, [one])


def test_who_sees_nothing_more_is_not_asked_for() -> None:
    """The trunk's account is over; a release that it sees nothing of may still be made."""
    spent_out = release(0.5, trunk=SEEN)
    admit(budget(0.0), UNIT, {spent_out.canonical(): 100}, [release(2.0, holder=SECRET)])
    with pytest.raises(BudgetError):
        admit(budget(0.0), UNIT, {spent_out.canonical(): 100}, [release(50.0, trunk=SEEN)])


def test_the_clients_budget_over_all_its_datasets_is_called_so() -> None:
    with pytest.raises(BudgetError, match="all datasets of client north"):
        admit(budget(1.0), Unit("north", ALL_DATASETS, "example"), {}, [release(0.1, trunk=SEEN)])


def test_an_unpriced_release_or_row_is_refused_not_ignored() -> None:
    strange = PricedRelease("adapter_sum", PrivacyEvent("laplace", {}), {"holder": SECRET})  # type: ignore[arg-type]
    with pytest.raises(UnpricedError):
        admit(budget(0.0), UNIT, {}, [strange])
    with pytest.raises(UnpricedError):
        admit(budget(0.0), UNIT, {strange.canonical(): 1}, [release(50.0, holder=SECRET)])
    assert count([strange]) == {strange.canonical(): 1}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (budget(0.5, epsilon=0.0), "epsilon is 0.0"),
        (budget(0.5, epsilon=math.inf), "epsilon is inf"),
        (budget(0.5, delta=1.0), "delta is 1.0"),
        (budget(0.5, order=1.0), "order is 1.0"),
        (budget(1.5), "gaussian share against holder is 1.5"),
        (budget(math.nan), "gaussian share against holder is nan"),
    ],
)
def test_what_is_no_budget_is_refused(wrong: Budget, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        require_sound(wrong)
    require_sound(budget(0.5))


# ---- all budgets of a standing ---------------------------------------------------------------------------------------


def standing(**told: object) -> Standing:
    blank: dict[str, object] = {"budget": None, "client_budget": None, "spent": {}, "client_spent": {}}
    return Standing(unit=UNIT, **{**blank, **told})  # type: ignore[arg-type]


ONE = release(2.0, holder=SECRET)


def rounds_that_fit(of: Budget) -> int:
    """How many times ONE fits in a budget by itself."""
    for times in range(1000):
        try:
            admit(of, UNIT, {ONE.canonical(): times}, [ONE])
        except BudgetError:
            return times
    raise AssertionError("the budget never ends")


def test_the_run_the_dataset_and_the_client_each_have_a_budget_that_binds() -> None:
    own, small = budget(0.0), budget(0.0, epsilon=6.0)
    most, fewer = rounds_that_fit(own), rounds_that_fit(small)
    assert 0 < fewer < most
    text = ONE.canonical()
    admit_standing(own, "now", standing(spent={"now": {text: most - 1}}), [ONE])
    with pytest.raises(BudgetError, match=r"in this run \(dp-epsilon, dp-delta\): dataset letters"):
        admit_standing(own, "now", standing(spent={"now": {text: most}}), [ONE])
    two_runs = {"before": {text: fewer - 1}, "now": {text: 1}}
    with pytest.raises(BudgetError, match="^dataset letters of client north"):
        admit_standing(own, "now", standing(spent=two_runs, budget=small), [ONE])
    with pytest.raises(BudgetError, match="^dataset letters of client north"):
        admit_standing(own, "now", standing(spent={"before": {text: most}}), [ONE])
    with pytest.raises(BudgetError, match="^all datasets of client north"):
        admit_standing(own, "now", standing(client_budget=small, client_spent={text: fewer}), [ONE])
    admit_standing(own, "now", standing(client_budget=small, client_spent={text: fewer - 1}), [ONE])


def test_a_dataset_spends_at_one_level_unless_a_person_gave_it_a_budget_at_another() -> None:
    with pytest.raises(BudgetError, match="spends at client level, .* --level example` sets one all the same"):
        admit_standing(budget(0.0), "now", standing(budget=budget(0.0), other_level=True), [ONE])
    admit_standing(budget(0.0), "now", standing(budget=budget(0.0), other_level=True, chosen=True), [ONE])
    admit_standing(budget(0.0), "now", standing(client_budget=budget(0.0), other_level=True, client_chosen=True), [ONE])
