"""The privacy ledger: what each unit may spend and has spent, reserved before anything leaves, in chains of rows.

The rows are said in storage.ledger_rows, their chains in storage.ledger_chain. No epsilon is stored; an accountant
recomputes it from the releases that are counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from sqlalchemy import Engine, bindparam, case, func, select
from sqlalchemy.orm import Session

from contract.errors import BudgetError, LedgerError
from contract.privacy_records import RUN_PREFIX, Budget, PricedRelease, Standing, Unit, chosen_by_person
from storage import audit_log, leases, ledger_heads, schema
from storage.engine import in_turn, make_engine, storable, storage_errors
from storage.home import database_url
from storage.ledger_audit import audit
from storage.ledger_chain import unit_id_of
from storage.ledger_report import report_of
from storage.ledger_rows import COLUMNS, budget_row, reserved_row
from storage.ledger_settlement import settle_in
from storage.ledger_standings import Standings, all_budgets
from storage.ledger_tables import NAMED, ROWS, TALLIES, UNITS, chunks
from storage.ledger_writer import LedgerWriter, moment, take_turn
from storage.records import Account, Charge, Deed, HeadSigner, LedgerRow, Refusal, Settled, SignedHead
from storage.revisions import opened_for_writing, require_current
from storage.store import Clock, utc_now

Admit = Callable[[Standing, Sequence[PricedRelease]], None]
"""Raises BudgetError where a unit of this standing cannot afford the releases; it may be asked twice."""
_ROWS_AT_ONCE = 1000
_RESERVED = select(ROWS.c.unit_id, ROWS.c.channel).where(
    ROWS.c.run == bindparam("of_run"),
    ROWS.c.round == bindparam("of_round"),
    ROWS.c.attempt == bindparam("of_attempt"),
    ROWS.c.state == "RESERVED",
    ROWS.c.unit_id.in_(NAMED),
)


def open_ledger(url: str | None = None, clock: Clock = utc_now, signer: HeadSigner | None = None) -> Ledger:
    """Open the ledger in the database at `url`; storage.revisions.opened_for_writing says which, and what it raises."""
    return Ledger(opened_for_writing(url), clock, signer)


def open_ledger_to_read(url: str | None = None) -> Ledger:
    """The ledger in the database at `url` (default as in open_store), which is neither made nor changed.

    Raises SchemaError where the database is absent or not of this code's schema, else as open_store.
    """
    engine = make_engine(url or database_url())
    with storage_errors(engine):
        require_current(engine)
    return Ledger(engine)


class Ledger:
    """Appends to the ledger and reads it. Each method is one transaction: all of its changes or, when it raises, none.

    Several processes may use one ledger at once. All methods raise StorageError where the database cannot be used.
    With a `signer` the heads of chains are signed whenever charges are settled or a budget changes.
    """

    def __init__(self, engine: Engine, clock: Clock = utc_now, signer: HeadSigner | None = None) -> None:
        self._engine = engine
        self._clock = clock
        self._signer = signer

    def close(self) -> None:
        """Give the database's connections back."""
        self._engine.dispose()

    def reserve(self, charges: Sequence[Charge], admit: Admit, *, driver: str | None = None) -> list[Refusal]:
        """Reserve what is about to be released, of each unit all of its charges or none; durable on return.

        `admit` is asked for each unit, with what it proposes to release, and refuses it by BudgetError: nothing is
        written for that unit, and the others go on. Any other error of it reserves nothing at all. Answers who was
        refused. Raises LedgerError for a charge that was reserved already, whatever became of it; LeaseError, with the
        Flower run of a `driver`, where the charges' run is another's by now.
        """
        by_unit: dict[Unit, list[Charge]] = {}
        for charge in charges:
            by_unit.setdefault(charge.unit, []).append(charge)
        _refuse_twice(charges)
        if not charges:
            return []
        run_id = charges[0].run

        def work(session: Session) -> list[Refusal]:
            if driver is not None and (run := session.get(schema.Run, run_id)) is not None:
                leases.require_driver(run, driver)
            return self._reserve(session, by_unit, admit)

        return in_turn(self._engine, work)

    def _reserve(self, session: Session, by_unit: Mapping[Unit, Sequence[Charge]], admit: Admit) -> list[Refusal]:
        take_turn(session)
        writer = LedgerWriter(session, map(unit_id_of, by_unit))
        _refuse_reserved(session, by_unit)
        standings = Standings(session, list(by_unit))
        now = moment(self._clock())
        refusals = []
        for unit, charges in by_unit.items():
            try:
                admit(standings.of(unit), [charge.release for charge in charges])
            except BudgetError as error:
                refusals.append(Refusal(unit, str(error)))
                continue
            standings.spend(charges)
            for charge in charges:
                writer.append(reserved_row(charge, now))
        writer.write()
        return refusals

    def settle(
        self, run: str, round: int, attempt: int, state: Settled, units: Iterable[Unit] | None = None
    ) -> None:  # fmt: skip
        """Settle what an attempt reserved and has not settled, of all units or of these; see settle_in for what raises.

        VOID only where provably nothing left.
        """
        named = None if units is None else list(units)
        key = (run, round, attempt)
        in_turn(
            self._engine,
            lambda session: settle_in(session, key, state, at=self._clock(), units=named, signer=self._signer),
        )

    def set_budget(self, unit: Unit, budget: Budget, operator: str, reason: str) -> None:
        """Set a unit's budget, for the first time or anew; a dataset of ALL_DATASETS is for all of a client's together.

        What a person sets is in the audit log too. Raises LedgerError for an empty operator or reason, and for numbers
        that bound nothing.
        """
        told = {"dataset": unit.dataset, "level": unit.level, "epsilon": budget.epsilon, "delta": budget.delta}
        deed = Deed(operator, "budget-set", unit.client, {**told, "reason": storable(reason)})

        def work(session: Session) -> None:
            self._set_budgets(session, [unit], budget, operator, reason, anew=True)
            if chosen_by_person(operator):
                audit_log.note(session, deed, self._clock())

        in_turn(self._engine, work)

    def register_budgets(self, units: Iterable[Unit], budget: Budget, run_id: str) -> None:
        """Set the budget of those units that never had one, as a run does when it is created."""
        named, operator = list(units), f"{RUN_PREFIX}{run_id}"
        reason = "the budget that the run was created with"
        in_turn(self._engine, lambda session: self._set_budgets(session, named, budget, operator, reason, anew=False))

    def _set_budgets(
        self, session: Session, units: Sequence[Unit], budget: Budget, operator: str, reason: str, *, anew: bool
    ) -> None:
        take_turn(session)
        ids = {unit_id_of(unit): unit for unit in units}
        writer = LedgerWriter(session, ids)
        now, row = self._clock(), schema.PrivacyRow
        made: dict[str, int] = {}
        for some in chunks(ids):
            of_budgets = select(row.unit_id, func.max(row.round)).where(row.unit_id.in_(some), row.run == "")
            for unit_id, ordinal in session.execute(of_budgets.group_by(row.unit_id)):
                made[unit_id] = ordinal
        for unit_id, unit in ids.items():
            ordinal = made.get(unit_id, 0) + 1
            if anew or ordinal == 1:
                told = budget_row(unit, ordinal, budget, storable(operator), storable(reason), moment(now))
                writer.append(told)
        writer.write()
        if self._signer is not None:
            writer.sign(self._signer, now)

    def standing(self, unit: Unit) -> Standing:
        """What a unit may spend and has spent; a unit that the ledger does not know has spent nothing."""
        return self.standings([unit])[unit]

    def standings(self, units: Collection[Unit]) -> dict[Unit, Standing]:
        """What each of `units` may spend and has spent, read at once."""
        with self._reading() as session:
            found = Standings(session, list(units))
            return {unit: found.of(unit) for unit in units}

    def units(self) -> list[Unit]:
        """Every unit that was charged or given a budget, by client, dataset and level."""
        unit = schema.PrivacyUnit
        with self._reading() as session:
            found = session.execute(select(unit.client, unit.dataset, unit.level)).all()
        units = [Unit(client, dataset, level) for client, dataset, level in found]
        return sorted(units, key=lambda one: (one.client, one.dataset, one.level))

    def charged_clients(self) -> set[str]:
        """Every client of whose datasets any has spent something."""
        query = select(UNITS.c.client).join(TALLIES, TALLIES.c.unit_id == UNITS.c.unit_id).where(TALLIES.c["count"] > 0)
        with self._reading() as session:
            return set(session.scalars(query.distinct()))

    def budgets(self) -> dict[Unit, Budget]:
        """The budgets in force."""
        with self._reading() as session:
            units, budgets = self._units_by_id(session), all_budgets(session)
            return {units[unit_id]: budget for unit_id, budget in budgets.items()}

    def rows(self, unit: Unit) -> Iterator[LedgerRow]:
        """A unit's rows, the first one first; a few at a time, so that nobody waits for who reads them."""
        row, seq = schema.PrivacyRow, 0
        query = select(*(getattr(row, name) for name in COLUMNS)).where(row.unit_id == unit_id_of(unit))
        while True:
            with self._reading() as session:
                some = session.execute(query.where(row.seq > seq).order_by(row.seq).limit(_ROWS_AT_ONCE)).all()
            if not some:
                return
            for found in some:
                taken = LedgerRow(*found)
                yield taken
                seq = taken.seq

    def accounts(self, run: str | None = None) -> list[Account]:
        """How often each unit spent each release in each run, or in one, counted by one query over the rows themselves.

        In no order; what was all given back is left out.
        """
        row = schema.PrivacyRow
        # As an expression no index serves the grouping: SQLite then reads the table once, in its own order, rather
        # than every row through the index, which takes twice as long.
        unit_id = row.unit_id.concat("")
        count = func.sum(case((row.state == "RESERVED", 1), else_=-1))
        query = select(unit_id, row.run, row.release, count, func.max(row.round))
        query = query.where(row.state.in_(("RESERVED", "VOID"))).group_by(unit_id, row.run, row.release)
        if run is not None:
            query = query.where(row.run == run)
        with self._reading() as session:
            units = self._units_by_id(session)
            found = session.execute(query).all()
        if strangers := {unit_id for unit_id, *_ in found} - units.keys():
            raise LedgerError(f"unit {min(strangers)[:16]} has rows but is none: `trunkline budget verify` tells more")
        return [Account(units[name], of, text, int(times), last) for name, of, text, times, last in found if times]

    def heads(self, unit: Unit | None = None) -> list[SignedHead]:
        """The signed heads of one chain or of all, oldest first in each."""
        with self._reading() as session:
            return ledger_heads.read_heads(session, "own", None if unit is None else unit_id_of(unit))

    def newest_heads(self, units: Iterable[Unit]) -> dict[Unit, SignedHead]:
        """The last signed head of each chain, read at once; a unit whose chain has none is left out."""
        named = {unit_id_of(unit): unit for unit in units}
        with self._reading() as session:
            found = ledger_heads.newest_heads(session, named)
        return {named[head.unit_id]: head for head in found}

    def peer_heads(self, unit: Unit | None = None) -> list[SignedHead]:
        """The newest head that each peer sent of its chain of one unit, or of each."""
        with self._reading() as session:
            found = ledger_heads.read_heads(session, "peer", None if unit is None else unit_id_of(unit))
        return ledger_heads.newest_of_each(found)

    def note_peer_head(self, unit: Unit, head: SignedHead) -> None:
        """Keep a head that a peer sent of its chain of `unit`; see ledger_heads.note_peer_head for what raises.

        The caller decides whose heads to keep: one that any key signed is kept.
        """
        in_turn(self._engine, lambda session: ledger_heads.note_peer_head(session, unit, head, self._clock()))

    def verify(self, outside: Iterable[SignedHead] = (), signers: Collection[str] = ()) -> list[str]:
        """What is wrong with the ledger, one line each that names unit and row; empty where it is sound.

        Every chain is walked: hashes, numbers without a gap, columns against the release, transitions, tallies, where
        each unit ends, and all signed heads. `outside` are heads that others hold of this ledger's chains; where
        `signers` are named, a head that another key signed is told of. Rows cut off together with all that speaks of
        them, heads included, leave a ledger that is sound in itself: only heads from outside tell of that.
        """
        with self._reading(consistent=True) as session:
            return audit(session, outside, signers)

    def report(self, client: str | None = None) -> dict[str, object]:
        """The ledger, of one client or of all, as storage.ledger_report says; it is held in memory as a whole."""
        with self._reading(consistent=True) as session:
            return report_of(session, client)

    @contextmanager
    def _reading(self, consistent: bool = False) -> Iterator[Session]:
        """A transaction that reads; `consistent` over several queries on PostgreSQL too, as SQLite always is."""
        engine = self._engine
        if consistent and engine.dialect.name == "postgresql":
            engine = engine.execution_options(isolation_level="REPEATABLE READ")
        with storage_errors(engine), Session(engine) as session, session.begin():
            yield session

    @staticmethod
    def _units_by_id(session: Session) -> dict[str, Unit]:
        unit = schema.PrivacyUnit
        found = session.execute(select(unit.unit_id, unit.client, unit.dataset, unit.level))
        return {unit_id: Unit(client, dataset, level) for unit_id, client, dataset, level in found}


