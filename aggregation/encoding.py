"""How a run's updates become elements of a ring: weighted fixed point, or codes that carry their noise already."""

from __future__ import annotations

from aggregation.noisy_sum import NoisySum, plan_noisy_sum
from aggregation.ring import FixedPoint, plan
from contract.config import RunConfig
from contract.errors import ConfigError


def fewest_honest(config: RunConfig, threshold: int) -> int:
    """How many of the smallest allowed set of survivors keep their noise to themselves.

    Raises ConfigError where it is none: nobody's noise would hide anybody.
    """
    fewest = threshold - config.dp_colluders
    if fewest < 1:
        raise ConfigError(
            f"dp-colluders is {config.dp_colluders}, but the sum may end with {threshold} clients (secagg-threshold), "
            f"whose noise would all be known: dp-colluders must be at most {threshold - 1}"
        )
    return fewest


def noisy_encoding(config: RunConfig, clients: int, threshold: int) -> NoisySum:
    """The encoding of a session over `clients` whose updates carry noise shares; every party computes the same one."""
    fewest = fewest_honest(config, threshold)
    return plan_noisy_sum(clients, fewest, config.dp_clip, config.dp_noise_multiplier)


def noise_scale(config: RunConfig, clients: int, threshold: int) -> float | None:
    """The steps per unit of a noisy sum over `clients`, which its price depends on; None in a run without one."""
    return noisy_encoding(config, clients, threshold).scale if config.dp == "client" else None


def encoding(config: RunConfig, clients: int, threshold: int) -> FixedPoint | NoisySum:
    """The encoding of a session over `clients` with this threshold. Raises ConfigError for impossible numbers."""
    if config.dp == "client":
        return noisy_encoding(config, clients, threshold)
    return plan(clients, config.max_weight(), config.update_clip)
