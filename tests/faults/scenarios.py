"""What the fault matrix plays, by name: who is killed, in a run of which settings, over whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from contract.config import ConfigValue

Party = Literal["orchestrator", "trunk", "site"]

_SECURE: Mapping[str, ConfigValue] = {"secagg": "on", "num_rounds": 2}
_CLIENT_LEVEL: Mapping[str, ConfigValue] = {
    **_SECURE,
    "dp": "client",
    "trunk_adapter": "frozen",
    "metrics": "off",
    "dp_noise_multiplier": 4.0,
}
_SMALL: Mapping[str, ConfigValue] = {"threads": 1, "local_steps": 1, "target_modules": "q_proj"}
"""Of real sites, which train for real."""
_TRAINED: Mapping[str, ConfigValue] = {
    **_SMALL,
    "deterministic": True,
    "num_rounds": 2,
    "eval_fraction": 0.0,
    "per_device_train_batch_size": 2,
    "trunk_wait_s": 60.0,
}
_TWO_OF_THREE: Mapping[str, ConfigValue] = {"secagg": "on", "quorum": 2, "secagg_threshold": 2}
"""So that a round goes on without one of three."""


@dataclass(frozen=True)
class Scenario:
    """`party` is killed. `sites` are real ones, 0 for three whose training is arithmetic.

    A trunk that is `cramped` has memory for next to nothing, and so keeps requests and idle adapters on disk. With
    `again` a message whose process was killed is delivered to the site once more; without, the orchestrator is told of
    its death, as Flower does.
    """

    party: Party
    settings: Mapping[str, ConfigValue]
    sites: int = 0
    cramped: bool = False
    again: bool = False


SCENARIOS: Mapping[str, Scenario] = {
    "plain": Scenario("orchestrator", {"secagg": "off", "num_rounds": 2, "deterministic": True}),
    "secure": Scenario("orchestrator", {**_SECURE, "deterministic": True}),
    "private": Scenario("orchestrator", _CLIENT_LEVEL),
    "trunk": Scenario("trunk", {**_TRAINED, "secagg": "on", "quorum": 2, "local_steps": 2}, sites=2),
    "trunk-plain": Scenario(
        "trunk",
        {**_TRAINED, "secagg": "off", "quorum": 2, "gradient_accumulation_steps": 3},
        sites=2,
        cramped=True,
    ),
    "site": Scenario("site", {**_TRAINED, **_TWO_OF_THREE}, sites=3),
    "site-again": Scenario("site", {**_TRAINED, **_TWO_OF_THREE}, sites=3, again=True),
    "site-private": Scenario("site", {**_CLIENT_LEVEL, **_TWO_OF_THREE, **_SMALL}, sites=3),
}
"""Under client-level privacy noise is drawn anew in each attempt, so that no two runs have equal adapters."""
