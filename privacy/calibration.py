"""Which noise a plan needs, and whether what is left of the signal is of use. The search is dp-accounting's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal

from contract.config import RunConfig
from contract.errors import ConfigError
from contract.privacy_records import ADVERSARIES, Adversary
from privacy.accountant import price
from privacy.plan import expected_spend, round_releases
from privacy.renyi import SampledGaussian

ScaleOf = Callable[[RunConfig], float | None]
"""The scale of a run's noisy sum; None where it has none."""

_INFEASIBLE = 1e9  # an epsilon beyond every budget, where the search wants a finite number
_LEAST, _GUESS = 0.05, 1.0
_SLACK = 1e-6
_DIGITS = Context(prec=5, rounding=ROUND_CEILING)

USABLE, USELESS = 0.1, 1.0
"""Noise over signal in a whole run's change of the adapter: usable up to the one, useless above the other."""
WIRE_USABLE, WIRE_USELESS = 1.0, 10.0
"""The same in what the trunk gets of one token."""


@dataclass(frozen=True, slots=True)
class Usability:
    """How much noise there is where, over the signal at full clip; `over_the_run` is what averages out by its end."""

    where: str
    noise_to_signal: float
    over_the_run: float | None
    verdict: str


def calibrated(config: RunConfig, *, size: int, scale_of: ScaleOf) -> RunConfig:
    """`config` with the smallest noise multiplier whose whole run fits `dp-epsilon`, to 5 digits, rounded up.

    With `wire="dp"` both multipliers, and they are the same. Raises ConfigError where no noise is enough.
    """
    from dp_accounting import GaussianDpEvent, LowerEndpointAndGuess, calibrate_dp_mechanism
    from dp_accounting.mechanism_calibration import NoBracketIntervalFoundError

    def worst(multiplier: float) -> float:
        noised = with_noise(config, multiplier)
        found = expected_spend(noised, scale=scale_of(noised), size=size).values()
        return min(max(found), _INFEASIBLE)

    if worst(_LEAST) <= config.dp_epsilon:
        return with_noise(config, _LEAST)
    try:
        found = calibrate_dp_mechanism(
            _accountant_of(worst), GaussianDpEvent, config.dp_epsilon * (1.0 - _SLACK), config.dp_delta,
            LowerEndpointAndGuess(_LEAST, _GUESS), tol=1e-7,
        )  # fmt: skip
    except (NoBracketIntervalFoundError, ConfigError) as error:
        raise ConfigError(
            f"no noise that can be added keeps to epsilon {config.dp_epsilon:g} at delta {config.dp_delta:g}; they "
            "must be larger"
        ) from error
    return with_noise(config, float(_DIGITS.create_decimal(Decimal(float(found)))))


def with_noise(config: RunConfig, multiplier: float) -> RunConfig:
    """`config` with this noise multiplier on all its priced channels."""
    changed: dict[str, float] = {"dp-noise-multiplier": multiplier}
    if config.wire == "dp":
        changed["wire-noise-multiplier"] = multiplier
    return RunConfig.from_flower({**config.to_flower(), **changed})


def _accountant_of(worst: Callable[[float], float]) -> Callable[[], object]:
    """Accountants of dp-accounting, for its search, that answer `worst` of a Gaussian event's multiplier."""
    from dp_accounting import DpEvent, NeighboringRelation, PrivacyAccountant

    class PlanAccountant(PrivacyAccountant):  # type: ignore[misc]
        """Prices a whole plan by the filters' own rules; the event only carries the multiplier under trial."""

        def __init__(self) -> None:
            super().__init__(NeighboringRelation.ADD_OR_REMOVE_ONE)
            self._epsilon = 0.0

        def _maybe_compose(self, event: DpEvent, count: int, do_compose: bool) -> None:
            if do_compose:
                self._epsilon = worst(event.noise_multiplier)

        def get_epsilon(self, target_delta: float) -> float:
            return self._epsilon

    return PlanAccountant


