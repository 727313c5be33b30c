"""What stands between this site's model and the wire, as a run's settings say."""

from __future__ import annotations

import os

from contract.config import RunConfig
from privacy.stream import SecretStream
from privacy.wire import Empirical, Off, WireDp, WireMechanism


def wire_mechanism(config: RunConfig) -> WireMechanism:
    """A mechanism for one round: it counts how often each row was sent in it."""
    if config.wire == "off":
        return Off()
    stream = SecretStream(os.urandom)
    if config.wire == "empirical":
        return Empirical(config.wire_noise, config.gradient_mask, config.gradient_mask_keep, stream)
    return WireDp(
        config.wire_clip_forward,
        config.wire_clip_backward,
        config.wire_noise_multiplier,
        config.wire_releases,
        stream,
    )
