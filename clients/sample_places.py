"""Which of a site's rows both ends keep under int4-delta, where, and which give way: the client alone decides."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

from contract.delta import Samples, place_bytes


class SamplePlaces:
    """Places by row, at most `limit_bytes` by `contract.delta`'s count; the row that was sent longest ago gives way."""

    def __init__(self, limit_bytes: int, hidden_size: int) -> None:
        self._limit_bytes = limit_bytes
        self._hidden_size = hidden_size
        self._kept: OrderedDict[int, tuple[int, int]] = OrderedDict()  # row -> (place, length)
        self._taken_bytes = 0
        self._free: list[int] = []
        self._unanswered: Counter[int] = Counter()  # place -> forwards whose answer has not come

    def plan(self, rows: Sequence[int], lengths: Sequence[int]) -> Samples:
        """The places of a batch of the site's `rows` with that many positions each.

        Nothing is kept of rows that were not announced, and of a row's second copy in a batch. No place is freed before
        the answers that are due for it have been read.
        """
        if len(rows) != len(lengths):
            return Samples((0,) * len(lengths), (False,) * len(lengths))
        forgotten: list[int] = []
        found: list[tuple[int, bool]] = []
        for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if row in rows[:at] or not length:
                found.append((0, False))
            elif self._kept.get(row, (0, 0))[1] == length:
                self._kept.move_to_end(row)
                found.append((self._kept[row][0], True))
            else:
                found.append((self._take(row, length, set(rows), forgotten), False))
        self._unanswered.update(place for place, _ in found if place)
        places, differences = zip(*found, strict=True)
        return Samples(places, differences, tuple(forgotten))

    def answered(self, samples: Samples) -> None:
        """The answer to a forward that was planned has been read."""
        self._unanswered.subtract(place for place in samples.places if place)

    def _take(self, row: int, length: int, batch: set[int], forgotten: list[int]) -> int:
        """A place for a row that has none of its length; 0 where there is no room."""
        needed = place_bytes(length, self._hidden_size)
        if row in self._kept and not self._forget(row, forgotten):
            return 0
        for other in list(self._kept):
            if self._taken_bytes + needed <= self._limit_bytes:
                break
            if other not in batch:
                self._forget(other, forgotten)
        if self._taken_bytes + needed > self._limit_bytes:
            return 0
        place = self._free.pop() if self._free else len(self._kept) + 1
        self._kept[row] = (place, length)
        self._taken_bytes += needed
        return place

    def _forget(self, row: int, forgotten: list[int]) -> bool:
        place, length = self._kept[row]
        if self._unanswered[place] > 0:
            return False
        del self._kept[row], self._unanswered[place]
        self._taken_bytes -= place_bytes(length, self._hidden_size)
        self._free.append(place)
        forgotten.append(place)
        return True