def pld_epsilon(config: RunConfig, adversary: Adversary, *, scale: float | None, size: int) -> float | None:
    """What privacy loss distributions make of the same plan, if it is fixed beforehand; a report, never a filter.

    None where the adversary sees nothing priced, or a Skellam sum, which dp-accounting has no distribution for.
    """
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    seen = False
    for release in round_releases(config, scale=scale, size=size):
        found = price(release, adversary)
        if found is None:
            continue
        seen = True
        if isinstance(found.renyi, SampledGaussian):
            gaussian = GaussianDpEvent(found.renyi.noise_multiplier)
            event, times = PoissonSampledDpEvent(found.renyi.sampling_rate, gaussian), found.renyi.releases
        elif found.renyi is None:
            event, times = GaussianDpEvent(1.0 / math.sqrt(found.gaussian)), 1
        else:
            return None
        accountant.compose(event, times * config.num_rounds)
    return float(accountant.get_epsilon(config.dp_delta)) if seen else None


def pld_epsilons(config: RunConfig, *, scale: float | None, size: int) -> dict[Adversary, float | None]:
    """`pld_epsilon` for every adversary."""
    return {adversary: pld_epsilon(config, adversary, scale=scale, size=size) for adversary in ADVERSARIES}


def usability(config: RunConfig, *, size: int, clients: int, fewest: int, rows: int) -> tuple[Usability, ...]:
    """How noisy a run over `clients` that trains `size` values is: of the adapter and, where it is noised, of the wire.

    Signal is what clips let pass where everybody's contribution agrees: the most there can be. `fewest` honest clients
    carry the whole noise at client level, so that more of them add more; `rows` is a client's, at example level.
    """
    found = (
        [_of_clients(config, size, clients, fewest)]
        if config.dp == "client"
        else [_of_rows(config, size, clients, rows)]
    )
    if config.wire == "dp":
        found.append(_of_tokens(config))
    return tuple(found)


def _of_clients(config: RunConfig, size: int, clients: int, fewest: int) -> Usability:
    ratio = config.dp_noise_multiplier * math.sqrt(size) / clients * math.sqrt(clients / fewest)
    over_the_run = ratio / math.sqrt(config.num_rounds)
    help_by = "more clients, fewer trained values (lora-r, target-modules) or a larger epsilon"
    return Usability("a round's average", ratio, over_the_run, _adapter_verdict(over_the_run, help_by))


def _of_rows(config: RunConfig, size: int, clients: int, rows: int) -> Usability:
    ratio = config.dp_noise_multiplier * math.sqrt(size) / (config.dp_sample_rate * rows)
    over_the_run = ratio / math.sqrt(config.num_rounds * config.local_steps * clients)
    help_by = "more rows a step, fewer trained values (lora-r, target-modules) or a larger epsilon"
    return Usability("a step's gradient at a client", ratio, over_the_run, _adapter_verdict(over_the_run, help_by))


def _of_tokens(config: RunConfig) -> Usability:
    """The noise in a token's own direction, over the token's part of a row of `max-length` at full clip."""
    ratio = config.wire_noise_multiplier * math.sqrt(config.max_length)
    told = f"the trunk gets each token's signal under {ratio:.3g} times as much noise"
    if ratio <= WIRE_USABLE:
        verdict = f"usable: {told}"
    elif ratio <= WIRE_USELESS:
        verdict = f"doubtful: {told}; it may do for classifying rows, and hardly for learning to write"
    else:
        verdict = f"useless for learning to write: {told}"
    return Usability("a token on the wire", ratio, None, verdict)


def _adapter_verdict(over_the_run: float, help_by: str) -> str:
    told = f"in the whole run's change of the adapter noise is {over_the_run:.2g} times the most that signal can be"
    if over_the_run <= USABLE:
        return f"usable: {told}"
    if over_the_run <= USELESS:
        return f"doubtful: {told}; hold its loss against that of a run without"
    return f"useless: {told}; what helps is {help_by}"
