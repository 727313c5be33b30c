"""Prices, their sums and the epsilon that a sum stands for: against dp-accounting, Opacus and the exact curve."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import dp_accounting
import mpmath
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.errors import UnpricedError
from contract.privacy_records import ADVERSARIES, Adversary, Budget, PricedRelease, PrivacyEvent, View
from privacy.accountant import ACCOUNTANT, Price, Spent, count, epsilon, price, spent
from privacy.gaussian import gaussian_event
from privacy.gaussian_curve import gaussian_epsilon
from privacy.renyi import SampledGaussian
from privacy.skellam import skellam_event

CERTAIN = View(1, "1", "zero-out")


def release(
    multiplier: float = 1.0, view: View = CERTAIN, event: PrivacyEvent | None = None, seers: Any = ADVERSARIES
) -> PricedRelease:
    return PricedRelease("adapter_sum", event or gaussian_event(multiplier, 0.5), dict.fromkeys(seers, view))


def sampled(multiplier: float, rate: float, releases: int = 1) -> PricedRelease:
    return release(multiplier, View(releases, rate.hex(), "zero-out"))


def noisy_sum(multiplier: float, scale: float = 2.0**20) -> PricedRelease:
    return release(event=skellam_event(multiplier, 0.5, scale, 1000))


def budget(share: float, order: float = 4.0, epsilon: float = 8.0, delta: float = 1e-5) -> Budget:
    return Budget(epsilon, delta, order, dict.fromkeys(ADVERSARIES, share))


def spent_by(*releases: PricedRelease, order: float = 4.0, adversary: Adversary = "holder") -> Spent:
    return spent(count(list(releases)), adversary, order)


# ---- one price -------------------------------------------------------------------------------------------------------


def test_an_unamplified_gaussian_is_priced_as_an_exact_fraction() -> None:
    third = 3.3
    assert price(release(third, View(7, "1", "zero-out")), "holder") == Price(7 / Fraction(third) ** 2, None)
    assert price(release(third, View(7, (1.0).hex(), "replace")), "trunk") == Price(28 / Fraction(third) ** 2, None)


def test_each_adversary_is_priced_by_its_own_view() -> None:
    views: dict[Adversary, View] = {"holder": View(10, (0.05).hex(), "zero-out"), "trunk": View(2, "1", "replace")}
    seen = PricedRelease("adapter_sum", gaussian_event(2.0, 1.0), views)
    assert price(seen, "holder") == Price(Fraction(0), SampledGaussian(2.0, 0.05, 10))
    assert price(seen, "trunk") == Price(Fraction(2), None)
    assert price(seen, "orchestrator") is None
    assert spent_by(seen, adversary="orchestrator") == Spent()


def test_a_release_has_the_price_of_its_text() -> None:
    kept = noisy_sum(2.0)
    assert price(PricedRelease.from_canonical(kept.canonical()), "holder") == price(kept, "holder")


def changed(event: PrivacyEvent, **parameters: str) -> PrivacyEvent:
    return PrivacyEvent(event.mechanism, {**event.parameters, **parameters})


GAUSSIAN, SKELLAM = gaussian_event(1.0, 1.0), skellam_event(1.0, 1.0, 4.0, 9)


@pytest.mark.parametrize(
    ("unpriced", "told"),
    [
        (release(event=PrivacyEvent("laplace", {})), "mechanism 'laplace'"),  # type: ignore[arg-type]
        (
            release(event=PrivacyEvent("gaussian", {"noise_multiplier": "0x1p+0"})),
            "it must have clip, noise_multiplier",
        ),
        (release(event=changed(GAUSSIAN, correlation="0x1p-1")), "it must have clip, noise_multiplier"),
        (release(event=changed(GAUSSIAN, noise_multiplier="0x0.0p+0")), "must be a number above 0"),
        (release(event=changed(GAUSSIAN, noise_multiplier="nan")), "must be a number above 0"),
        (release(event=changed(GAUSSIAN, noise_multiplier="1")), "must be written '0x1.0"),
        (release(event=changed(GAUSSIAN, clip="0x1p+0")), "must be written '0x1.0"),
        (release(event=changed(SKELLAM, size="1.5")), "size of the skellam event is '1.5'"),
        (release(event=changed(SKELLAM, size="0")), "size of the skellam event is '0'"),
        (release(event=changed(SKELLAM, size="٣")), "size of the skellam event"),
        (release(event=changed(SKELLAM, rounding_bias=(1.0).hex())), "rounding_bias is 1.0"),
        (release(view=View(0, "1", "zero-out")), "releases 0"),
        (release(view=View(True, "1", "zero-out")), "releases True"),
        (release(view=View(1, "0.05", "zero-out")), "sampling_rate is '0.05'"),
        (release(view=View(1, (1.5).hex(), "zero-out")), "sampling_rate is"),
        (release(view=View(1, (0.0).hex(), "zero-out")), "sampling_rate is"),
        (release(view=View(1, "", "zero-out")), "sampling_rate is"),
        (release(view=View(1, "1", "add-or-remove")), "adjacency 'add-or-remove'"),  # type: ignore[arg-type]
        (release(view=View(1, (0.5).hex(), "replace")), "between neighbours that replace"),
        (release(event=SKELLAM, view=View(1, (0.5).hex(), "zero-out")), "a Skellam sum sampled at 0.5"),
        (release(event=SKELLAM, view=View(1, "1", "replace")), "with replace neighbours"),
        (release(seers=("holder", "auditor")), "adversary 'auditor'"),
        (replace(release(), channel="loss"), "channel 'loss'"),  # type: ignore[arg-type]
    ],
)
def test_what_has_no_theorem_has_no_price(unpriced: PricedRelease, told: str) -> None:
    with pytest.raises(UnpricedError, match=told.replace("(", r"\(")):
        price(unpriced, "holder")
    with pytest.raises(UnpricedError):
        spent_by(release(), unpriced)


def test_a_row_that_is_no_release_or_is_written_otherwise_is_refused() -> None:
    text = release().canonical()
    for torn in ("", "[]", text[:-1], text.replace(",", ", ", 1), json.dumps(json.loads(text)[:3])):
        with pytest.raises(UnpricedError):
            spent({torn: 1}, "holder", 4.0)
    with pytest.raises(UnpricedError, match="charged -1 times"):
        spent({text: -1}, "holder", 4.0)


# ---- sums ------------------------------------------------------------------------------------------------------------

multipliers = st.floats(0.3, 50.0)
views = st.builds(View, st.integers(1, 9), st.just("1"), st.sampled_from(["zero-out", "replace"]))
releases = st.one_of(
    st.builds(release, multipliers, views),
    st.builds(sampled, multipliers, st.floats(1e-6, 0.99), st.integers(1, 9)),
    st.builds(noisy_sum, multipliers, st.floats(10.0, 2.0**30)),
)  # fmt: skip


@given(releases, st.integers(0, 300), st.sampled_from([2, 4, 24]))
@settings(max_examples=60, deadline=None)
def test_composing_n_times_is_n_times_the_price(one: PricedRelease, times: int, order: int) -> None:
    single, many = spent_by(one, order=order), spent({one.canonical(): times}, "holder", order)
    assert many == Spent(times * single.gaussian, times * single.renyi)
    assert spent_by(*[one] * times, order=order) == many


@given(st.lists(st.tuples(releases, st.integers(1, 50)), max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_two_replays_agree_to_the_bit_in_whatever_order(rows: list[tuple[PricedRelease, int]], random: Any) -> None:
    counted: dict[str, int] = {}
    for one, times in rows:
        counted[one.canonical()] = counted.get(one.canonical(), 0) + times
    shuffled = list(counted.items())
    random.shuffle(shuffled)
    for adversary in ADVERSARIES:
        first, again = spent(counted, adversary, 4.0), spent(dict(shuffled), adversary, 4.0)
        assert (first.gaussian, first.renyi.hex()) == (again.gaussian, again.renyi.hex())
        assert epsilon(first, budget(0.5), adversary).hex() == epsilon(again, budget(0.5), adversary).hex()


@given(st.lists(releases, min_size=1, max_size=5), releases, st.sampled_from([0.0, 0.5]))
@settings(max_examples=40, deadline=None)
def test_one_more_release_never_makes_it_less(rows: list[PricedRelease], more: PricedRelease, share: float) -> None:
    before, after = spent_by(*rows), spent_by(*rows, more)
    assert after.gaussian >= before.gaussian
    assert after.renyi >= before.renyi
    assert epsilon(after, budget(share), "holder") >= epsilon(before, budget(share), "holder") - 1e-11


@given(multipliers, multipliers)
@settings(max_examples=40, deadline=None)
def test_more_noise_never_costs_more(one: float, other: float) -> None:
    less, more = sorted((one, other))
    for make in (release, noisy_sum, lambda z: sampled(z, 0.1)):
        assert spent_by(make(more)).gaussian <= spent_by(make(less)).gaussian
        assert spent_by(make(more)).renyi <= spent_by(make(less)).renyi * (1 + 1e-12)


# ---- epsilon ---------------------------------------------------------------------------------------------------------


def exact_delta(mu: Any, eps: float) -> Any:
    """Balle and Wang's delta(epsilon) of a mu-GDP mechanism."""
    return mpmath.ncdf(mu / 2 - eps / mu) - mpmath.exp(eps) * mpmath.ncdf(-mu / 2 - eps / mu)


