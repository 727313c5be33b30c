"""The heartbeat of whoever drives a run: as long as it beats, nobody else may take the run over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from contract.errors import LeaseError, TrunklineError
from storage.leases import LEASE_S
from storage.store import Store

log = logging.getLogger("trunkline.orchestrator")

RENEW_S = LEASE_S / 4
_ENDS_WITHIN_S = 60.0


class Lease:
    """One run's lease, renewed by a thread of its own."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store = store
        self._run_id = run_id
        self._ended = threading.Event()
        self._lost: LeaseError | None = None

    def require(self) -> None:
        """Raise LeaseError once the run was stopped, or taken over; what could not be asked is no loss."""
        if self._lost is not None:
            raise LeaseError(str(self._lost))

    def beat(self, every_s: float) -> None:
        """Renew until the end, or until the lease is lost."""
        failing = False
        while self._lost is None and not self._ended.wait(every_s):
            try:
                self._store.renew_lease(self._run_id)
                failing = False
            except LeaseError as error:
                self._lost = error
            except TrunklineError as error:
                if not failing:
                    log.warning("the lease of run %s is not renewed: %s", self._run_id, error)
                failing = True

    def end(self) -> None:
        self._ended.set()


@contextmanager
def renewed(store: Store, run_id: str, every_s: float | None = None) -> Iterator[Lease]:
    """The run's lease, held while the block runs."""
    lease = Lease(store, run_id)
    beating = threading.Thread(target=lease.beat, args=(every_s or RENEW_S,), name="run-lease", daemon=True)
    beating.start()
    try:
        yield lease
    finally:
        lease.end()
        beating.join(_ENDS_WITHIN_S)
