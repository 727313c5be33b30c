"""What may stand beside `deterministic`, under which a run that is resumed gives the bits of one that was not.

Nothing may then go by the clock, by who else is there, by ids that Flower draws, or by chance that nobody can repeat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from contract.addresses import trunk_addresses
from contract.errors import ConfigError

if TYPE_CHECKING:
    from contract.config import RunConfig


def check_deterministic(config: RunConfig) -> None:
    """Raise ConfigError that names the setting under which two runs could differ."""
    if not config.deterministic:
        return
    config.trunk_arithmetic.check_beside(config.codec, config.gradient_codec)
    if config.cohort_size:
        raise ConfigError(
            f"deterministic is true and cohort-size is {config.cohort_size}; a cohort is drawn from ids that Flower "
            "gives anew at each start: cohort-size must be 0, which asks every client"
        )
    if len(trunk_addresses(config.trunk_address)) > 1:
        raise ConfigError(
            f"deterministic is true and trunk-address is {config.trunk_address!r}; which client goes to which trunk "
            "depends on their load: name one trunk"
        )
    for key, value in (("dp", config.dp), ("wire", config.wire)):
        if value != "off":
            raise ConfigError(
                f"deterministic is true and {key} is {value}; its noise must be drawn anew each time: {key} must be off"
            )
