"""The summing of one round: a client half and a server half that exchange bytes.

Here the vectors travel in clear, in one exchange; `secure_client` and `secure_server` hide them, in five stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import numpy as np

from aggregation.ring import RingVector, zeros
from contract.errors import RoundError, UpdateError


class ClientHalf(ABC):
    """One client's side of one round's sum."""

    @abstractmethod
    def upload(self, vector: RingVector) -> bytes:
        """The bytes that bring `vector`, shape (d + 1,), to the server. MUST raise UpdateError on another shape."""


class ServerHalf(ABC):
    """The server's side of one round's sum. It MUST NOT hold more vectors the more clients there are."""

    @abstractmethod
    def accept(self, client_id: str, upload: bytes) -> None:
        """Add one client's upload. MUST raise UpdateError, and change nothing, when it is not exactly what is due."""

    @property
    @abstractmethod
    def accepted(self) -> frozenset[str]:
        """The clients whose uploads are in the sum."""

    @abstractmethod
    def finish(self, survivors: Collection[str]) -> RingVector:
        """The ring sum over exactly `survivors`, shape (d + 1,). MUST raise RoundError when it cannot give that one."""


class PlainSumClient(ClientHalf):
    """Sends the vector as it is: the server sees each client's update."""

    def __init__(self, size: int, bits: int = 32) -> None:
        self._size, self._bits = size, bits

    def upload(self, vector: RingVector) -> bytes:
        if vector.shape != (self._size,) or vector.dtype != zeros(0, self._bits).dtype:
            raise UpdateError(
                f"the encoded update has shape {vector.shape} and type {vector.dtype}; "
                f"this round sums uint{self._bits} vectors of shape ({self._size},)"
            )
        return vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes()


class PlainSumServer(ServerHalf):
    """Adds what comes to one running sum; `size` is d + 1 and `cohort` names who may upload, each once."""

    def __init__(self, size: int, cohort: Collection[str], bits: int = 32) -> None:
        self._total = zeros(size, bits)
        self._cohort = frozenset(cohort)
        self._accepted: set[str] = set()

    def accept(self, client_id: str, upload: bytes) -> None:
        if client_id not in self._cohort:
            raise UpdateError(f"client {client_id} sent an update but is not in this round's cohort")
        if client_id in self._accepted:
            raise UpdateError(f"client {client_id} sent a second update for this round; the first one counts")
        due_bytes = self._total.nbytes
        if len(upload) != due_bytes:
            fault = "truncated" if len(upload) < due_bytes else "oversized"
            raise UpdateError(f"client {client_id} sent a {fault} update: {len(upload)} bytes, {due_bytes} are due")
        np.add(self._total, np.frombuffer(upload, dtype=self._total.dtype.newbyteorder("<")), out=self._total)
        self._accepted.add(client_id)

    @property
    def accepted(self) -> frozenset[str]:
        return frozenset(self._accepted)

    def finish(self, survivors: Collection[str]) -> RingVector:
        wanted = frozenset(survivors)
        if wanted != self._accepted:
            odd = ", ".join(sorted(wanted ^ self._accepted))
            raise RoundError(
                f"the sum holds the updates of {len(self._accepted)} clients, not of the {len(wanted)} survivors; "
                f"they differ in {odd}"
            )
        if not wanted:
            raise RoundError("no client's update came: there is nothing to average")
        return self._total.copy()
