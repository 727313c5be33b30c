"""What a run releases each round, the budget that it registers, and the noise that a plan needs."""

from __future__ import annotations

import math
from fractions import Fraction

import dp_accounting
import pytest
from dp_accounting.rdp import RdpAccountant

from contract.config import ConfigValue, RunConfig
from contract.errors import BudgetError, ConfigError
from contract.privacy_records import ADVERSARIES, Level, PricedRelease, Unit, View
from privacy.accountant import count, price
from privacy.calibration import calibrated, pld_epsilon, pld_epsilons, usability, with_noise
from privacy.filters import admit, require_sound
from privacy.plan import (
    FRACTIONAL_ORDERS,
    WHOLE_ORDERS,
    best_order,
    budget_for,
    expected_spend,
    level_of,
    register_budget,
    round_releases,
)
from privacy.renyi import renyi_allowance

SCALE, SIZE = 2.0**20, 10_000
CLIENT = {"dp": "client", "trunk-adapter": "frozen", "num-rounds": 50}
EXAMPLE = {"dp": "example", "trunk-adapter": "frozen", "num-rounds": 50, "local-steps": 10}
WIRE = {**EXAMPLE, "wire": "dp", "metrics": "off", "num-rounds": 3, "wire-releases": 2}
TRAINED = {**WIRE, "trunk-adapter": "trained"}


def config(base: dict[str, ConfigValue], **changed: ConfigValue) -> RunConfig:
    return RunConfig.from_flower({**base, **{name.replace("_", "-"): value for name, value in changed.items()}})


def scale_of(of: RunConfig) -> float | None:
    return SCALE if of.dp == "client" else None


def releases(of: RunConfig) -> tuple[PricedRelease, ...]:
    return round_releases(of, scale=scale_of(of), size=SIZE)


# ---- a round's releases ----------------------------------------------------------------------------------------------


def test_a_run_without_dp_releases_nothing_that_has_a_price_and_has_no_budget() -> None:
    assert releases(config({})) == ()
    with pytest.raises(ConfigError, match="dp is off"):
        register_budget(config({}))


def test_a_client_level_round_is_one_noisy_sum_that_the_trunk_does_not_see() -> None:
    (only,) = releases(config(CLIENT, dp_noise_multiplier=4.0, dp_clip=0.5))
    certain = View(1, "1", "zero-out")
    assert (only.channel, only.event.mechanism) == ("adapter_sum", "skellam")
    assert only.views == {"holder": certain, "orchestrator": certain}
    assert (only.event.number("noise_multiplier"), only.event.number("clip")) == (4.0, 0.5)
    assert (only.event.number("scale"), only.event.parameters["size"]) == (SCALE, str(SIZE))
    with pytest.raises(ConfigError, match="needs the scale"):
        round_releases(config(CLIENT), scale=None, size=SIZE)


def test_an_example_level_round_is_secret_draws_of_rows_in_every_step() -> None:
    (only,) = releases(config(EXAMPLE, dp_sample_rate=0.02))
    secret = View(10, (0.02).hex(), "zero-out")
    assert (only.channel, only.event.mechanism) == ("adapter_sum", "gaussian")
    assert only.views == {"holder": secret, "orchestrator": secret}


def test_no_amplification_is_charged_where_participation_is_visible() -> None:
    for channel, one in {one.channel: one for one in releases(config(WIRE))}.items():
        assert one.views["trunk"] == View(2, "1", "replace"), channel
    whole = releases(config(EXAMPLE, dp_sample_rate=1.0))[0]
    assert price(whole, "holder").gaussian == 10  # type: ignore[union-attr]


def test_under_wire_dp_the_holder_sees_of_the_wire_only_what_the_trunks_half_learns() -> None:
    frozen = {one.channel: set(one.views) for one in releases(config(WIRE))}
    trained = {one.channel: one.views for one in releases(config(TRAINED))}
    assert frozen["wire_forward"] == frozen["wire_backward"] == {"trunk"}
    assert frozen["adapter_sum"] == {"holder", "orchestrator", "trunk"}
    for channel in ("wire_forward", "wire_backward"):
        assert trained[channel]["holder"] == trained[channel]["orchestrator"] == View(2, "1", "zero-out")
        assert trained[channel]["trunk"] == View(2, "1", "replace")


def test_a_trained_trunks_half_tells_who_was_drawn_so_that_no_draw_is_believed() -> None:
    frozen, trained = ({one.channel: one.views for one in releases(config(base))} for base in (WIRE, TRAINED))
    drawn, told = View(10, (0.05).hex(), "zero-out"), View(2, "1", "zero-out")
    assert frozen["adapter_sum"]["holder"] == frozen["adapter_sum"]["orchestrator"] == drawn
    assert trained["adapter_sum"]["holder"] == trained["adapter_sum"]["orchestrator"] == told
    assert trained["adapter_sum"]["trunk"] == frozen["adapter_sum"]["trunk"] == View(2, "1", "replace")


