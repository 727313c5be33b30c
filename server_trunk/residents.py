"""Which sessions' adapters are in memory: those used last, up to a number of bytes; the others' lie on disk."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from server_trunk.seats import Seat
from server_trunk.session_adapter import SessionAdapter


class Residents:
    """The adapters in memory, in the order of their last use. Owned by the event loop, but for `put_aside`."""

    def __init__(self, limit: int, folder: Path) -> None:
        """At most `limit` bytes with values, gradients and both moments of AdamW; always one adapter for each lane."""
        self.limit = limit
        self._folder = folder
        self._seats: OrderedDict[Seat, int] = OrderedDict()
        self.taken = 0
        self.evictions = 0

    def used(self, seat: Seat) -> None:
        """A session's adapter was needed, and so is in memory."""
        if seat not in self._seats:
            self._seats[seat] = seat.adapter.size_bytes
            self.taken += self._seats[seat]
        self._seats.move_to_end(seat)

    def surplus(self) -> list[Seat]:
        """Idle sessions to put aside, those first whose use is longest ago; they count as gone from memory.

        Never one that has work waiting, or whose graphs hold its tensors.
        """
        found = []
        for seat in list(self._seats):
            if self.taken <= self.limit:
                break
            if not (seat.running or seat.jobs or seat.keeps_graphs()):
                found.append(seat)
                self.gone(seat)
        return found

    def gone(self, seat: Seat) -> None:
        self.taken -= self._seats.pop(seat, 0)

    def put_aside(self, adapter: SessionAdapter) -> None:
        """To be called in the session's own turn, on any thread. Raises StorageError."""
        adapter.evict(self._folder)
        self.evictions += 1  # one more or less, where two lanes' threads meet here, is no matter
