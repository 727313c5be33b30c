"""The two-point audit of every mechanism that a run's settings name, through the calls that its clients make.

Each output is one whole release with fresh noise, told apart by its product with the direction in which the two inputs
differ, which is the best test there is against Gaussian noise. What comes after the mechanism (the codec, the ring) is
handed in, for it lies in packages that this one does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from contract.config import RunConfig
from contract.errors import ConfigError
from contract.privacy_records import Channel, PrivacyEvent
from privacy.audits.two_point import audit_gaussian
from privacy.gaussian import GaussianSum
from privacy.gaussian_curve import gaussian_epsilon, gaussian_mu_squared
from privacy.skellam import Codes, SkellamShare, rounded_norm_bound2, skellam_event
from privacy.stream import Floats, SecretStream
from privacy.wire import Singles, WireDp

Scores = tuple[Floats, Floats]
"""Without the unit and with it (or with another in its place), each of shape (outputs,)."""

OUTPUTS = 20_000
_ROWS, _TOKENS = 64, 8
_OVERSHOOT = 3.0
"""How much longer than its clip an input is, so that the clipping is audited too."""


@dataclass(frozen=True, slots=True)
class AuditedMechanism:
    """What one release of a unit promises at the run's delta, and what it costs at least as the audit found, at 95 %.

    For a Skellam sum the promise is that of Gaussian noise of its variance; the ledger charges a little more.
    """

    channel: Channel
    mechanism: str
    outputs: int
    epsilon_claimed: float
    epsilon_lower: float

    @property
    def holds(self) -> bool:
        return self.epsilon_lower <= self.epsilon_claimed


@dataclass(frozen=True, slots=True)
class Passage:
    """What a release passes after its mechanism, there and back again: the wire's codec for activations [B, T, D], and
    the ring of a noisy sum at `scale` steps per unit for one client's codes (d,).

    The audited share is all of the noise, so that the noisy sum must have been planned for a `fewest` of 1.
    """

    codec: Callable[[Singles], Singles]
    ring: Callable[[Codes], Codes]
    scale: float


def audit_mechanisms(
    config: RunConfig, passage: Passage, stream: SecretStream, *, size: int, outputs: int = OUTPUTS
) -> tuple[AuditedMechanism, ...]:
    """One result at 95 % for each mechanism with a price that `config` names; none for a run without.

    `size` is the number of values in a release, of which a multiple of 8 is taken. A promise below an epsilon of about
    2 takes more than 20,000 outputs to be tested sharply. Raises ConfigError for a size below 8, and what the
    mechanisms raise for their settings.
    """
    if size < _TOKENS:
        raise ConfigError(f"an audit's size is {size}; it must be at least {_TOKENS}")
    direction_d = unit_direction(stream, size // _TOKENS * _TOKENS)
    return tuple(
        AuditedMechanism(
            channel,
            event.mechanism,
            outputs,
            gaussian_epsilon(mu_squared, config.dp_delta),
            audit_gaussian(*scores, config.dp_delta),
        )
        for channel, event, mu_squared, scores in _releases(config, passage, stream, direction_d, outputs)
    )


def _releases(
    config: RunConfig, passage: Passage, stream: SecretStream, direction_d: Floats, outputs: int
) -> Iterator[tuple[Channel, PrivacyEvent, Fraction, Scores]]:
    """Each mechanism's channel, its event, mu^2 of one release, and what its outputs score."""
    clip, noise_multiplier = config.dp_clip, config.dp_noise_multiplier
    if config.dp == "client":
        event = skellam_event(noise_multiplier, clip, passage.scale, direction_d.size)
        share = SkellamShare(event, 1, stream)
        yield "adapter_sum", event, skellam_mu_squared(event), share_scores(share, passage.ring, direction_d, outputs)
    if config.dp == "example":
        mechanism = GaussianSum(clip, noise_multiplier, stream)
        scores = sum_scores(mechanism, clip, direction_d, outputs)
        yield "adapter_sum", mechanism.event, gaussian_mu_squared(noise_multiplier, 1, 1), scores
    if config.wire == "dp":
        wire = WireDp(config.wire_clip_forward, config.wire_clip_backward, config.wire_noise_multiplier, 1, stream)
        for channel, event in wire.events.items():
            scores = wire_scores(wire, channel, passage.codec, direction_d, outputs)
            yield channel, event, gaussian_mu_squared(config.wire_noise_multiplier, 2, 1), scores


def skellam_mu_squared(event: PrivacyEvent) -> Fraction:
    """mu^2 of Gaussian noise of a Skellam event's variance on what its rounding lets pass."""
    steps = event.number("scale") * event.number("clip")
    bound2 = rounded_norm_bound2(
        event.number("scale"), event.number("clip"), int(event.number("size")), event.number("rounding_bias")
    )
    return Fraction(bound2) / Fraction(event.number("noise_multiplier") * steps) ** 2


def unit_direction(stream: SecretStream, size: int) -> Floats:
    """A vector of norm 1 in any direction, float64 of shape (size,)."""
    direction_d = stream.standard_normal(size)
    unit_d: Floats = direction_d / np.linalg.norm(direction_d)
    return unit_d


def share_scores(share: SkellamShare, ring: Callable[[Codes], Codes], direction_d: Floats, outputs: int) -> Scores:
    """Of a client whose update is zero, and one whose update is longer than the clip; zero-out neighbours."""
    update_d = _OVERSHOOT * share.event.number("clip") * direction_d

    def scores(sent_d: Floats) -> Floats:
        return np.array([ring(share.apply(sent_d)[0]) @ direction_d for _ in range(outputs)])

    return scores(np.zeros_like(update_d)), scores(update_d)


def sum_scores(mechanism: GaussianSum, clip: float, direction_d: Floats, outputs: int) -> Scores:
    """Of a sum without one row's gradient and with it, at the clip, among others; zero-out neighbours."""
    others_d = _OVERSHOOT * clip * np.roll(direction_d, 1)

    def scores(total_d: Floats) -> Floats:
        return np.array([mechanism.apply(total_d)[0] @ direction_d for _ in range(outputs)])

    return scores(others_d), scores(others_d + clip * direction_d)


def wire_scores(
    mechanism: WireDp, channel: Channel, codec: Callable[[Singles], Singles], direction_d: Floats, outputs: int
) -> Scores:
    """Of rows that point one way and rows that point the other, longer than the clip; neighbours by replacement."""
    one_way = mechanism.forward if channel == "wire_forward" else mechanism.backward
    row_TD = _OVERSHOOT * mechanism.events[channel].number("clip") * direction_d.reshape(_TOKENS, -1)

    def scores(values_TD: Floats, first: int) -> Floats:
        batch_BTD = np.repeat(values_TD[np.newaxis].astype(np.float32), _ROWS, axis=0)
        found = []
        for start in range(first, first + outputs, _ROWS):
            rows = range(start, min(start + _ROWS, first + outputs))
            released_BTD = codec(one_way(batch_BTD[: len(rows)], rows))
            found.append(released_BTD.reshape(len(rows), -1) @ direction_d)
        return np.concatenate(found)

    return scores(-row_TD, 0), scores(row_TD, outputs)
