"""Learned label inference: which token came next, from the gradient at the tail cut.

Behind the tail the loss's gradient is the output embedding that the model expects less the true label's. The attacker
computes what the model expects, and learns on public text how the tail turns that difference into what crosses the cut
(after Li et al., "Label Leakage and Protection in Two-party Split Learning", ICLR 2022, whose attack is for two
classes). In the scene `alone` it knows what crossed, nothing else. In the scene `prefix known` it is told the true
tokens before each label, as of a prompt that is public: then the guesser is the base model, told the same, which is
far stronger than any that is not; what is left above it came out of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clients.audits.channel import Channel, gradients
from clients.audits.tap import Crossed
from clients.data import IGNORED
from privacy.audits.linear import LinearGaussian, Whitening, fit_linear, log_likelihoods

Floats = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int64]
Odds = Sequence[npt.NDArray[np.floating]]
"""Log probabilities of what follows each token, [T, V] for each row."""

_WEIGHTS = (0.0, 0.1, 0.3, 1.0)
"""What the gradient's log likelihood may count for beside the prior: 1 by Bayes' rule, less where the fit is wrong."""


@dataclass(frozen=True, slots=True)
class LabelReader:
    """Log likelihood of each label given the gradient of its place and what the model expected there."""

    linear: LinearGaussian
    whitening: Whitening
    means_VD: Floats
    weight: float = 1.0

    @classmethod
    def of(cls, linear: LinearGaussian, output_VD: Floats) -> LabelReader:
        whitening = Whitening.of(linear.covariance_DD)
        return cls(linear, whitening, whitening.apply(output_VD @ linear.slope_CD))

    def log_likelihoods(self, gradient_ND: Floats, expected_ND: Floats) -> Floats:
        """[N, V], up to a constant for each place."""
        left_ND = gradient_ND - self.linear.offset_D + expected_ND @ self.linear.slope_CD
        return log_likelihoods(self.whitening.apply(left_ND), self.means_VD)

    def guess(self, one: Crossed, channel: Channel, odds_TV: npt.NDArray[np.floating]) -> Tokens:
        """The label after each token but the last, whether it counts or not."""
        gradient_ND = channel.undone(one.gradient_TD, one.targets)[:-1] * one.targets
        scores_NV = self.log_likelihoods(gradient_ND, one.expected_TD[:-1].astype(np.float64))
        return np.asarray((self.weight * scores_NV + odds_TV[:-1]).argmax(axis=1))


def label_readers(simulated: Sequence[Crossed], channel: Channel, output_VD: Floats) -> list[LabelReader]:
    """Fitted to the attacker's own gradients, before the mechanism with its noise on top, and after it."""
    causes_ND = np.concatenate([_differences(one, output_VD) for one in simulated])
    clear_ND = np.concatenate([_counted_gradient(one, gradients(one)[1]) for one in simulated])
    noise_D = channel.noise_D * np.mean([one.targets**2 for one in simulated])
    clear = fit_linear(causes_ND, clear_ND)
    readers = [LabelReader.of(clear.with_covariance(clear.covariance_DD + np.diag(noise_D)), output_VD)]
    if channel.noise_D.any():
        undone = [channel.undone(one.gradient_TD, one.targets) for one in simulated]
        sent_ND = np.concatenate([_counted_gradient(one, grad) for one, grad in zip(simulated, undone, strict=True)])
        readers.append(LabelReader.of(fit_linear(causes_ND, sent_ND), output_VD))
    return readers


def best_reader(
    readers: Sequence[LabelReader], judged: Sequence[Crossed], channel: Channel, priors: Sequence[Odds]
) -> tuple[LabelReader, int]:
    """The weighed reader and the prior (its place) that find most labels of `judged`, the attacker's own rows."""
    weighed = [
        LabelReader(reader.linear, reader.whitening, reader.means_VD, weight)
        for reader in readers
        for weight in _WEIGHTS
    ]
    choices = [(reader, place) for reader in weighed for place in range(len(priors))]
    return max(choices, key=lambda choice: sum(label_hits(judged, choice[0], channel, priors[choice[1]])))


def label_hits(crossed: Sequence[Crossed], reader: LabelReader, channel: Channel, odds: Odds) -> list[int]:
    """How many of each row's labels that count are found."""
    return [right_labels(one, reader.guess(one, channel, odds_TV)) for one, odds_TV in zip(crossed, odds, strict=True)]


def right_labels(one: Crossed, guesses_N: Tokens) -> int:
    """How many of the labels that count `guesses_N`, one after each token but the last, has right."""
    counted_N = _counted(one)
    return int((guesses_N[counted_N] == one.row.labels_T[1:][counted_N]).sum())


def _counted(one: Crossed) -> npt.NDArray[np.bool_]:
    return np.asarray(one.row.labels_T[1:] != IGNORED)


def _counted_gradient(one: Crossed, gradient_TD: npt.NDArray[np.floating]) -> Floats:
    """Where labels count, of the sum of their losses: that of the mean falls with the row's length."""
    return np.asarray(gradient_TD[:-1][_counted(one)].astype(np.float64) * one.targets)


def _differences(one: Crossed, output_VD: Floats) -> Floats:
    """The true label's output embedding less the expected one, where labels count, [N, D]."""
    counted_N = _counted(one)
    return np.asarray(output_VD[one.row.labels_T[1:][counted_N]] - one.expected_TD[:-1][counted_N])
