"""Causal enumeration of smashed data: try tokens one by one, and keep the one whose hidden state is nearest.

A causal model's state at a position depends on the tokens up to there alone, so that an attacker who knows the head
goes from left to right, each time with the prefix that it has found (docs/privacy.md has it in fifteen lines). Linear
inversion shortlists what to try; where none of that is as near as noise leaves the true token, all tokens are tried.

With a prior, log odds of tokens are added to the Gaussian log likelihood of the noisy state: how often tokens occur, or
what the base model expects after the prefix found so far. That is the best guess there is of one token by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clients.audits.channel import Channel
from clients.audits.inversion import TokenReader
from clients.audits.public_model import Prefix, PublicHead, PublicLanguageModel
from clients.audits.tap import Crossed, batches_of_one_length

Prior = Literal["none", "frequency", "model"]
Tokens = npt.NDArray[np.int64]

_SHORTLIST = 64
_AT_ONCE = 256
_ROUNDING = 32
"""Steps of the dtype by which a state may differ from itself when it is computed in another batch."""


@dataclass(frozen=True)
class Enumeration:
    """The attack with all that it knows; `eps` is the step of the model's dtype."""

    head: PublicHead
    model: PublicLanguageModel
    reader: TokenReader
    channel: Channel
    odds_V: npt.NDArray[np.float64]
    eps: float

    def recover(self, crossed: Sequence[Crossed], prior: Prior) -> list[Tokens]:
        """The tokens that each row is taken to hold."""
        found: list[Tokens] = [np.empty(0, np.int64)] * len(crossed)
        for places in batches_of_one_length([one.row for one in crossed]):
            rows = [self.channel.undone(crossed[place].hidden_TD, len(crossed[place].row.tokens_T)) for place in places]
            guesses_RT = self._recover_batch(torch.from_numpy(np.stack(rows)), prior)
            for place, guess_T in zip(places, guesses_RT, strict=True):
                found[place] = guess_T
        return found

    def _recover_batch(self, hidden_RTD: Tensor, prior: Prior) -> Tokens:
        prefix, text = self.head.begin(), self.model.begin()
        odds_RV = torch.from_numpy(self.odds_V).expand(len(hidden_RTD), -1)
        if prior == "none":
            odds_RV = torch.zeros_like(odds_RV)
        found = []
        for hidden_RD in hidden_RTD.unbind(dim=1):
            tokens_R = self._recover_token(prefix, hidden_RD, odds_RV)
            found.append(tokens_R)
            if len(found) < hidden_RTD.shape[1]:
                self.head.extend(prefix, tokens_R)
                if prior == "model":
                    odds_RV = self.model.extend(text, tokens_R).double()
        return torch.stack(found, dim=1).numpy()

    def _recover_token(self, prefix: Prefix, hidden_RD: Tensor, odds_RV: Tensor) -> Tensor:
        likely_RV = torch.from_numpy(self.reader.log_likelihoods(hidden_RD.numpy())) + odds_RV
        tried_RS = likely_RV.topk(min(_SHORTLIST, likely_RV.shape[1])).indices
        far_RS = _squared_distances(self.head.try_tokens(prefix, tried_RS), hidden_RD)
        best_R = (odds_RV.gather(1, tried_RS) - far_RS / (2 * self._variance)).argmax(dim=1, keepdim=True)
        tokens_R = tried_RS.gather(1, best_R)[:, 0]
        missed = (far_RS.gather(1, best_R)[:, 0] > self._farthest).nonzero()[:, 0]
        if len(missed):
            far_MV = self._all_distances(prefix, hidden_RD[missed], missed.tolist(), odds_RV.shape[1])
            tokens_R[missed] = (odds_RV[missed] - far_MV / (2 * self._variance)).argmax(dim=1)
        return tokens_R

    def _all_distances(self, prefix: Prefix, hidden_MD: Tensor, rows: Sequence[int], vocabulary: int) -> Tensor:
        parts = []
        for start in range(0, vocabulary, _AT_ONCE):
            tokens_S = torch.arange(start, min(start + _AT_ONCE, vocabulary))
            tried_MSD = self.head.try_tokens(prefix, tokens_S.expand(len(rows), -1), rows)
            parts.append(_squared_distances(tried_MSD, hidden_MD))
        return torch.cat(parts, dim=1)

    @property
    def _variance(self) -> float:
        """The noise's in each direction, and at least what rounding may do."""
        return max(float(self.channel.noise_D.mean()), (_ROUNDING * self.eps) ** 2 * self.channel.mean_square)

    @property
    def _farthest(self) -> float:
        return max(1.1 * self.channel.farthest, self._variance * len(self.channel.noise_D))


def _squared_distances(tried_RSD: Tensor, hidden_RD: Tensor) -> Tensor:
    return (tried_RSD.double() - hidden_RD[:, None]).square().sum(dim=-1)
