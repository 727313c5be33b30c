"""Which sessions' adapters are in memory: those used last, up to a number of bytes; the others' lie on disk."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from contract.errors import CapacityError
from server_trunk.seats import Seat
from server_trunk.session_adapter import SessionAdapter


class Residents:
    """The adapters in memory, in the order of their last use. Owned by the event loop, but for `put_aside`."""

    def __init__(self, limit: int, folder: Path, most: int | None = None) -> None:
        """At most `limit` bytes with values, gradients and both moments of AdamW; always one adapter for each lane.

        `most` is what a single one may have; None: whatever it likes.
        """
        self.limit = limit
        self._most = most
        self._folder = folder
        self._seats: OrderedDict[Seat, int] = OrderedDict()
        self.taken = 0
        self.evictions = 0

    def require_room(self, values: int) -> None:
        """Raise CapacityError for an adapter of so many values that is too large for this trunk."""
        size_bytes = 16 * values
        if self._most is not None and size_bytes > self._most:
            raise CapacityError(
                f"the adapter with its gradient and optimiser takes {size_bytes} bytes; this trunk's memory-budget is "
                f"{self._most}: use a lower rank, or fewer targets"
            )

    @property
    def crowded(self) -> bool:
        """Whether there are far more in memory than there should be, because all of them have work or graphs."""
        return self.taken > 2 * self.limit

    def used(self, seat: Seat) -> None:
        """A session's adapter was needed, and so is in memory."""
        if seat not in self._seats:
            self._seats[seat] = seat.adapter.size_bytes
            self.taken += self._seats[seat]
        self._seats.move_to_end(seat)

    def surplus(self) -> list[Seat]:
        """Idle sessions to put aside, those first whose use is longest ago; they count as gone from memory.

        Never one whose graphs hold its tensors, and one that has work waiting only where they are far too many.
        """
        found: list[Seat] = []
        for waiting in (False, True):
            for seat in list(self._seats):
                if self.taken <= self.limit or (waiting and not self.crowded):
                    return found
                if not (seat.running or seat.keeps_graphs() or (seat.jobs and not waiting)):
                    found.append(seat)
                    self.gone(seat)
        return found

    def gone(self, seat: Seat) -> None:
        self.taken -= self._seats.pop(seat, 0)

    def put_aside(self, adapter: SessionAdapter) -> None:
        """To be called in the session's own turn, on any thread. Raises StorageError."""
        adapter.evict(self._folder)
        self.evictions += 1  # one more or less, where two lanes' threads meet here, is no matter