# ---- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "shares"),
    [
        (CLIENT, (0.0, 0.0, 0.0)),
        (EXAMPLE, (0.0, 0.0, 0.0)),
        ({**EXAMPLE, "dp-sample-rate": 1.0}, (1.0, 1.0, 0.0)),
        (WIRE, (0.0, 0.0, 1.0)),
        (TRAINED, (1.0, 1.0, 1.0)),
    ],
)
def test_no_run_needs_both_filters_against_one_adversary(
    base: dict[str, ConfigValue], shares: tuple[float, ...]
) -> None:
    found = register_budget(config(base, dp_epsilon=5.0, dp_delta=1e-6))
    assert tuple(found.gaussian_share[name] for name in ADVERSARIES) == shares
    assert (found.epsilon, found.delta) == (5.0, 1e-6)
    require_sound(found)


def test_a_budget_is_divided_where_both_filters_are_needed() -> None:
    both = [*releases(config(EXAMPLE)), *releases(config({**EXAMPLE, "dp-sample-rate": 1.0}))]
    found = budget_for(both, 5.0, 1e-6, "example")
    assert tuple(found.gaussian_share[name] for name in ADVERSARIES) == (0.5, 0.5, 0.0)
    assert found.order == register_budget(config(EXAMPLE, dp_epsilon=2.5, dp_delta=5e-7)).order
    require_sound(found)


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 8.0, 40.0])
def test_the_registered_order_affords_the_most_rounds_of_all(epsilon: float) -> None:
    for base in (CLIENT, EXAMPLE):
        of = config(base, dp_epsilon=epsilon, dp_noise_multiplier=2.0)
        (one,) = releases(of)
        found = price(one, "holder")
        orders = WHOLE_ORDERS if base is CLIENT else (*FRACTIONAL_ORDERS, *WHOLE_ORDERS)
        rounds = {order: renyi_allowance(epsilon, order, 1e-5) / found.renyi_at(order) for order in orders}  # type: ignore[union-attr]
        assert rounds[register_budget(of).order] >= max(rounds.values()) * (1 - 1e-6)


def test_the_order_of_a_client_level_budget_is_whole_and_a_hopeless_budget_has_one_too() -> None:
    for epsilon in (1e-3, 0.1, 3.0, 500.0):
        order = register_budget(config(CLIENT, dp_epsilon=epsilon)).order
        assert order == int(order) >= 2
    assert best_order(500.0, 1e-5, "example") < 2
    assert best_order(1e-6, 1e-5, "client") == max(WHOLE_ORDERS)


# ---- calibration -----------------------------------------------------------------------------------------------------


def fits(of: RunConfig, rounds: int) -> bool:
    unit = Unit("a", "b", level_of(of))
    counted = {text: times * (rounds - 1) for text, times in count(releases(of)).items()}
    try:
        admit(register_budget(of), unit, counted, releases(of))
    except BudgetError:
        return False
    return True


@pytest.mark.parametrize("base", [CLIENT, EXAMPLE, WIRE, TRAINED], ids=["client", "example", "wire", "trained"])
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_calibrated_noise_lets_exactly_the_planned_rounds_through(base: dict[str, ConfigValue], epsilon: float) -> None:
    of = calibrated(config(base, dp_epsilon=epsilon), size=SIZE, scale_of=scale_of)
    told = expected_spend(of, scale=scale_of(of), size=SIZE)
    assert epsilon * 0.999 < max(told.values()) <= epsilon
    assert fits(of, of.num_rounds)
    assert not fits(of, of.num_rounds + 1)
    assert not fits(with_noise(of, of.dp_noise_multiplier * 0.999), of.num_rounds)
    assert float(f"{of.dp_noise_multiplier:.5g}") == of.dp_noise_multiplier


def test_client_level_noise_is_that_of_a_gaussian_but_for_the_fixed_order() -> None:
    of = calibrated(config(CLIENT), size=SIZE, scale_of=scale_of)
    gaussian = math.sqrt(50) * dp_accounting.get_sigma_gaussian(8.0, 1e-5)
    assert 1.0 < of.dp_noise_multiplier / gaussian < 1.07
    best = dp_accounting.calibrate_dp_mechanism(
        RdpAccountant, lambda z: dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(z), 50), 8.0, 1e-5
    )
    assert of.dp_noise_multiplier == pytest.approx(best, rel=5e-3)


def test_dp_sgd_needs_the_noise_that_dp_accounting_finds() -> None:
    of = calibrated(config(EXAMPLE), size=SIZE, scale_of=scale_of)
    best = dp_accounting.calibrate_dp_mechanism(
        RdpAccountant,
        lambda z: dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(z)), 500
        ),
        8.0,
        1e-5,
    )
    assert of.dp_noise_multiplier == pytest.approx(best, rel=5e-3)


