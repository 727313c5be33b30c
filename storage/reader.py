"""Everything that is read from the database, by the commands and while a run writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Engine, Select, and_, func, or_, select, tuple_
from sqlalchemy.orm import Session

from contract.errors import StorageError
from storage import audit_log, schema
from storage.engine import storage_errors
from storage.identities import client_of_node, present
from storage.records import (
    AdapterVersionRow,
    AuditRow,
    ClientHistory,
    ClientRow,
    EventRow,
    IdentityRow,
    MetricRow,
    NodeBindingRow,
    ParticipationCount,
    ParticipationRow,
    RosterRow,
    RoundRow,
    RunRow,
    RunStatus,
)

LAST = "last"
_ANSWERED = ("trained", "refused")
"""The outcomes of a round that a client must have been there for."""
_Record = TypeVar("_Record")


class Reader:
    """Reads runs. Each method is one short transaction that sees one consistent state and never blocks a writer.

    All methods MUST raise StorageError when the database cannot be read, and for a run that is not there.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def close(self) -> None:
        """Give the database's connections back."""
        self._engine.dispose()

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with storage_errors(self._engine), Session(self._engine) as session, session.begin():
            yield session

    def get_run(self, reference: str) -> RunRow:
        """The run with this id or Flower id, or the newest one for "last"."""
        found = self.find_run(reference)
        if found is None:
            what = "there is no run yet" if reference == LAST else f"there is no run {reference}"
            raise StorageError(f"{what}; `trunkline runs list` shows those there are")
        return found

    def find_run(self, reference: str) -> RunRow | None:
        """As get_run; None where there is no such run."""
        with self._reading() as session:
            newest_first = _runs().limit(1)
            found = None
            if reference == LAST:
                found = session.execute(newest_first).first()
            else:
                for column in (schema.Run.run_id, schema.Run.flower_run_id):
                    found = found or session.execute(newest_first.where(column == reference)).first()
            return None if found is None else _run_row(*found)

    def run_by_flower_id(self, flower_run_id: str) -> RunRow | None:
        """The newest run that this Flower run drives, or None."""
        with self._reading() as session:
            found = session.execute(_runs().where(schema.Run.flower_run_id == flower_run_id).limit(1))
            newest = found.first()
            return None if newest is None else _run_row(*newest)

    def list_runs(
        self, limit: int = 20, status: RunStatus | None = None, *, since: datetime | None = None
    ) -> list[RunRow]:
        """The newest `limit` runs, newest first; of those only that began at `since` or later."""
        query = _runs().limit(limit)
        if since is not None:
            query = query.where(schema.Run.created_at >= since)
        if status is not None:
            query = query.where(schema.Run.status == status)
        with self._reading() as session:
            return [_run_row(*found) for found in session.execute(query)]

    def clients(self) -> list[ClientRow]:
        """Every client ever seen, by node id."""
        with self._reading() as session:
            return [_record(ClientRow, row) for row in session.scalars(select(schema.Client).order_by("node_id"))]

    def rounds(self, run_id: str) -> list[RoundRow]:
        """Every attempt at every round of a run, in order."""
        query = select(schema.Round).where(schema.Round.run_id == run_id)
        with self._reading() as session:
            rows = session.scalars(query.order_by(schema.Round.number, schema.Round.attempt))
            return [_record(RoundRow, row) for row in rows]

    def participations(self, run_id: str, number: int | None = None) -> list[ParticipationRow]:
        """Who took part in a run, or in one round of it, every attempt, by node id within an attempt."""
        row = schema.Participation
        query = select(row, schema.Client.name).join(schema.Client).where(row.run_id == run_id)
        query = query.order_by(row.number, row.attempt, row.node_id)
        values = select(schema.Metric).where(schema.Metric.run_id == run_id, schema.Metric.node_id != "")
        if number is not None:
            query = query.where(row.number == number)
            values = values.where(schema.Metric.number == number)
        with self._reading() as session:
            metrics: dict[tuple[int, int, str], dict[str, float]] = {}
            for value in session.scalars(values.order_by(schema.Metric.name)):
                metrics.setdefault((value.number, value.attempt, value.node_id), {})[value.name] = value.value
            return [
                _record(
                    ParticipationRow, found, name=name,
                    metrics=metrics.get((found.number, found.attempt, found.node_id), {}),
                )
                for found, name in session.execute(query)
            ]  # fmt: skip

    def adapter_versions(self, run_id: str) -> list[AdapterVersionRow]:
        """The adapters of a run, version 0 first."""
        query = select(schema.AdapterVersion).where(schema.AdapterVersion.run_id == run_id)
        with self._reading() as session:
            rows = session.scalars(query.order_by(schema.AdapterVersion.number))
            return [_record(AdapterVersionRow, row) for row in rows]

    def adapter_version(self, run_id: str, number: int) -> AdapterVersionRow:
        """One committed adapter of a run; raises StorageError when that round was not committed."""
        with self._reading() as session:
            found = session.get(schema.AdapterVersion, (run_id, number))
            if found is None:
                raise StorageError(f"run {run_id} has no adapter of round {number}: that round was not committed")
            return _record(AdapterVersionRow, found)

    def invited(self, run_id: str) -> dict[tuple[int, int], int]:
        """How many clients each attempt of a run asked, by (number, attempt)."""
        row = schema.Participation
        query = select(row.number, row.attempt, func.count()).where(row.run_id == run_id)
        with self._reading() as session:
            counted = session.execute(query.group_by(row.number, row.attempt))
            return {(number, attempt): count for number, attempt, count in counted}

    def secure_sums(self, run_id: str) -> set[tuple[int, int]]:
        """Clients and threshold of each secure sum that a run committed, or, where it committed none, began."""
        invited = self.invited(run_id)
        begun = [row for row in self.rounds(run_id) if row.threshold is not None]
        rounds = [row for row in begun if row.status == "committed"] or begun
        return {(invited.get((row.number, row.attempt), 0), row.threshold or 0) for row in rounds}

    def metrics(self, run_id: str, *, over_clients: bool = False) -> list[MetricRow]:
        """Every number recorded for a run, by round; those of aborted attempts are left out.

        With `over_clients` only the values over all clients: a few a round, however many clients there are.
        """
        row, attempt = schema.Metric, schema.Round
        same_attempt = and_(attempt.run_id == row.run_id, attempt.number == row.number, attempt.attempt == row.attempt)
        query = (
            select(row)
            .outerjoin(attempt, same_attempt)
            .where(row.run_id == run_id, or_(attempt.status.is_(None), attempt.status != "aborted"))
            .order_by(row.number, row.attempt, row.node_id, row.name)
        )
        if over_clients:
            query = query.where(row.node_id == "")
        with self._reading() as session:
            return [_record(MetricRow, found, node_id=found.node_id or None) for found in session.scalars(query)]

    def events(self, run_id: str | None = None, limit: int = 100) -> list[EventRow]:
        """The newest `limit` events, of one run or of all, oldest first."""
        query = select(schema.Event).order_by(schema.Event.event_id.desc()).limit(limit)
        if run_id is not None:
            query = query.where(schema.Event.run_id == run_id)
        with self._reading() as session:
            return [_record(EventRow, row) for row in reversed(session.scalars(query).all())]

    def list_identities(self, include_revoked: bool = False) -> list[IdentityRow]:
        """Enrolled clients, by id; with `include_revoked` those too that were revoked."""
        query = select(schema.Identity)
        if not include_revoked:
            query = query.where(schema.Identity.revoked_at.is_(None))
        with self._reading() as session:
            return _by_client_id(session.scalars(query))

    def roster_version(self) -> int:
        """How many changes of identities there were: 0 before the first."""
        with self._reading() as session:
            version: int | None = session.scalar(select(schema.RosterCounter.version))
            return present(version)

    def roster(self) -> RosterRow:
        """Who is enrolled and not revoked, with the version that says so, both of one moment."""
        counter, identity = schema.RosterCounter, schema.Identity
        query = select(counter.version, identity).outerjoin(identity, identity.revoked_at.is_(None))
        with self._reading() as session:
            found = session.execute(query).all()
            version = present(found[0][0] if found else None)
            return RosterRow(version, _by_client_id(row for _, row in found if row is not None))

    def bound_client(self, node_id: str) -> str | None:
        """The client, not revoked, that a node speaks for; None where it has shown none."""
        with self._reading() as session:
            return session.scalar(client_of_node(node_id))

    def node_bindings(self, run_id: str) -> list[NodeBindingRow]:
        """Which clients' nodes made contact in a run, in order, those revoked since included."""
        row = schema.NodeBinding
        query = select(row).where(row.run_id == run_id).order_by(row.bound_at, row.node_id)
        with self._reading() as session:
            return [_record(NodeBindingRow, found) for found in session.scalars(query)]

    def audit_log(
        self, limit: int = 100, *, since: datetime | None = None, operator: str | None = None, action: str | None = None
    ) -> list[AuditRow]:
        """What operators did, the newest `limit` entries, newest first; of those only what each filter lets through."""
        with self._reading() as session:
            return audit_log.newest(session, limit, since=since, operator=operator, action=action)

    def client_history(self, client: str) -> ClientHistory | None:
        """What is known of an enrolled client or, where nobody is enrolled under that name, of a Flower node.

        None where `client` is neither.
        """
        row = schema.NodeBinding
        bound = select(row).where(row.client_id == client).order_by(row.bound_at, row.node_id)
        with self._reading() as session:
            identity = session.get(schema.Identity, client)
            node = session.get(schema.Client, client) if identity is None else None
            if identity is None and node is None:
                return None
            bindings = [_record(NodeBindingRow, found) for found in session.scalars(bound)]
            counts = _participation_counts(session, client, enrolled=identity is not None)
            seen = [binding.bound_at for binding in bindings]
            seen += [count.last_at for count in counts if count.status in _ANSWERED]
            return ClientHistory(
                client,
                None if identity is None else _record(IdentityRow, identity),
                None if node is None else node.first_seen_at,
                _identity_changes(session, client),
                bindings,
                counts,
                max(seen, default=None),
            )


