"""Orchestrators, one life after another and sometimes two at once, and the operator who starts and resumes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flwr.app import ConfigRecord, Message
from sqlalchemy import Engine

from contract.config import ConfigValue
from contract.errors import (
    AgreementError,
    BudgetError,
    ConnectionFailedError,
    DeadlineError,
    LeaseError,
    RoundError,
    SecureSumError,
    SessionError,
    StorageError,
    UpdateError,
)
from orchestrator.audience import Audience
from orchestrator.lease import Lease
from orchestrator.run import Start, conduct
from orchestrator.trunk import Trunk
from orchestrator.watchers import Watched
from storage.artifacts import ArtifactStore
from storage.leases import LEASE_S
from storage.ledger import Ledger
from storage.records import HeadSigner
from storage.store import Store
from tests.simulation.books import Books
from tests.simulation.history import History
from tests.simulation.kernel import Kernel, Process, VirtualClock
from tests.simulation.network import FULL, Grid, LinkError, Network
from tests.simulation.trunk import TrunkChannel, TrunkHost

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
RENEW_S = 5.0
SPENT = "can still pay for a round"
"""In the reason of a run that ended since budgets did: to resume it would help nobody."""
SLACK_S = 6.0
CALM_LIVES = 20
"""So many times at most an orchestrator is started once nothing fails any more, those that meet a lease included."""
NOTHING_LEFT = "has finished: there is nothing to resume"
AT_REST = (AgreementError, BudgetError, ConnectionFailedError, DeadlineError, LeaseError, RoundError, SecureSumError,
           SessionError, UpdateError, LinkError)  # fmt: skip
"""What may end an orchestrator's life: it names what others did. Any other error is its own fault."""
_UNDRIVEN = ("create_run", "resume_run", "finish_run", "renew_lease")
_IN_EXCHANGE = ("sql.record_participation", "sql.record_progress", "flower.", "file.", "trunk.call")


@dataclass
class Machine:
    """What all lives of one seed share."""

    kernel: Kernel
    network: Network
    trunk: TrunkHost
    history: History
    books: Books
    engine: Engine
    home: Path
    artifacts: ArtifactStore
    signer: HeadSigner
    entropy: Callable[[int], bytes]
    settings: dict[str, ConfigValue]
    status: dict[str, str] = field(default_factory=dict)
    leased_until_s: dict[str, float] = field(default_factory=dict)
    reserved: int = 0


