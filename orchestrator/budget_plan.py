"""What `budget plan` answers: the noise that a run's settings need, what it comes to, and whether it is of use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aggregation.encoding import noise_scale
from contract.config import ConfigValue, RunConfig
from contract.privacy_records import Adversary
from orchestrator.secure_session import session_graph
from privacy.calibration import Usability, calibrated, pld_epsilons, usability
from privacy.coverage import IN_WORDS, withheld
from privacy.plan import expected_spend, register_budget


@dataclass(frozen=True, slots=True)
class Planned:
    """The answer. `epsilon` is what the filters will have counted after the last round, against each adversary."""

    noise_multiplier: float
    wire_noise_multiplier: float | None
    order: float
    epsilon: Mapping[Adversary, float]
    pld: Mapping[Adversary, float]
    unprotected: Mapping[Adversary, str]
    usability: tuple[Usability, ...]
    settings: Mapping[str, ConfigValue]

    def for_people(self) -> dict[str, object]:
        """The same as one table: a line for each number, and the verdicts in words."""
        lines: dict[str, object] = {"dp-noise-multiplier": f"{self.noise_multiplier:g}"}
        if self.wire_noise_multiplier is not None:
            lines["wire-noise-multiplier"] = f"{self.wire_noise_multiplier:g}"
        for adversary, words in IN_WORDS.items():
            if adversary in self.epsilon:
                told = f"epsilon {self.epsilon[adversary]:.4g}"
                if adversary in self.pld:
                    told += f" (pld {self.pld[adversary]:.4g})"
                lines[f"against {words}"] = told
            elif adversary in self.unprotected:
                lines[f"against {words}"] = f"no epsilon: {self.unprotected[adversary]}"
        for one in self.usability:
            lines[f"noise to signal: {one.where}"] = one.noise_to_signal
            lines[f"of use: {one.where}"] = one.verdict
        lines["settings"] = " ".join(f"{key}={_shown(value)}" for key, value in self.settings.items())
        return lines


def planned(values: Mapping[str, ConfigValue], *, clients: int, size: int, rows: int) -> Planned:
    """The plan of a run with these settings (kebab-case) over `clients`.

    Raises ConfigError for settings that cannot be, and for a budget that no noise keeps to.
    """
    asked = RunConfig.from_flower(values)
    needed = session_graph(asked, clients).threshold
    config = calibrated(asked, size=size, scale_of=lambda tried: noise_scale(tried, clients, needed))
    scale = noise_scale(config, clients, needed)
    pld = pld_epsilons(config, scale=scale, size=size)
    wired = config.wire == "dp"
    settings = {**values, "dp-noise-multiplier": config.dp_noise_multiplier}
    if wired:
        settings["wire-noise-multiplier"] = config.wire_noise_multiplier
    return Planned(
        noise_multiplier=config.dp_noise_multiplier,
        wire_noise_multiplier=config.wire_noise_multiplier if wired else None,
        order=register_budget(config).order,
        epsilon=expected_spend(config, scale=scale, size=size),
        pld={adversary: found for adversary, found in pld.items() if found is not None},
        unprotected={name: why for name in IN_WORDS if (why := withheld(config, name)) is not None},
        usability=usability(config, size=size, clients=clients, fewest=max(1, needed - config.dp_colluders), rows=rows),
        settings=_needed(config, settings),
    )


def _needed(config: RunConfig, settings: Mapping[str, ConfigValue]) -> dict[str, ConfigValue]:
    """Those settings that a run of this plan must have; the others do not bear on its level or its wire."""
    other = {"dp-sample-rate"} if config.dp == "client" else {"dp-colluders", "secagg-threshold"}
    if config.dp == "client":
        other |= {"local-steps"}
    if config.wire != "dp":
        other |= {"wire-releases"}
    return {key: value for key, value in settings.items() if key not in other | {"max-length"}}


def _shown(value: ConfigValue) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