def _identity_changes(session: Session, client: str) -> list[EventRow]:
    """What was done to its identity, oldest first: identities change seldom, so that all changes may be read."""
    row = schema.Event
    changes = select(row).where(row.kind.like("client-%"), row.run_id.is_(None)).order_by(row.event_id)
    return [_record(EventRow, event) for event in session.scalars(changes) if event.detail.get("client_id") == client]


def _participation_counts(session: Session, client: str, *, enrolled: bool) -> list[ParticipationCount]:
    part, attempt, bound = schema.Participation, schema.Round, schema.NodeBinding
    same_attempt = and_(
        attempt.run_id == part.run_id, attempt.number == part.number, attempt.attempt == part.attempt
    )  # fmt: skip
    query = select(part.run_id, part.status, func.count(), func.max(attempt.progress_at)).join(attempt, same_attempt)
    if enrolled:
        spoke_for = select(bound.node_id, bound.run_id).where(bound.client_id == client)
        query = query.where(tuple_(part.node_id, part.run_id).in_(spoke_for))
    else:
        query = query.where(part.node_id == client)
    query = query.group_by(part.run_id, part.status).order_by(part.run_id, part.status)
    return [ParticipationCount(*found) for found in session.execute(query)]


def _runs() -> Select[schema.Run, int | None]:
    """Runs, newest first, each with the number of its newest adapter version."""
    newest = (
        select(func.max(schema.AdapterVersion.number))
        .where(schema.AdapterVersion.run_id == schema.Run.run_id)
        .scalar_subquery()
    )
    return select(schema.Run, newest).order_by(schema.Run.created_at.desc(), schema.Run.run_id.desc())


def _run_row(run: schema.Run, newest: int | None) -> RunRow:
    return _record(RunRow, run, committed_rounds=newest or 0)


def _by_client_id(found: Iterable[schema.Identity]) -> list[IdentityRow]:
    """Sorted here: the databases have orders of their own."""
    return sorted((_record(IdentityRow, row) for row in found), key=lambda identity: identity.client_id)


def _record(kind: type[_Record], row: object, **computed: Any) -> _Record:
    """A record filled from the table row's columns of the same names, and from `computed`."""
    names = (column.name for column in fields(kind))  # type: ignore[arg-type]
    return kind(**{name: computed[name] if name in computed else getattr(row, name) for name in names})