@dataclass(eq=False)
class Life:
    """One orchestrator's process, from its start to its end. `resumed` is the run that it goes on with, if any."""

    machine: Machine
    number: int
    resumed: str
    operator: Operator
    outcome: str = ""
    run_id: str = ""
    process: Process = field(init=False)
    acted_s: float = 0.0
    waits_for: str = ""

    def __post_init__(self) -> None:
        self.process = Process(f"driver {self.number}", self._visit)
        self.acted_s = self.machine.kernel.now_s
        self.skew = timedelta(seconds=self.machine.network.rng.uniform(-1, 1) * self.machine.network.weather.skew_s)

    @property
    def name(self) -> str:
        return f"flower-{self.number}"

    def begin(self) -> None:
        self.machine.kernel.say(f"{self.process.name} starts" + (f", resuming {self.resumed}" if self.resumed else ""))
        self.machine.kernel.spawn(self.process, self._conduct)

    def wall(self) -> datetime:
        return EPOCH + timedelta(seconds=self.machine.kernel.now_s) + self.skew

    def _conduct(self) -> None:
        machine = self.machine
        store = Store(machine.engine, self.wall, machine.signer)
        ledger = Ledger(machine.engine, self.wall, machine.signer)
        values = {**machine.settings, **({"resume-run": self.resumed} if self.resumed else {})}
        grid = Grid(machine.network, self.number, values, machine.history.heard)
        grid.pushed, grid.looked = self._pushed, self._looked
        try:
            export = conduct(
                Start(
                    values, self.name, "deployment", grid, store, machine.artifacts, machine.home / "runs",
                    _Clock(self), ledger=ledger, connect=self._connect, lease=self._lease, now=self.wall,
                    entropy=machine.entropy, watch=_unwatched,
                )
            )  # fmt: skip
            self.outcome = f"finished with round {export.round}: {export.adapter_sha256[:12]}"
        except AT_REST as error:
            self.outcome = f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001 - whatever it is, it must be told as this seed's
            self.outcome = f"{type(error).__name__}: {error}"
            if not (isinstance(error, StorageError) and any(words in str(error) for words in (FULL, NOTHING_LEFT))):
                machine.history.refute(f"{self.process.name} ended by its own fault: {self.outcome}")
        self.process.alive = False
        machine.kernel.say(f"{self.process.name} ends: {self.outcome}")
        machine.kernel.kill(self.process)
        self.operator.ended(self)

    def _connect(self, addresses: str, patience_s: float) -> Trunk:
        kernel = self.machine.kernel
        channel = TrunkChannel(self.machine.trunk, "driver", self._excused)
        return Trunk(
            addresses, patience_s=patience_s, channel=channel, monotonic=lambda: kernel.now_s, sleep=kernel.sleep
        )

    @contextmanager
    def _lease(self, store: Store, run_id: str) -> Iterator[Lease]:
        kernel, over = self.machine.kernel, list[bool]()
        lease = Lease(store, run_id, lambda: kernel.now_s)

        def wait(seconds: float) -> bool:
            kernel.sleep(seconds)
            return bool(over)

        kernel.spawn(self.process, lambda: lease.beat(RENEW_S, wait))
        try:
            yield lease
        finally:
            over.append(True)
            lease.end()

    def _pushed(self, message: Message) -> None:
        secure = message.content.get("secure")
        if isinstance(message.content.get("round"), ConfigRecord):
            self.waits_for = "training"
        elif not self.waits_for or not isinstance(secure, ConfigRecord) or "join" not in secure:
            self.waits_for = "stage"  # who is asked for keys beside a training waits for it too
        self.machine.history.pushed(message)

    def _looked(self) -> None:
        """Who looks for clients waits in no exchange."""
        if self.waits_for:
            self.waits_for = ""
            self._acts()

    # ---- every place that the process comes by -----------------------------------------------------------------------

    def _visit(self, place: str) -> None:
        kernel, network = self.machine.kernel, self.machine.network
        kernel.say(f"{self.process.name} {place}")
        self._note(place)
        if network.strikes(network.weather.driver_killed):
            self.outcome = f"killed at {place}"
            kernel.at(0.0, lambda: self.operator.ended(self))
            kernel.die_at(place)
        network.spoil_disk(place)
        committed = place.endswith(".after") and place.startswith(("sql", "ledger"))
        if committed and network.strikes(network.weather.commit_ack_lost):
            kernel.say(f"the database's answer is lost at {place}")
            raise ConnectionFailedError("the database's answer was lost")
        if not place.endswith("uncommitted") and network.strikes(network.weather.driver_still):
            seconds = network.rng.choice((0.5, 5.0, 30.0, 90.0))
            kernel.say(f"{self.process.name} stands still for {seconds} s")
            self._excused(seconds)
            self.operator.misses(seconds)
            kernel.stand_still(self.process, seconds)

    def _note(self, place: str) -> None:
        kind, _, moment = place.rpartition(".")
        if "renew_lease" not in place:
            if not place.startswith("trunk.call") or not self.waits_for:
                self._acts()
            if not place.startswith(_IN_EXCHANGE):
                self.waits_for = ""
        if moment == "after" and kind.startswith("sql."):
            self._wrote(kind.removeprefix("sql."))
        if place == "ledger.after":
            self._reserved()

    def _wrote(self, what: str) -> None:
        """A transaction was committed: by the run's driver, and by no other."""
        machine = self.machine
        if what in ("create_run", "resume_run"):
            self.run_id = machine.books.run_driven_by(self.name)
        if not self.run_id:
            return
        status, driver, *_ = machine.books.run(self.run_id)
        if what == "resume_run" and machine.status.get(self.run_id) == "running":
            left_s = machine.leased_until_s[self.run_id] - machine.kernel.now_s
            if left_s > 2 * machine.network.weather.skew_s:
                machine.history.refute(f"{self.process.name} took over a run whose driver had {left_s:.1f} s left")
        if driver == self.name:
            machine.status[self.run_id] = status
            if what in ("create_run", "resume_run", "renew_lease"):
                machine.leased_until_s[self.run_id] = machine.kernel.now_s + LEASE_S
        elif what not in _UNDRIVEN or machine.status.get(self.run_id) != status:
            machine.history.refute(f"{self.process.name} wrote {what} to a run that {driver} drives")
        if what in ("commit_round", "open_round", "resume_run"):
            machine.history.look(self.run_id)

    def _reserved(self) -> None:
        machine = self.machine
        before, machine.reserved = machine.reserved, machine.books.reserved()
        if machine.reserved > before and self.run_id:
            driver = machine.books.run(self.run_id)[1]
            if driver != self.name:
                machine.history.refute(f"{self.process.name} charged for a run that {driver} drives")

    # ---- no wait passes its deadline ---------------------------------------------------------------------------------

    def _acts(self) -> None:
        self.acted_s = self.machine.kernel.now_s

    def _excused(self, seconds: float) -> None:
        """That long it could do nothing, or nothing that it waits for could come."""
        self.acted_s = max(self.acted_s, self.machine.kernel.now_s) + seconds

    def require_moving(self) -> None:
        """Refute a wait that is longer than what is waited for may take."""
        settings, waited_s = self.machine.settings, self.machine.kernel.now_s - self.acted_s
        training_s, stage_s = (float(str(settings[key])) for key in ("round-timeout-s", "secagg-stage-timeout-s"))
        node_s = float(str(settings["node-wait-s"]))
        limit_s = {"training": training_s, "stage": stage_s}.get(self.waits_for, 2 * node_s + stage_s) + SLACK_S
        if waited_s > limit_s:
            waits_for = self.waits_for or "for clients"
            self.machine.history.refute(
                f"{self.process.name} has waited {waited_s:.1f} s ({waits_for}, at most {limit_s:g})"
            )


