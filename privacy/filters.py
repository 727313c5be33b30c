"""The filters: whether a release may still be made, whoever chose it and whatever was seen before.

Sums of reports hold for plans that were fixed beforehand; rounds are chosen as one goes. For unamplified Gaussian
releases the sum of mu^2 is held under the budget's (Smith and Thakurta, arXiv 2210.17520; Koskela et al. 2023): fully
adaptive, and nothing lost. For the rest the Renyi prices are held under what the budget allows at one order, chosen
when it was registered (Feldman and Zrnic 2021).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

from contract.errors import BudgetError, ConfigError
from contract.privacy_records import ADVERSARIES, Adversary, Budget, PricedRelease, Standing, Unit
from privacy.accountant import Spent, count, divided, epsilon, gaussian_share, spent
from privacy.coverage import IN_WORDS
from privacy.gaussian_curve import gaussian_allowance
from privacy.renyi import SMALLEST_ORDER, renyi_allowance


def admit_standing(own: Budget, run: str, standing: Standing, proposed: Sequence[PricedRelease]) -> None:
    """Raise BudgetError unless `proposed` fits in every budget in force.

    Those are `own`, the run's for a unit in this run; the dataset's over all runs, and where none was set yet `own` for
    that too; the client's over all datasets. Budgets at two levels over the same data are not one: a dataset that spent
    at the other level, or that a person gave a budget there, is refused, unless a person set a budget at this one.
    """
    require_one_level(standing)
    unit = standing.unit
    try:
        admit(own, unit, standing.spent.get(run, {}), proposed)
    except BudgetError as error:
        raise BudgetError(f"in this run (dp-epsilon, dp-delta): {error}") from error
    total: Counter[str] = Counter()
    for counts in standing.spent.values():
        total.update(counts)
    admit(standing.budget or own, unit, total, proposed)
    if standing.client_budget is not None:
        admit(standing.client_budget, unit.whole, standing.client_spent, proposed)


def require_one_level(standing: Standing) -> None:
    """Raise BudgetError where a dataset belongs to the other level, and no person says that it may spend here too."""
    unit = standing.unit
    if standing.other_level and not (standing.chosen or standing.client_chosen):
        raise BudgetError(
            f"{unit.data_in_words} of client {unit.client} spends at {unit.at_other_level.level} level, and budgets at "
            "two levels over the same text do not make one; "
            f"`trunkline budget set --level {unit.level}` sets one all the same"
        )


def admit(budget: Budget, unit: Unit, charged: Mapping[str, int], proposed: Sequence[PricedRelease]) -> None:
    """Raise BudgetError unless `proposed` fits in `budget` beside `charged`, against every adversary that sees of it.

    `charged` holds canonical releases with their counts. Raises UnpricedError where one of all those has no price.
    """
    asked = count(list(proposed))
    for adversary in ADVERSARIES:
        more = spent(asked, adversary, budget.order)
        if more:
            require_affordable(spent(charged, adversary, budget.order), more, budget, unit, adversary)


def require_affordable(already: Spent, proposed: Spent, budget: Budget, unit: Unit, adversary: Adversary) -> None:
    """Raise BudgetError, saying what it would come to, unless both together fit in `budget` against `adversary`."""
    together = already + proposed
    if used(together, budget, adversary) <= 1.0:
        return
    now, then = epsilon(already, budget, adversary), epsilon(together, budget, adversary)
    raise BudgetError(
        f"{unit.data_in_words} of client {unit.client} ({unit.level} level): against {IN_WORDS[adversary]} epsilon "
        f"{now:.6g} is spent at delta {budget.delta:g}, and this would make it {then:.6g}, "
        f"{_over(together, budget, adversary)}; "
        "`trunkline budget set` raises a budget"
    )


def used(spent: Spent, budget: Budget, adversary: Adversary) -> float:
    """Which part of its filter is used up, 0 to 1; the fuller one's where there are two. What does not fit is above 1.

    Exact at 1: a sum that is over by its last digit answers above 1.
    """
    gaussian, renyi = divided(spent, budget, adversary)
    return max(_gaussian_part(gaussian, budget, adversary), _renyi_part(renyi, budget, adversary))


def require_sound(budget: Budget) -> None:
    """Raise ConfigError, naming the field, for numbers that are no budget."""
    wanted = {
        "epsilon": (budget.epsilon, 0.0 < budget.epsilon < math.inf, "a number above 0"),
        "delta": (budget.delta, 0.0 < budget.delta < 1.0, "between 0 and 1"),
        "order": (budget.order, SMALLEST_ORDER <= budget.order < math.inf, f"a number from {SMALLEST_ORDER} on"),
    }
    for adversary, share in budget.gaussian_share.items():
        wanted[f"gaussian share against {adversary}"] = (share, 0.0 <= share <= 1.0, "between 0 and 1")
    for name, (value, sound, words) in wanted.items():
        if not sound:
            raise ConfigError(f"the budget's {name} is {value}; it must be {words}")


def _gaussian_part(gaussian: Fraction, budget: Budget, adversary: Adversary) -> float:
    if not gaussian:
        return 0.0
    share = gaussian_share(budget, adversary)
    return _part(gaussian, gaussian_allowance(share * budget.epsilon, share * budget.delta))


def _renyi_part(renyi: float, budget: Budget, adversary: Adversary) -> float:
    if not renyi:
        return 0.0
    rest = 1.0 - gaussian_share(budget, adversary)
    allowed = renyi_allowance(rest * budget.epsilon, budget.order, rest * budget.delta) if rest else 0.0
    return _part(renyi, allowed)


def _part(spent: Fraction | float, allowed: Fraction | float) -> float:
    if allowed <= 0:
        return math.inf
    try:
        part = float(spent / allowed)
    except OverflowError:
        part = math.inf
    return min(part, 1.0) if spent <= allowed else max(part, math.nextafter(1.0, 2.0))


def _over(spent: Spent, budget: Budget, adversary: Adversary) -> str:
    share = gaussian_share(budget, adversary)
    if share in (0.0, 1.0) and not (share == 1.0 and spent.renyi):
        return f"over the budget of {budget.epsilon:g}"
    gaussian, _ = divided(spent, budget, adversary)
    if _gaussian_part(gaussian, budget, adversary) > 1.0:
        return f"over the {share * budget.epsilon:g} that the budget of {budget.epsilon:g} gives the Gaussian filter"
    return f"over the {(1.0 - share) * budget.epsilon:g} that the budget of {budget.epsilon:g} gives the Renyi filter"
