"""The heartbeat of whoever drives a run: as long as it beats, nobody else may take the run over."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from contract.errors import LeaseError, TrunklineError
from storage.leases import LEASE_S
from storage.store import Store

log = logging.getLogger("trunkline.orchestrator")

RENEW_S = LEASE_S / 4
_ENDS_WITHIN_S = 60.0


def awake_or_not_s() -> float:
    """Seconds that never go back and, where the system has such a clock, go on while it sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Lease:
    """One run's lease, renewed by a thread of its own, and by who asks for it where that thread fell behind."""

    def __init__(self, store: Store, run_id: str, now_s: Callable[[], float] = awake_or_not_s) -> None:
        self._store = store
        self._run_id = run_id
        self._now_s = now_s
        self._ended = threading.Event()
        self._lost: LeaseError | None = None
        self._failing = False
        self._renewed_s = now_s()

    def require(self) -> None:
        """Raise LeaseError once the run was stopped, or taken over; what could not be asked is no loss.

        A machine that slept asks SQL before it goes on.
        """
        if self._lost is None and self._now_s() - self._renewed_s > LEASE_S:
            self.renew()
        if self._lost is not None:
            raise LeaseError(str(self._lost))

    def age_s(self) -> float:
        """Seconds since it was last renewed."""
        return self._now_s() - self._renewed_s

    def fault(self) -> str:
        """Why it is not held; empty while it is."""
        if self._lost is not None:
            return str(self._lost)
        age_s = self.age_s()
        return f"the lease was last renewed {age_s:.0f} s ago" if age_s > LEASE_S else ""

    def renew(self) -> None:
        try:
            self._store.renew_lease(self._run_id)
            self._failing, self._renewed_s = False, self._now_s()
        except LeaseError as error:
            self._lost = error
        except TrunklineError as error:
            if not self._failing:
                log.warning("the lease of run %s is not renewed: %s", self._run_id, error)
            self._failing = True

    def beat(self, every_s: float, wait: Callable[[float], bool] | None = None) -> None:
        """Renew until the end, or until the lease is lost. `wait` waits that long and answers whether the end came."""
        wait = wait or self._ended.wait
        while self._lost is None and not wait(every_s):
            self.renew()

    def end(self) -> None:
        self._ended.set()


@contextmanager
def renewed(store: Store, run_id: str, every_s: float | None = None) -> Iterator[Lease]:
    """The run's lease, held while the block runs."""
    lease = Lease(store, run_id)
    beat = partial(contextvars.copy_context().run, lease.beat, every_s or RENEW_S)  # its log names the run
    beating = threading.Thread(target=beat, name="run-lease", daemon=True)
    beating.start()
    try:
        yield lease
    finally:
        lease.end()
        beating.join(_ENDS_WITHIN_S)