@contextmanager
def _unwatched(run: Watched) -> Iterator[tuple[Audience, Callable[[], None]]]:
    """No event files and no metrics: they go by the wall's clock, and nothing of a run rests on them."""
    yield Audience(), lambda: None


class _Clock(VirtualClock):
    """A life's clock, which looks at how long it has waited."""

    def __init__(self, life: Life) -> None:
        super().__init__(life.machine.kernel)
        self._life = life

    def sleep(self, seconds: float) -> None:
        self._life.require_moving()
        super().sleep(seconds)


@dataclass
class Operator:
    """Starts a run, and resumes it until it has finished. In bad weather also at the wrong moment, and stops it."""

    machine: Machine
    lives: list[Life] = field(default_factory=list)
    in_calm: int = 0
    due: bool = False

    def begin(self) -> None:
        weather = self.machine.network.weather
        self._start("")
        for moment_s in weather.meddles_s:
            self.machine.kernel.at(moment_s, self._meddle)
        for moment_s in weather.stops_s:
            self.machine.kernel.at(moment_s, self._stop)

    @property
    def run_id(self) -> str:
        """The run that there is: those that were refused before they began do not count."""
        begun = [run_id for run_id in self.machine.books.runs() if self.machine.books.run(run_id)[3]]
        return begun[-1] if begun else ""

    @property
    def done(self) -> bool:
        run_id = self.run_id
        if not run_id or self._driving():
            return False
        status, _, reason, _ = self.machine.books.run(run_id)
        return status == "finished" or (status == "failed" and SPENT in (reason or ""))

    def _driving(self) -> list[Life]:
        return [life for life in self.lives if not life.outcome]

    def _start(self, resumed: str) -> None:
        self.in_calm += self.machine.kernel.now_s > self.machine.network.weather.clears_s
        if self.in_calm > CALM_LIVES:
            self.machine.history.refute(f"the run has not finished, though {CALM_LIVES} lives began in calm weather")
            return
        life = Life(self.machine, len(self.lives) + 1, resumed, self)
        self.lives.append(life)
        life.begin()

    def misses(self, seconds: float) -> None:
        """A driver will not be heard for so long: it may look dead to who watches it."""
        rng = self.machine.network.rng
        if seconds > LEASE_S and rng.random() < 0.7:
            self.machine.kernel.at(rng.uniform(LEASE_S, seconds), self._meddle)

    def ended(self, life: Life) -> None:
        """Have the run go on, if nobody drives it."""
        if not self.due and not self._driving():
            self.due = True
            self.machine.kernel.at(self.machine.network.rng.uniform(1.0, 15.0), self._again)

    def _again(self) -> None:
        self.due = False
        if not self._driving() and not self.done:
            self._start(self.run_id)

    def _meddle(self) -> None:
        if self.run_id:
            self.machine.kernel.say("somebody resumes the run, whoever drives it")
            self._start(self.run_id)

    def _stop(self) -> None:
        """As `trunkline runs stop` does, from a process of its own."""
        run_id, kernel = self.run_id, self.machine.kernel
        if run_id and self.machine.books.run(run_id)[0] == "running":
            kernel.say("the run is stopped by ada")
            store = Store(self.machine.engine, lambda: EPOCH + timedelta(seconds=kernel.now_s))
            store.finish_run(run_id, "stopped", "stopped by ada")
            self.machine.status[run_id] = "stopped"
