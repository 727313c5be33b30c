"""Linear inversion of smashed data: which token each hidden state looks like, by itself.

The attacker sends public text through the base head and the same mechanism, fits hidden state on token embedding, and
asks of each state that it is sent under which token it is likeliest (a linear form of He, Zhang and Lee, "Model
Inversion Attacks Against Collaborative Inference", ACSAC 2019). Where public text lacks tokens, the
attacker puts them in (clients/audits/public_text.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clients.audits.channel import Channel
from clients.audits.tap import Singles
from clients.data import TokenRow
from privacy.audits.linear import Whitening, fit_linear, log_likelihoods

Floats = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int64]

_PULLS = (1.0, 1e9)
"""How many sightings of a token the linear fit counts for; the last trusts the fit alone."""
_PRIOR_WEIGHTS = (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class TokenReader:
    """Log likelihood of each token given a hidden state; `prior_weight` times log odds of tokens is added to guess."""

    whitening: Whitening
    means_VD: Floats
    prior_weight: float = 0.0

    def log_likelihoods(self, hidden_ND: Floats) -> Floats:
        """[N, V], up to a constant for each state. `hidden_ND` as the channel gives them once it is undone."""
        return log_likelihoods(self.whitening.apply(hidden_ND), self.means_VD)

    def guess(self, hidden_ND: Floats, odds_V: Floats) -> Tokens:
        scores_NV = self.log_likelihoods(hidden_ND)
        return np.asarray((scores_NV + self.prior_weight * odds_V).argmax(axis=1))


@dataclass(frozen=True, slots=True)
class HiddenSamples:
    """An attacker's own tokens with their hidden states: as sent, the channel undone, and in clear."""

    tokens_N: Tokens
    sent_ND: Floats
    clear_ND: Floats


def samples(rows: Sequence[TokenRow], states: Sequence[tuple[Singles, Singles]], channel: Channel) -> HiddenSamples:
    """`states` are each row's hidden states as sent and in clear, [T, D]."""
    return HiddenSamples(
        np.concatenate([row.tokens_T for row in rows]),
        np.concatenate([channel.undone(sent_TD, len(sent_TD)) for sent_TD, _ in states]),
        np.concatenate([clear_TD for _, clear_TD in states]).astype(np.float64),
    )


def best_reader(
    fitted: HiddenSamples, judged: HiddenSamples, channel: Channel, embedding_VC: Floats, odds_V: Floats
) -> TokenReader:
    """The reader that recovers most tokens of `judged`, of those fitted to `fitted`; both are the attacker's own.

    Some are fitted to what came through the mechanism, others to what went in, with the channel's noise on top: under
    much noise the second is the better.
    """

    def recovered(reader: TokenReader) -> int:
        return int((reader.guess(judged.sent_ND, odds_V) == judged.tokens_N).sum())

    return max(_readers(fitted, channel, embedding_VC), key=recovered)


def _readers(fitted: HiddenSamples, channel: Channel, embedding_VC: Floats) -> Iterator[TokenReader]:
    views = [(fitted.clear_ND, np.diag(channel.noise_D))]
    if channel.noise_D.any():
        views.append((fitted.sent_ND, np.zeros_like(views[0][1])))
    for hidden_ND, noise_DD in views:
        for whitening, means_VD in _fits(fitted.tokens_N, hidden_ND, embedding_VC, noise_DD):
            for weight in _PRIOR_WEIGHTS:
                yield TokenReader(whitening, means_VD, weight)


def _fits(
    tokens_N: Tokens, hidden_ND: Floats, embedding_VC: Floats, noise_DD: Floats
) -> Iterator[tuple[Whitening, Floats]]:
    """What each token looks like in the mean, whitened: where it was seen seldom, by the linear fit."""
    by_fit_VD = fit_linear(embedding_VC[tokens_N], hidden_ND).means(embedding_VC)
    sums_VD = np.zeros_like(by_fit_VD)
    np.add.at(sums_VD, tokens_N, hidden_ND)
    counts_V = np.bincount(tokens_N, minlength=len(embedding_VC))[:, None]
    for pull in _PULLS:
        means_VD = (sums_VD + pull * by_fit_VD) / (counts_V + pull)
        rest_ND = hidden_ND - means_VD[tokens_N]
        whitening = Whitening.of(rest_ND.T @ rest_ND / len(rest_ND) + noise_DD)
        yield whitening, whitening.apply(means_VD)
