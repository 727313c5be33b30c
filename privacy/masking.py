"""Sparse gradients with error feedback: only a share of a row's values is sent, the rest waits for its next turn.

After Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory" (NeurIPS 2018). A defence that attacks measure, no
differential privacy: which values are sent, and what they are, depends on the text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from contract.errors import ConfigError
from privacy.stream import SecretStream

Mask = Literal["none", "random", "top-k"]
Singles = npt.NDArray[np.float32]

RESIDUAL_BYTES = 1 << 28
"""What is held back of all rows together; beyond it the rows whose turn is longest ago lose theirs."""


class RowMask:
    """Keeps the same share of each row's values, at random or the largest, and adds what it held back the next time."""

    def __init__(self, mask: Mask, keep: float, stream: SecretStream, residual_bytes: int = RESIDUAL_BYTES) -> None:
        """Raises ConfigError for a share that is not above 0 and at most 1."""
        if not 0.0 < keep <= 1.0:
            raise ConfigError(f"gradient-mask-keep is {keep}; it must be above 0 and at most 1")
        self._mask, self._keep, self._stream = mask, keep, stream
        self._residual_bytes = residual_bytes
        self._residuals: OrderedDict[int, Singles] = OrderedDict()
        self._held_bytes = 0

    def apply(self, grad_BTD: Singles, rows: Sequence[int]) -> tuple[Singles, npt.NDArray[np.bool_]]:
        """What is sent of grad_BTD and where; elsewhere it is exactly zero.

        A residual belongs to the row's first positions: where a batch is shorter or longer than the last one that the
        row was in, it is cut, or zero beyond its end. Of a row that is in the batch twice only the last one is kept.
        """
        total_BTD = grad_BTD.copy()
        for place, row in enumerate(rows):
            self._add_residual(total_BTD[place], row)
        sent_BTD = self._chosen(total_BTD)
        for place, row in enumerate(rows):
            self._hold(row, np.where(sent_BTD[place], np.float32(0.0), total_BTD[place]))
        return np.where(sent_BTD, total_BTD, np.float32(0.0)), sent_BTD

    def _chosen(self, total_BTD: Singles) -> npt.NDArray[np.bool_]:
        batch = total_BTD.shape[0]
        size = total_BTD[0].size
        kept = max(1, round(self._keep * size))
        if self._mask == "none" or kept == size:
            return np.ones(total_BTD.shape, dtype=np.bool_)
        chosen = np.zeros((batch, size), dtype=np.bool_)
        for place in range(batch):
            flat = total_BTD[place].reshape(-1)
            ranks = np.abs(flat) if self._mask == "top-k" else self._stream.bits(size)
            chosen[place, np.argpartition(ranks, size - kept)[size - kept :]] = True
        return chosen.reshape(total_BTD.shape)

    def _add_residual(self, total: Singles, row: int) -> None:
        residual = self._residuals.pop(row, None)
        if residual is not None:
            self._held_bytes -= residual.nbytes
            shared = min(len(total), len(residual))
            total[:shared] += residual[:shared]

    def _hold(self, row: int, residual: Singles) -> None:
        if not residual.any():
            return
        earlier = self._residuals.pop(row, None)
        self._held_bytes += residual.nbytes - (0 if earlier is None else earlier.nbytes)
        self._residuals[row] = residual
        while self._held_bytes > self._residual_bytes:
            _, dropped = self._residuals.popitem(last=False)
            self._held_bytes -= dropped.nbytes
