"""The best guesser that sees nothing of the wire: what an attack must beat before anything has leaked.

It knows what the attacker knows beside the wire: the base model, public text, and how long the rows are. Where the
attacker is told the true prefix, so is the guesser. Which of the guessers is the best is settled on public text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from clients.audits.public_model import PublicLanguageModel
from clients.data import TokenRow

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BlindGuesser:
    """The same guess for every row: `guess_T` as long as the longest, and what it is in words."""

    name: str
    guess_T: Tokens

    def hits(self, row: TokenRow, start: int = 0) -> int:
        """Right guesses from position `start` on."""
        length = len(row.tokens_T)
        return int((self.guess_T[start:length] == row.tokens_T[start:]).sum())


def best_blind_guesser(
    model: PublicLanguageModel, odds_V: npt.NDArray[np.float64], longest: int, judged: Sequence[TokenRow]
) -> BlindGuesser:
    """The better one on `judged`, which is public: the commonest token, or what the base model writes by itself."""
    commonest = int(odds_V.argmax())
    prefix = model.begin()
    written = [commonest]
    while len(written) < longest:
        written.append(int(model.extend(prefix, torch.tensor(written[-1:])).argmax()))
    guessers = (
        BlindGuesser("the commonest token, everywhere", np.full(longest, commonest)),
        BlindGuesser("the base model, by its own text", np.asarray(written)),
    )
    return max(guessers, key=lambda guesser: sum(guesser.hits(row) for row in judged))
