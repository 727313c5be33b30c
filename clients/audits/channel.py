"""What the wire does to values, as an attacker who knows the settings reckons with it: a gain by length, and noise.

The attacker measures both on text of its own, which it sends through the same mechanism.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clients.audits.tap import Clear, Crossed
from contract.config import RunConfig

Singles = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Channel:
    """A row of `size` tokens arrives times `gain(size)`, plus noise; `noise_D` is its variance once that is undone.

    A row's norm before clipping is taken to be `scale` x size^`power`; `clip` is infinite where nothing is clipped.
    `farthest` is the largest squared distance that the noise alone ever put between a token's vector and its own.
    """

    clip: float
    scale: float
    power: float
    noise_D: Floats
    mean_square: float
    farthest: float

    def gain(self, size: int) -> float:
        return _gain(self.clip, self.scale * size**self.power)

    def undone(self, values_TD: Singles, size: int) -> Floats:
        """What came of a row, as large as it was before clipping."""
        return np.asarray(values_TD.astype(np.float64) / self.gain(size))


def forward_channel(simulated: Sequence[Crossed], config: RunConfig) -> Channel:
    """The way of hidden states through the head cut; a row's norm grows with the root of its length."""
    triples = [(*hidden_states(one), len(one.hidden_TD)) for one in simulated]
    return _measure(triples, config.wire_clip_forward if config.wire == "dp" else np.inf, 0.5)


def backward_channel(simulated: Sequence[Crossed], config: RunConfig) -> Channel:
    """The way of gradients through the tail cut: of a mean over the targets, so that a row's norm falls with them."""
    triples = [(*gradients(one), one.targets) for one in simulated]
    return _measure(triples, config.wire_clip_backward if config.wire == "dp" else np.inf, -0.5)


def hidden_states(one: Crossed) -> tuple[Singles, Singles]:
    """A simulated row's hidden states as sent and in clear, [T, D]."""
    return one.hidden_TD, _clear(one).hidden_TD


def gradients(one: Crossed) -> tuple[Singles, Singles]:
    """A simulated row's gradient as sent and in clear, [T, D]."""
    return one.gradient_TD, _clear(one).gradient_TD


def _clear(one: Crossed) -> Clear:
    if one.clear is None:
        raise ValueError("an attacker has no clear values of rows that are not its own")
    return one.clear


def _gain(clip: float, norm: float) -> float:
    return min(1.0, clip / norm)


def _measure(triples: Sequence[tuple[Singles, Singles, int]], clip: float, power: float) -> Channel:
    norms = [float(np.linalg.norm(clear_TD.astype(np.float64))) / size**power for _, clear_TD, size in triples]
    scale = max(float(np.mean(norms)), float(np.finfo(np.float32).tiny))
    gains = [_gain(clip, scale * size**power) for _, _, size in triples]
    off_ND = np.concatenate([sent / gain - clear for (sent, clear, _), gain in zip(triples, gains, strict=True)])
    squares_ND = np.square(off_ND, dtype=np.float64)
    clear_square = float(np.mean([np.square(clear, dtype=np.float64).mean() for _, clear, _ in triples]))
    return Channel(clip, scale, power, squares_ND.mean(axis=0), clear_square, float(squares_ND.sum(axis=1).max()))