def test_the_trunk_is_protected_by_the_noise_of_gaussian_dp() -> None:
    of = calibrated(config(WIRE), size=SIZE, scale_of=scale_of)
    assert of.wire_noise_multiplier == of.dp_noise_multiplier
    mu_squared = 3 * 3 * 2 * (Fraction(2) / Fraction(of.dp_noise_multiplier)) ** 2  # 3 rounds, 3 channels, 2 releases
    assert math.sqrt(mu_squared) == pytest.approx(1 / dp_accounting.get_sigma_gaussian(8.0, 1e-5), rel=1e-4)


def test_a_budget_that_no_noise_keeps_to_is_refused() -> None:
    with pytest.raises(ConfigError, match="no noise that can be added keeps to epsilon 0.001"):
        calibrated(config(CLIENT, dp_epsilon=1e-3), size=SIZE, scale_of=scale_of)


def test_a_generous_budget_needs_next_to_no_noise() -> None:
    assert calibrated(config(EXAMPLE, dp_epsilon=1e7), size=SIZE, scale_of=scale_of).dp_noise_multiplier == 0.05


def test_loss_distributions_report_less_for_a_plan_that_is_fixed_beforehand() -> None:
    of = config({**EXAMPLE, "num-rounds": 3}, dp_noise_multiplier=0.9)
    enforced = expected_spend(of, scale=None, size=SIZE)
    told = pld_epsilons(of, scale=None, size=SIZE)
    assert told["trunk"] is None
    assert told["holder"] == told["orchestrator"]
    assert 0.5 * enforced["holder"] < told["holder"] < enforced["holder"]  # type: ignore[operator]
    assert pld_epsilon(config(CLIENT), "holder", scale=SCALE, size=SIZE) is None
    visible = config(EXAMPLE, dp_sample_rate=1.0, dp_noise_multiplier=20.0)
    exact = dp_accounting.get_epsilon_gaussian(20.0 / math.sqrt(500), 1e-5)
    assert pld_epsilon(visible, "holder", scale=None, size=SIZE) == pytest.approx(exact, rel=1e-3)


# ---- whether it is of use --------------------------------------------------------------------------------------------


def verdicts(of: RunConfig, size: int = SIZE, clients: int = 100, rows: int = 1000) -> list[str]:
    found = usability(of, size=size, clients=clients, fewest=clients, rows=rows)
    return [one.verdict.partition(":")[0] for one in found]


def test_noise_to_signal_is_the_root_of_the_size_over_who_adds_up() -> None:
    (found,) = usability(config(CLIENT, dp_noise_multiplier=4.24), size=10_000, clients=100, fewest=100, rows=0)
    assert found.noise_to_signal == pytest.approx(4.24)
    assert found.over_the_run == pytest.approx(4.24 / math.sqrt(50))
    (dearer,) = usability(config(CLIENT, dp_noise_multiplier=4.24), size=10_000, clients=100, fewest=66, rows=0)
    assert dearer.noise_to_signal == pytest.approx(4.24 * math.sqrt(100 / 66))
    (rows,) = usability(config(EXAMPLE, dp_noise_multiplier=2.0), size=10_000, clients=4, fewest=1, rows=800)
    assert rows.noise_to_signal == pytest.approx(2.0 * 100 / 40)
    assert rows.over_the_run == pytest.approx(5.0 / math.sqrt(50 * 10 * 4))
    wire = usability(config(WIRE, wire_noise_multiplier=2.94), size=1, clients=4, fewest=1, rows=800)[1]
    assert 1 / wire.noise_to_signal == pytest.approx(0.030, abs=5e-4)


def test_the_verdict_is_plain() -> None:
    noisy = config(CLIENT, dp_noise_multiplier=4.5)
    assert verdicts(noisy, clients=4) == ["useless"]
    assert verdicts(noisy, clients=100) == ["doubtful"]
    assert verdicts(noisy, clients=1000) == ["usable"]
    assert verdicts(config(EXAMPLE)) == ["usable"]
    assert verdicts(config(WIRE)) == ["usable", "useless for learning to write"]
    assert verdicts(config(WIRE, wire_noise_multiplier=0.5))[1] == "doubtful"
    assert verdicts(config(WIRE, wire_noise_multiplier=0.05))[1] == "usable"
    (told,) = usability(noisy, size=10_000, clients=4, fewest=4, rows=0)
    assert "noise is 16 times the most that signal can be" in told.verdict
    assert "more clients, fewer trained values" in told.verdict


def test_the_level_is_what_the_mode_protects() -> None:
    levels: list[Level] = [level_of(config(base)) for base in (CLIENT, EXAMPLE)]
    assert levels == ["client", "example"]
