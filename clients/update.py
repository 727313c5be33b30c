"""What a round's training changed, and the ring elements that go into the round's sum for it."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from peft import PeftModel

from aggregation.dither import SecretDither
from aggregation.encoding import noisy_encoding
from aggregation.noisy_sum import NoisySum
from aggregation.ring import RingVector, plan
from contract import adapter
from contract.config import RunConfig
from contract.records import Factor
from privacy.skellam import SkellamShare, skellam_event
from privacy.stream import SecretStream

Vector = npt.NDArray[np.float64]
Entropy = Callable[[int], bytes]


def trained_vector(model: PeftModel, factor: Factor) -> Vector:
    """The client part's coordinates that this round trains, in sorted-name order; float64, so differences are exact."""
    tensors = adapter.adapter_parameters(model)
    return adapter.flatten(tensors, adapter.trainable_names(tensors, factor)).astype(np.float64)


def subtract_from(model: PeftModel, factor: Factor, before_d: Vector) -> None:
    """Turn the trained coordinates from before the round into their change, in place: after less before."""
    tensors = adapter.adapter_parameters(model)
    start = 0
    for name in adapter.trainable_names(tensors, factor):
        after = adapter.flatten(tensors, [name])
        part = before_d[start : start + after.size]
        np.subtract(after, part, out=part)
        start += after.size


def encode_update(
    update_d: Vector,
    trained_tokens: int,
    clients: int,
    config: RunConfig,
    threshold: int | None,
    entropy: Entropy = os.urandom,
) -> RingVector:
    """One client's update and weight for a sum over `clients`; `threshold` is the secure sum's, None for a plain one.

    Under `dp` every client weighs the same, and for `dp="client"` the update is clipped and carries its share of the
    noise before it is anything else. Raises UpdateError for an update that is not finite or too large.
    """
    if config.dp == "client" and threshold is not None:
        return _noised(update_d, noisy_encoding(config, clients, threshold), config, entropy)
    fixed_point = plan(clients, config.max_weight(), config.update_clip)
    weight = trained_tokens if config.dp == "off" else 1
    fixed_point.require_resolved(update_d, weight)
    plainly = threshold is None or config.deterministic
    return fixed_point.encode(update_d, weight, None if plainly else SecretDither(entropy))


def _noised(update_d: Vector, noisy: NoisySum, config: RunConfig, entropy: Entropy) -> RingVector:
    event = skellam_event(config.dp_noise_multiplier, config.dp_clip, noisy.scale, update_d.size)
    codes, _ = SkellamShare(event, noisy.fewest, SecretStream(entropy)).apply(update_d)
    return noisy.encode(codes)
