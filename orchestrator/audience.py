"""Who is told how a run goes: metrics, traces, trackers. None of them can end a run: one that fails is told no more."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable

from contract.errors import TrunklineError
from contract.records import RoundKey, RoundProgress
from storage.records import Outcome, RoundCommit

log = logging.getLogger("trunkline.orchestrator")

WAITING = "waiting"
"""What a run is at between its phases."""
_CREDENTIALS = re.compile(r"//[^/@\s]*@")


class Listener:
    """Told of a run in the run's own thread, and of what SQL keeps once SQL has it. What is not overridden is ignored.

    What a method raises ends the listening, with one warning that names `what`.
    """

    what = "a listener"

    def phase_began(self, phase: str) -> None:
        """A part of a round's work began."""

    def phase_ended(self, phase: str, seconds: float) -> None:
        """It ended, well or not."""

    def opened(self, key: RoundKey, clients: int) -> None:
        """An attempt at a round is open, with so many clients invited."""

    def moved(self, key: RoundKey, seen: RoundProgress, replies: int) -> None:
        """Where the open attempt stands."""

    def participated(self, key: RoundKey, node_id: str, outcome: Outcome, reason: str | None) -> None:
        """What the client at one node did in the open attempt."""

    def committed(self, commit: RoundCommit) -> None:
        """The attempt is the run's newest version."""

    def aborted(self, key: RoundKey) -> None:
        """The attempt came to nothing."""

    def exchanged(self, phase: str, seconds: float) -> None:
        """One message went to every client of a cohort, and their answers came, or were waited for long enough."""

    def charged(self, charges: int) -> None:
        """So many charges are reserved in the ledger."""

    def ended(self, well: bool) -> None:
        """The run ends, as it should or by an error; the last thing that is told."""


class Audience:
    """All listeners of a run. `traceparent` answers what names the present span to another process, or nothing."""

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self._listeners = list(listeners)
        self.phase = ""
        self.traceparent: Callable[[], str] = lambda: ""

    def join(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def tell(self, what: Callable[[Listener], None]) -> None:
        """Call `what` with every listener; who raises is told nothing more."""
        for listener in list(self._listeners):
            try:
                what(listener)
            except Exception as error:  # noqa: BLE001 (told here, once; the run goes on)
                self._listeners.remove(listener)
                log.warning("%s: off for the rest of this run: %s", listener.what, told(error))

    def phase_began(self, phase: str) -> None:
        self.phase = phase
        self.tell(lambda one: one.phase_began(phase))

    def phase_ended(self, phase: str, seconds: float) -> None:
        self.tell(lambda one: one.phase_ended(phase, seconds))
        self.phase = ""

    def opened(self, key: RoundKey, clients: int) -> None:
        self.tell(lambda one: one.opened(key, clients))

    def aborted(self, key: RoundKey) -> None:
        self.tell(lambda one: one.aborted(key))

    def exchanged(self, seconds: float) -> None:
        phase = self.phase or WAITING
        self.tell(lambda one: one.exchanged(phase, seconds))


def told(error: Exception) -> str:
    """An error in one line, without the credentials that an address in it may have."""
    words = _CREDENTIALS.sub("//***@", " ".join(str(error).split()))[:300]
    return words if isinstance(error, TrunklineError) else f"{type(error).__name__}: {words}"