def _refuse_twice(charges: Sequence[Charge]) -> None:
    seen = set()
    for charge in charges:
        key = (charge.unit, charge.run, charge.round, charge.attempt, charge.release.channel)
        if key in seen:
            raise LedgerError(f"{_shown(charge)} is charged twice in one reservation")
        seen.add(key)


def _refuse_reserved(session: Session, by_unit: Mapping[Unit, Sequence[Charge]]) -> None:
    """Raise LedgerError where one of the charges is in the ledger already."""
    wanted: dict[tuple[str, int, int], dict[tuple[str, str], Charge]] = {}
    for unit, charges in by_unit.items():
        for charge in charges:
            key = (charge.run, charge.round, charge.attempt)
            wanted.setdefault(key, {})[unit_id_of(unit), charge.release.channel] = charge
    for (run, number, attempt), named in wanted.items():
        for some in chunks(dict.fromkeys(unit_id for unit_id, _ in named)):
            of_attempt = {"of_run": run, "of_round": number, "of_attempt": attempt, "named": some}
            for found in session.execute(_RESERVED, of_attempt):
                if tuple(found) in named:
                    raise LedgerError(f"{_shown(named[found[0], found[1]])} is in the ledger already")


def _shown(charge: Charge) -> str:
    unit = charge.unit
    return (
        f"{charge.release.channel} of client {unit.client}, dataset {unit.dataset} for attempt {charge.attempt} at "
        f"round {charge.round} of run {charge.run}"
    )
