"""Submit a run and watch it to its end, whatever the end is."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from contract.config import RunConfig
from contract.errors import ConnectionFailedError, RoundError, TrunklineError
from contract.output import talk
from storage.leases import LEASE_S
from storage.records import EndStatus, RunRow
from storage.store import Store, open_store
from trunkline.bundle import stage_app
from trunkline.flower import UNKNOWN, Submission, SuperLinkAddress, end_status, listen_again, submit
from trunkline.live import Standing, display, read_standing
from trunkline.processes import Daemon
from trunkline.workplace import Workplace

POLL_S = 0.25
# Between two looks at SQL pass four times what the last one took: a large run must not be slowed by who watches it.
POLL_SHARE = 4.0
LONGEST_POLL_S = 5.0
# A SuperLink elsewhere may write to a database that this machine does not see; then its log is what there is to show.
UNSEEN_AFTER_S = 10.0
# A SuperLink whose machine is gone ends no stream. So it is asked for the run where nothing is told any more: neither
# in SQL, where a driver's lease is renewed all the time, nor in the log, which is all that is seen of other runs.
LEASE_SILENCE_S = 2 * LEASE_S
LOG_SILENCE_S = 180.0
COMPLETED = "finished:completed"
RECONNECTIONS = 5
RECONNECTION_WAIT_S = 5.0
CRASH_LOG_WAIT_S = 10.0
MOST_SHOWN = 100_000
"""How many lines of a log are known again; one that has more is shown once more when it is listened to again."""
_CRASH = re.compile(r"An exception occured!! (.*)")  # as Flower spells it


def run_to_end(
    workplace: Workplace,
    config: RunConfig,
    superlink: SuperLinkAddress,
    needed: Sequence[Daemon] = (),
    federation_config: str | None = None,
) -> RunRow | None:
    """Run the app with `config` on `superlink` and watch it: its row once it finished.

    `needed` are the daemons started for it here, which end with it; with none the SuperLink is someone else's, and an
    interrupted watch leaves the run going. None where the run finished without this machine's database knowing of it.
    Raises RoundError with the reason of a run that did not finish.
    """
    app = stage_app(config, workplace.directory / "app")
    with _opened_store() as store:
        submission = submit(workplace.supervisor, app, superlink, federation_config)
        watch = _Watch(workplace, store, superlink, submission, needed)
        try:
            row = watch.until_ended()
        except KeyboardInterrupt:
            if needed:
                watch.end_row("stopped", "interrupted where it was started")
                watch.tell_how_to_go_on()
            else:
                talk(f"the run goes on; `flwr stop {submission.flower_run_id}` on its SuperLink ends it")
            raise
        except TrunklineError as error:
            if needed:
                watch.end_row("failed", str(error))
            raise
        if row is None:
            _require_completed(workplace, superlink, watch.submission)
        elif row.status != "finished":
            watch.tell_how_to_go_on()
            crash = simulation_crash(watch.submission.stream) if needed and row.status == "stopped" else None
            raise RoundError(f"run {row.run_id} {row.status}: {crash or row.reason or 'it left no reason'}")
        return row


def simulation_crash(stream: Daemon) -> str | None:
    """Why Flower's simulation engine crashed, or None if it did not.

    A crash ends the ServerApp just as `flwr stop` does; only the log that `stream` prints, a little later, tells which.
    """
    deadline = time.monotonic() + CRASH_LOG_WAIT_S
    while True:
        ended = not stream.alive()
        found = _CRASH.search(stream.log_path.read_text(encoding="utf-8", errors="replace"))
        if found:
            return f"Flower's simulation engine crashed: {found[1].strip()}"
        if ended or time.monotonic() > deadline:
            return None
        time.sleep(POLL_S)


def pause_s(reading_s: float) -> float:
    """How long to wait after a look at SQL that took `reading_s` seconds."""
    return min(max(POLL_S, POLL_SHARE * reading_s), LONGEST_POLL_S)


@contextmanager
def _opened_store() -> Iterator[Store]:
    store = open_store()
    try:
        yield store
    finally:
        store.close()


@dataclass(slots=True)
class _Watch:
    workplace: Workplace
    store: Store
    superlink: SuperLinkAddress
    submission: Submission
    needed: Sequence[Daemon]
    shown: dict[int, None] = field(default_factory=dict)
    heard: tuple[Standing | None, int] | None = None
    heard_at_s: float = 0.0

    def until_ended(self) -> RunRow | None:
        """The run's row once it has ended, or None if Flower's run ended and SQL never knew of it."""
        began = time.monotonic()
        with display() as show:
            while True:
                streaming = self.submission.stream.alive()
                looked = time.monotonic()
                standing = read_standing(self.store, self.submission.flower_run_id)
                pause = pause_s(time.monotonic() - looked)
                if standing is not None:
                    show(standing)
                    if standing.run.status != "running":
                        return standing.run
                self.workplace.supervisor.check(self.needed)
                if standing is None and not self.needed and time.monotonic() - began > UNSEEN_AFTER_S:
                    self._show_log()
                if (not streaming or self._is_silent(standing)) and self._has_ended():
                    self.end_row("failed", f"its ServerApp ended without a word: {self.submission.stream.last_words()}")
                    return self.store.run_by_flower_id(self.submission.flower_run_id)
                time.sleep(pause)

    def _is_silent(self, standing: Standing | None) -> bool:
        """Whether neither SQL nor the log told anything new for a while; said once for each such while."""
        heard, now_s = (standing, self.submission.stream.log_path.stat().st_size), time.monotonic()
        leased = standing is not None and standing.run.lease_until is not None
        silent = heard == self.heard and now_s - self.heard_at_s > (LEASE_SILENCE_S if leased else LOG_SILENCE_S)
        if silent or heard != self.heard:
            self.heard, self.heard_at_s = heard, now_s
        return silent

    def _has_ended(self) -> bool:
        """Whether the run is over, where the stream of its log is, or is silent: a lost connection is no end of a run.

        A run that goes on is listened to again. Raises ConnectionFailedError when its SuperLink stays out of reach.
        """
        for _ in range(RECONNECTIONS):
            status, details = end_status(self.workplace.supervisor, self.superlink, self.submission.flower_run_id)
            if status.startswith("finished"):
                return True
            if status != UNKNOWN:
                self.submission = listen_again(self.workplace.supervisor, self.superlink, self.submission)
                return False
            time.sleep(RECONNECTION_WAIT_S)
        raise ConnectionFailedError(
            f"lost the SuperLink at {self.superlink.address}, where run {self.submission.flower_run_id} may go on: "
            f"{' '.join(details.split())}"
        )

    def _show_log(self) -> None:
        """A log that is listened to again begins at its beginning."""
        for line in self.submission.stream.new_lines():
            known = hash(line)
            if known not in self.shown:
                talk(line)
                self.shown[known] = None
            if len(self.shown) > MOST_SHOWN:
                del self.shown[next(iter(self.shown))]

    def tell_how_to_go_on(self) -> None:
        row = self.store.run_by_flower_id(self.submission.flower_run_id)
        if row is not None and row.committed_rounds:
            talk(f"{row.committed_rounds} rounds are committed; go on with: trunkline runs resume {row.run_id}")

    def end_row(self, status: EndStatus, reason: str) -> None:
        """Give the run its end in SQL where nobody is left to do so."""
        row = self.store.run_by_flower_id(self.submission.flower_run_id)
        if row is not None:
            self.store.finish_run(row.run_id, status, reason, flower_run_id=self.submission.flower_run_id)


def _require_completed(workplace: Workplace, superlink: SuperLinkAddress, submission: Submission) -> None:
    """Raise RoundError unless Flower says that the run, of which SQL knows nothing here, came to a good end."""
    status, details = end_status(workplace.supervisor, superlink, submission.flower_run_id)
    if status != COMPLETED:
        said = " ".join(details.split()) or submission.stream.last_words()
        raise RoundError(f"Flower's run {submission.flower_run_id} is {status}: {said}")
    talk("finished; this machine's database knows nothing of the run: see `trunkline runs show` where the SuperLink is")