@pytest.mark.parametrize("mu_squared", [Fraction(1, 10**6), Fraction(1, 7), Fraction(3), Fraction(40)])
def test_the_gaussian_epsilon_lies_on_the_exact_curve(mu_squared: Fraction) -> None:
    mpmath.mp.dps = 40
    mu = mpmath.sqrt(mpmath.mpf(mu_squared.numerator) / mu_squared.denominator)
    for delta in (1e-12, 1e-5, 1e-3):
        found = gaussian_epsilon(mu_squared, delta)
        assert exact_delta(mu, found + 1e-9) <= delta <= exact_delta(mu, max(0.0, found - 1e-9)) or found == 0.0


def test_gaussian_runs_cost_what_dp_accounting_says() -> None:
    found = spent({release(4.0).canonical(): 50, release(7.5, View(3, "1", "replace")).canonical(): 20}, "holder", 4.0)
    sigma = 1 / math.sqrt(50 / 16 + 20 * 3 * 4 / 56.25)
    theirs = dp_accounting.get_epsilon_gaussian(sigma, 1e-5)
    assert epsilon(found, budget(1.0), "holder") == pytest.approx(theirs, rel=1e-12)


def test_dp_sgd_costs_what_dp_accounting_and_opacus_say() -> None:
    from opacus.accountants import RDPAccountant as OpacusAccountant

    order, delta = 8.0, 1e-6
    rows: Mapping[tuple[float, float], int] = {(1.1, 0.02): 400, (0.8, 0.001): 1000}
    theirs, opacus = RdpAccountant([order]), OpacusAccountant()
    for (multiplier, rate), steps in rows.items():
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(multiplier))
        theirs.compose(event, steps)
        opacus.history.append((multiplier, rate, steps))
    found = spent({sampled(*row, 10).canonical(): steps // 10 for row, steps in rows.items()}, "holder", order)
    ours = epsilon(found, budget(0.0, order, delta=delta), "holder")
    assert ours == pytest.approx(theirs.get_epsilon(delta), rel=1e-8)
    assert ours == pytest.approx(opacus.get_privacy_spent(delta=delta, alphas=[1.1, order, 60.0])[0], rel=1e-8)


def test_where_both_filters_answer_each_does_at_its_share_and_they_add_up() -> None:
    both = spent_by(release(5.0), *[sampled(1.0, 0.02)] * 30)
    parts = (
        epsilon(Spent(both.gaussian), budget(0.5), "holder"),
        epsilon(Spent(renyi=both.renyi), budget(0.5), "holder"),
    )
    assert epsilon(both, budget(0.5), "holder") == pytest.approx(sum(parts), rel=1e-15)
    assert parts[0] == pytest.approx(dp_accounting.get_epsilon_gaussian(5.0, 0.5e-5), rel=1e-12)
    theirs = RdpAccountant([4.0])
    theirs.compose(dp_accounting.PoissonSampledDpEvent(0.02, dp_accounting.GaussianDpEvent(1.0)), 30)
    assert parts[1] == pytest.approx(theirs.get_epsilon(0.5e-5), rel=1e-8)


def test_a_budget_without_a_gaussian_share_charges_gaussians_to_the_renyi_filter() -> None:
    found = epsilon(spent_by(release(2.0), noisy_sum(3.0)), budget(0.0), "holder")
    theirs = RdpAccountant([4.0])
    theirs.compose(dp_accounting.GaussianDpEvent(2.0)).compose(dp_accounting.GaussianDpEvent(3.0))
    assert found == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)


def test_a_budget_of_the_gaussian_filter_alone_covers_nothing_else() -> None:
    assert epsilon(spent_by(noisy_sum(100.0)), budget(1.0), "holder") == math.inf
    assert epsilon(Spent(), budget(1.0), "holder") == 0.0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_no_float_holds_is_infinite(share: float) -> None:
    assert epsilon(Spent(Fraction(10) ** 400), budget(share), "holder") == math.inf
    assert 0.0 <= epsilon(Spent(Fraction(1, 10**400)), budget(share), "holder") < 4.0


def test_the_accountant_names_itself_and_its_library() -> None:
    assert ACCOUNTANT.startswith("trunkline 1, dp-accounting 0.6")
