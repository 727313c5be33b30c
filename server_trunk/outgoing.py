"""A reply that its client has not taken yet: in memory, or on disk while others need the room.

A client that never reads would otherwise keep its replies in memory for as long as it likes, and the graphs behind
them.
"""

from __future__ import annotations

import time

from contract.trunk_pb2 import TensorHeader
from contract.wire import CHUNK_BYTES
from server_trunk.incoming import put_aside
from server_trunk.lane import Graph
from server_trunk.memory import Hold, Spill, Spilled
from server_trunk.worker import Worker


class Outgoing:
    """One reply's header and data, the room that both take, and the graph that comes with them until it is pending."""

    __slots__ = ("_at", "_data", "_dropped", "_size", "graph", "header", "hold", "made_s", "norm")

    def __init__(
        self,
        header: TensorHeader | None,
        data: memoryview,
        hold: Hold,
        *,
        graph: Graph | None = None,
        norm: float = 0.0,
    ) -> None:
        self.header = header
        self.hold = hold
        self.graph = graph
        self.norm = norm
        self.made_s = time.monotonic()
        self._data: memoryview | Spilled = data
        self._size = len(data)
        self._at = 0
        self._dropped = False

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return self._size

    def put_aside(self, spill: Spill) -> None:
        """Leave all of it to the disk, on any thread. Raises CapacityError, StorageError."""
        if isinstance(self._data, memoryview) and self._size:
            self._data = spill.put(self._data)
        if (graph := self.graph) is not None:
            put_aside(graph, spill)
        if self._dropped:  # meanwhile, on the event loop
            self.drop()

    def drop(self) -> None:
        """Keep nothing of it: it will not be sent."""
        self._dropped = True
        self._data = memoryview(b"")
        self._size = 0
        self.graph = None

    async def next(self, disk: Worker) -> memoryview:
        """The next chunk of the data; none of it when all has gone. Raises StorageError."""
        start, self._at = self._at, self._at + CHUNK_BYTES
        if start < self._size and isinstance(self._data, Spilled):
            return await disk.run(self._chunk, start)
        return self._chunk(start)

    def _chunk(self, start: int) -> memoryview:
        data = self._data
        return data.read(start, CHUNK_BYTES) if isinstance(data, Spilled) else data[start : start + CHUNK_BYTES]
