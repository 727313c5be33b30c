"""Which of a run's privacy settings may stand together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contract.errors import ConfigError
from contract.records import DELTA_CODEC

if TYPE_CHECKING:
    from contract.config import RunConfig


def check_privacy(config: RunConfig) -> None:
    """Raise ConfigError for a mode whose price would not cover what it releases."""
    if config.dp != "off":
        _check_dp(config)
    if config.wire == "dp" and (config.dp != "example" or config.metrics != "off"):
        raise ConfigError(
            f"wire is dp while dp is {config.dp} and metrics is {config.metrics}; a row's noised activations are "
            "priced, but what head and tail learn from it would carry it into every later row, and judging sends "
            "rows again: wire=dp needs dp=example and metrics=off"
        )
    if config.wire == "empirical" and not config.wire_noise and config.gradient_mask == "none":
        raise ConfigError("wire is empirical, but wire-noise is 0 and gradient-mask is none: set one of them")
    if config.wire != "off" and config.codec == DELTA_CODEC:
        raise ConfigError(
            f"codec is {DELTA_CODEC} and wire is {config.wire}; the noise is drawn anew each time a row is sent, so "
            "that a difference is no smaller than the row: name another codec"
        )
    if config.wire_length_bucket > config.max_length:
        raise ConfigError(
            f"wire-length-bucket is {config.wire_length_bucket}; it must be at most max-length, {config.max_length}"
        )


def _check_dp(config: RunConfig) -> None:
    if config.secagg == "off":
        raise ConfigError(f"dp is {config.dp} and secagg is off; it needs the secure sum: secagg must be on")
    if config.trunk_adapter == "trained" and config.wire != "dp":
        raise ConfigError(
            f"dp is {config.dp} and trunk-adapter is trained; the trunk's half would be learned from unpriced "
            "gradients and released: trunk-adapter must be frozen, or wire must be dp"
        )
    if config.early_stopping_patience:
        raise ConfigError(
            f"early-stopping-patience is {config.early_stopping_patience} and dp is {config.dp}; when the run ends "
            "would tell of losses that nothing prices: early-stopping-patience must be 0"
        )
    if config.dp == "example" and not config.local_steps:
        raise ConfigError("dp is example and local-steps is 0; DP-SGD counts steps: local-steps must be at least 1")
    if config.dp == "example" and config.dtype == "bfloat16":
        raise ConfigError(
            "dp is example and dtype is bfloat16; rows' gradients in bfloat16 are too coarse for their norms, and "
            "so for what they are cut to, to be trusted: dtype must be float32"
        )
