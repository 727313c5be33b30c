"""Which rows take part in a step of DP-SGD: each by its own secret chance, and no oftener than it may be sent."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from privacy.stream import SecretStream


class RowSampler:
    """Poisson sampling (Abadi et al. 2016): a row's chance to join a step depends on no other row and no other step.

    A row that joined `most` times in all is left out from then on. Given all that was released before, its chance in
    each step is then at most the sampling rate; a price for steps at the full rate covers it, because a mixture with
    less of the row in it is told apart no better (joint convexity of f-divergences, step by step).
    """

    def __init__(self, rows: int, rate: float, stream: SecretStream, most: int | None = None) -> None:
        """`rate` is above 0 and at most 1; `most` None is no limit."""
        self._rate = rate
        self._stream = stream
        self._most = most
        self._joined = np.zeros(rows, dtype=np.int64)

    def draw(self) -> npt.NDArray[np.intp]:
        """The places of the rows of the next step, ascending; there may be none."""
        joins = self._stream.uniform(self._joined.size) < self._rate
        if self._most is not None:
            joins &= self._joined < self._most
        self._joined += joins
        return np.flatnonzero(joins)
