"""A linear Gaussian view of what crosses the wire: observed = cause x slope + offset + noise of one covariance.

Fitted in the direction in which the data came about, and turned round by Bayes' rule: for Gaussian noise that is what
ridge regression from the observed to the cause does, with the right weight on each direction and no shrinking to undo.
Pure numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_RIDGE = 1e-3
_JITTER = 1e-9


@dataclass(frozen=True, slots=True)
class LinearGaussian:
    """slope_CD from a cause of C values to an observation of D; covariance_DD of what it leaves unexplained."""

    slope_CD: Floats
    offset_D: Floats
    covariance_DD: Floats

    def means(self, causes_NC: Floats) -> Floats:
        """What each cause makes one expect, [N, D]."""
        return np.asarray(causes_NC @ self.slope_CD + self.offset_D)

    def with_covariance(self, covariance_DD: Floats) -> LinearGaussian:
        return replace(self, covariance_DD=covariance_DD)


def fit_linear(causes_NC: Floats, observed_ND: Floats) -> LinearGaussian:
    """Least squares with a small ridge (1e-3 of the causes' mean square), and the covariance of the residuals.

    Raises ValueError for fewer than two pairs.
    """
    if len(causes_NC) != len(observed_ND) or len(causes_NC) < 2:
        raise ValueError(f"{len(causes_NC)} causes and {len(observed_ND)} observations; two pairs at least are needed")
    cause_C, seen_D = causes_NC.mean(axis=0), observed_ND.mean(axis=0)
    centred_NC = causes_NC - cause_C
    gram_CC = centred_NC.T @ centred_NC
    ridge = _RIDGE * np.trace(gram_CC) / len(gram_CC) / len(causes_NC) + np.finfo(np.float64).tiny
    slope_CD = np.linalg.solve(gram_CC + ridge * np.eye(len(gram_CC)), centred_NC.T @ (observed_ND - seen_D))
    rest_ND = observed_ND - seen_D - centred_NC @ slope_CD
    return LinearGaussian(slope_CD, seen_D - cause_C @ slope_CD, rest_ND.T @ rest_ND / len(rest_ND))


@dataclass(frozen=True, slots=True)
class Whitening:
    """Turns vectors so that the noise has covariance one: distances there are log likelihoods."""

    turn_DD: Floats

    @classmethod
    def of(cls, covariance_DD: Floats) -> Whitening:
        size = len(covariance_DD)
        floor = _JITTER * max(np.trace(covariance_DD) / size, np.finfo(np.float64).tiny)
        values, vectors = np.linalg.eigh(covariance_DD)
        return cls(vectors / np.sqrt(np.maximum(values, floor)))

    def apply(self, vectors_ND: Floats) -> Floats:
        return np.asarray(vectors_ND @ self.turn_DD)


def log_likelihoods(observed_ND: Floats, means_VD: Floats) -> Floats:
    """[N, V]: how likely each whitened observation is under each whitened class mean, up to a constant per N."""
    return np.asarray(observed_ND @ means_VD.T - 0.5 * np.square(means_VD).sum(axis=1))
