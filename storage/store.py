"""Everything that is written to the database: one writer drives a run, and a round's commit is one transaction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, func, select, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import Session

from contract.errors import LeaseError, StorageError
from contract.failpoint import failpoint
from storage import audit_log, identities, leases, schema
from storage.engine import bound_statements, for_writing, make_engine, opened_engine, storable, storage_errors
from storage.home import database_url
from storage.ledger_settlement import settle_in
from storage.reader import Reader
from storage.records import Deed, EndStatus, HeadSigner, Outcome, RoundCommit, RunMode, RunRow
from storage.revisions import current_revision, opened_for_writing, require_current

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)


def open_store(url: str | None = None, clock: Clock = utc_now, signer: HeadSigner | None = None) -> Store:
    """Open the database at `url` for writing; storage.revisions.opened_for_writing says which, and what it raises.

    `signer` signs the heads of the ledger's chains when a round is committed.
    """
    return Store(opened_for_writing(url), clock, signer)


def has_database(url: str | None = None) -> bool:
    """Whether there is a Trunkline database at `url` (default as in open_store); raises as open_store."""
    with opened_engine(url or database_url()) as engine:
        return current_revision(engine) is not None


def open_present_store(url: str | None = None) -> Store:
    """As open_store, but StorageError where there is no database: what only tells of one must not make one."""
    open_reader(url).close()
    return open_store(url)


def open_reader(url: str | None = None) -> Reader:
    """Open the database at `url` (default as in open_store) for reading; raises as open_store; makes no database."""
    engine = make_engine(url or database_url())
    with storage_errors(engine):
        require_current(engine)
    return Reader(engine)


class Store(Reader):
    """Writes runs. Each method MUST be one transaction: all of its changes or, when it raises, none.

    Several processes may write to one database at once, each its own run; a write waits its turn, for at most
    `engine.BUSY_TIMEOUT_S` seconds. All methods MUST raise StorageError when the database cannot be written.
    Values of metrics MUST be finite. A run that has ended MUST NOT change, its events aside, until it is resumed.
    What is written to a run that this store created or resumed MUST raise LeaseError once another one resumed it.
    """

    def __init__(self, engine: Engine, clock: Clock = utc_now, signer: HeadSigner | None = None) -> None:
        super().__init__(engine)
        self._writer = for_writing(engine)
        self._clock = clock
        self._signer = signer
        self._driven: dict[str, str] = {}

    @contextmanager
    def _writing(self, what: str) -> Iterator[Session]:
        failpoint(f"sql.{what}.before")
        with storage_errors(self._engine), Session(self._writer) as session, session.begin():
            yield session
            session.flush()
            failpoint(f"sql.{what}.uncommitted")
        failpoint(f"sql.{what}.after")

    def create_run(
        self, run_id: str, flower_run_id: str, config: Mapping[str, Any], mode: RunMode, model_fingerprint: str,
        refused: str | None = None,
    ) -> RunRow:  # fmt: skip
        """Add a running run and hold its lease; one that could not start, for the reason `refused`, has failed at once.

        MUST raise StorageError when the id is taken. `config` is plain JSON.
        """
        with self._writing("create_run") as session:
            if session.get(schema.Run, run_id) is not None:
                raise StorageError(f"there is a run {run_id} already")
            now = self._clock()
            run = schema.Run(
                run_id=run_id, mode=mode, status="running" if refused is None else "failed", reason=storable(refused),
                config=dict(config), model_fingerprint=model_fingerprint, created_at=now,
                ended_at=None if refused is None else now,
            )  # fmt: skip
            leases.begin(run, flower_run_id, now)
            session.add(run)
        self._driven[run_id] = flower_run_id
        return self.get_run(run_id)

    def resume_run(self, run_id: str, flower_run_id: str) -> RunRow:
        """Let `flower_run_id` drive a run on whose driver is gone; an attempt that it left open is aborted.

        MUST raise LeaseError while another one's lease holds, StorageError for a run that has finished.
        """
        with self._writing("resume_run") as session:
            run, now = _locked_run(session, run_id), self._clock()
            leases.require_resumable(run_id, run.status, run.lease_until, now)
            opened = session.scalar(select(schema.Round).where(_open_round_of(run_id)))
            if opened is not None:
                _abort(opened, "interrupted; the run was resumed", now)
            told = {"from": run.flower_run_id, "to": flower_run_id, "was": run.status, "reason": run.reason}
            session.add(schema.Event(run_id=run_id, kind="resumed", message="the run goes on", detail=told, at=now))
            run.status, run.reason, run.ended_at = "running", None, None
            leases.begin(run, flower_run_id, now)
        self._driven[run_id] = flower_run_id
        return self.get_run(run_id)

    def renew_lease(self, run_id: str) -> None:
        """Hold a run that this store created or resumed for another while; tried for no longer than that."""
        with self._writing("renew_lease") as session:
            bound_statements(session.connection(), leases.LEASE_S)
            leases.renew(self._driven_run(session, run_id), self._clock())

    def finish_run(
        self,
        run_id: str,
        status: EndStatus,
        reason: str | None = None,
        *,
        flower_run_id: str | None = None,
        deed: Deed | None = None,
    ) -> bool:
        """End a run; its open round, if any, is aborted with it. True if this call ended it, and then `deed` is noted.

        The first ending MUST stay: on a run that has ended this changes nothing and answers False; so it does, with
        `flower_run_id`, where another Flower run drives the run by now.
        """
        with self._writing("finish_run") as session:
            run = _locked_run(session, run_id)
            if run.status != "running" or flower_run_id not in (None, run.flower_run_id):
                return False
            now = self._clock()
            run.status, run.reason, run.ended_at = status, storable(reason), now
            opened = session.scalar(select(schema.Round).where(_open_round_of(run_id)))
            if opened is not None:
                _abort(opened, f"the run {status}" + (f": {reason}" if reason else ""), now)
            if deed is not None:
                audit_log.note(session, deed, now)
            return True

    def add_client(self, node_id: str, name: str | None = None) -> None:
        """Remember a client; once more changes nothing but its name, where one is given."""
        with self._writing("add_client") as session:
            self._add_clients(session, [node_id])
            if name is not None:
                session.execute(
                    update(schema.Client).where(schema.Client.node_id == node_id).values(name=storable(name))
                )

    def _add_clients(self, session: Session, node_ids: Iterable[str]) -> None:
        insert = postgresql_insert if self._engine.dialect.name == "postgresql" else sqlite_insert
        now = self._clock()
        # Two runs may meet the same clients at once: in one order, or each could wait for the other.
        rows = [{"node_id": node_id, "first_seen_at": now} for node_id in sorted(set(node_ids))]
        if rows:
            session.execute(insert(schema.Client).values(rows).on_conflict_do_nothing())

    def add_adapter_version(self, run_id: str, number: int, client_sha256: str, trunk_sha256: str) -> None:
        """Add the adapter that a run begins with, version 0. Later versions come by commit_round alone."""
        if number != 0:
            raise StorageError(
                f"adapter version {number} comes by committing round {number}; only 0 is added by itself"
            )
        with self._writing("add_adapter_version") as session:
            self._driven_run(session, run_id)
            if session.get(schema.AdapterVersion, (run_id, 0)) is not None:
                raise StorageError(f"run {run_id} has its first adapter already")
            session.add(
                schema.AdapterVersion(
                    run_id=run_id, number=0, client_sha256=client_sha256, trunk_sha256=trunk_sha256,
                    trained_tokens=0, created_at=self._clock(),
                )
            )  # fmt: skip

    def open_round(self, run_id: str, number: int, cohort: Sequence[str], threshold: int | None = None) -> int:
        """Open round `number` with every node of `cohort` invited, and answer the attempt's number, 1 for the first.

        `threshold` is how many of them its secure sum needs, None for a sum that is none.
        MUST raise StorageError unless `number` follows the newest adapter version. An attempt that is still open is
        what a crash left: it is aborted.
        """
        with self._writing("open_round") as session:
            self._driven_run(session, run_id)
            newest = session.scalar(
                select(func.max(schema.AdapterVersion.number)).where(schema.AdapterVersion.run_id == run_id)
            )
            if newest is None or number != newest + 1:
                due = "its first adapter" if newest is None else f"round {newest + 1}"
                raise StorageError(f"round {number} of run {run_id} cannot open: {due} comes next")
            of_round = (schema.Round.run_id == run_id, schema.Round.number == number)
            before = session.scalar(select(func.max(schema.Round.attempt)).where(*of_round)) or 0
            now = self._clock()
            left_open = session.scalar(select(schema.Round).where(_open_round_of(run_id)))
            if left_open is not None:
                _abort(left_open, "interrupted; the round was attempted again", now)
                session.flush()  # only one open round fits
            attempt = before + 1
            session.add(_fresh_round(run_id, number, attempt, threshold, now))
            self._add_clients(session, cohort)
            session.flush()
            key = {"run_id": run_id, "number": number, "attempt": attempt}
            session.add_all(schema.Participation(**key, node_id=node, status="invited") for node in set(cohort))
            return attempt

    def record_progress(
        self,
        run_id: str,
        number: int,
        attempt: int,
        *,
        phase: str,
        replies: int,
        steps: int,
        tokens: int,
        received_bytes: int,
        sent_bytes: int,
    ) -> None:
        """Set an open attempt's phase and counters, as they stand."""
        values = {
            "phase": phase,
            "replies": replies,
            "steps": steps,
            "tokens": tokens,
            "received_bytes": received_bytes,
            "sent_bytes": sent_bytes,
        }
        with self._writing("record_progress") as session:
            opened = self._open_attempt(session, run_id, number, attempt)
            if any(getattr(opened, name) != value for name, value in values.items()):
                for name, value in values.items():
                    setattr(opened, name, value)
                opened.progress_at = self._clock()

    def record_participation(
        self,
        run_id: str,
        number: int,
        attempt: int,
        node_id: str,
        status: Outcome,
        reason: str | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Set what a client of the open attempt's cohort did, with its own metrics."""
        with self._writing("record_participation") as session:
            self._open_attempt(session, run_id, number, attempt)
            row = session.get(schema.Participation, (run_id, number, attempt, node_id))
            if row is None:
                raise StorageError(f"client {node_id} is not in the cohort of round {number} of run {run_id}")
            row.status, row.reason = status, storable(reason)
            self._set_metrics(session, (run_id, number, attempt, node_id), metrics or {})

    def record_metrics(self, run_id: str, number: int, node_id: str | None, values: Mapping[str, float]) -> None:
        """Set numbers outside any attempt, for one client or, with None, over all; `number` is an adapter version."""
        with self._writing("record_metrics") as session:
            self._driven_run(session, run_id)
            self._set_metrics(session, (run_id, number, 0, node_id or ""), values)

    def _set_metrics(self, session: Session, key: tuple[str, int, int, str], values: Mapping[str, float]) -> None:
        run_id, number, attempt, node_id = key
        now = self._clock()
        for name, value in values.items():
            if not math.isfinite(value):
                raise StorageError(f"metric {name} of round {number} is {value}; only finite numbers are kept")
            session.merge(
                schema.Metric(
                    run_id=run_id, number=number, attempt=attempt, node_id=node_id,
                    name=name, value=float(value), recorded_at=now,
                )
            )  # fmt: skip

    def commit_round(self, commit: RoundCommit) -> None:
        """Commit an open attempt: its adapter version, counts, participations and metrics, in one transaction.

        Survivors become "trained"; a client that is still "invited" becomes "late". MUST raise StorageError when a
        survivor was recorded otherwise, or when a client recorded "trained" is no survivor. With `settle_privacy` what
        the attempt reserved becomes COMMITTED in the same transaction; LedgerError where it reserved nothing.
        """
        with self._writing("commit_round") as session:
            opened = self._open_attempt(session, commit.run_id, commit.number, commit.attempt)
            survivors = _settle_participations(session, commit)
            now = self._clock()
            session.add(
                schema.AdapterVersion(
                    run_id=commit.run_id,
                    number=commit.number,
                    client_sha256=commit.client_sha256,
                    trunk_sha256=commit.trunk_sha256,
                    trained_tokens=commit.trained_tokens,
                    created_at=now,
                )
            )
            self._set_metrics(session, (commit.run_id, commit.number, commit.attempt, ""), commit.metrics)
            opened.status, opened.phase = "committed", "committed"
            opened.replies, opened.trained_tokens = survivors, commit.trained_tokens
            opened.seconds, opened.phase_seconds = commit.seconds, dict(commit.phase_seconds)
            opened.ended_at = opened.progress_at = now
            if commit.settle_privacy:
                attempt = (commit.run_id, commit.number, commit.attempt)
                settle_in(session, attempt, "COMMITTED", at=now, signer=self._signer)

    def _driven_run(self, session: Session, run_id: str) -> schema.Run:
        """The run's row, held, once it is known to be running and not to be driven by another."""
        run = _locked_run(session, run_id)
        leases.require_driver(run, self._driven.get(run_id))
        if run.status != "running":
            raise LeaseError(f"run {run_id} has {run.status}; it changes no more")
        return run

    def _open_attempt(self, session: Session, run_id: str, number: int, attempt: int) -> schema.Round:
        self._driven_run(session, run_id)
        found = session.get(schema.Round, (run_id, number, attempt))
        if found is None or found.status != "open":
            state = "not there" if found is None else found.status
            raise StorageError(f"attempt {attempt} at round {number} of run {run_id} is {state}; it must be open")
        return found

    def abort_round(self, run_id: str, number: int, attempt: int, reason: str) -> None:
        """Close an open attempt without a result."""
        with self._writing("abort_round") as session:
            _abort(self._open_attempt(session, run_id, number, attempt), reason, self._clock())

    def add_event(self, run_id: str | None, kind: str, message: str, detail: Mapping[str, Any] | None = None) -> None:
        """Append an event; `detail` is plain JSON. Events are never changed."""
        with self._writing("add_event") as session:
            if run_id in self._driven:
                leases.require_driver(_locked_run(session, run_id), self._driven[run_id])
            session.add(
                schema.Event(
                    run_id=run_id,
                    kind=kind,
                    message=storable(message),
                    detail=dict(detail or {}),
                    at=self._clock(),
                )
            )

    def note(self, deed: Deed) -> None:
        """Append to the audit log what an operator did outside of SQL."""
        with self._writing("note") as session:
            audit_log.note(session, deed, self._clock())

    def enroll_client(
        self, client_id: str, public_key: str, operator: str, certificate_key_sha256: str | None = None
    ) -> int:
        """Enroll a client and answer the roster's new version; `public_key` is the line of `public_key_text`.

        MUST raise StorageError for an id or a key that was ever enrolled, ConfigError for what is none. The hash is of
        its TLS key, and no other client's, or None.
        """
        with self._writing("enroll_client") as session:
            operator = storable(operator)
            return identities.enroll(session, client_id, public_key, operator, self._clock(), certificate_key_sha256)

    def set_client_certificate(self, client_id: str, key_sha256: str, operator: str) -> None:
        """Take this TLS key for the client's own; StorageError unless it is enrolled, and for another client's key."""
        with self._writing("set_client_certificate") as session:
            identities.set_certificate(session, client_id, key_sha256, storable(operator), self._clock())

    def revoke_client(self, client_id: str, operator: str, reason: str) -> int:
        """Revoke a client for ever and answer the roster's new version; StorageError unless it is enrolled."""
        with self._writing("revoke_client") as session:
            return identities.revoke(session, client_id, storable(operator), storable(reason), self._clock())

    def bind_node(self, run_id: str, node_id: str, client_id: str, signature: bytes) -> None:
        """Note that a node speaks for a client, by the signature of its first contact; once more changes nothing.

        MUST raise StorageError unless the client is enrolled, and for a node that speaks for another one that is. A
        client may come back as another node. The caller MUST have verified `signature`.
        """
        with self._writing("bind_node") as session:
            self._driven_run(session, run_id)
            identities.bind(session, run_id, node_id, client_id, signature, self._clock())


def _locked_run(session: Session, run_id: str) -> schema.Run:
    """The run's row, held until the transaction ends, so that on PostgreSQL too its writers take turns."""
    run = session.get(schema.Run, run_id, with_for_update={"key_share": True})
    if run is None:
        raise StorageError(f"there is no run {run_id}")
    return run


def _open_round_of(run_id: str) -> Any:
    return (schema.Round.run_id == run_id) & (schema.Round.status == "open")


def _fresh_round(run_id: str, number: int, attempt: int, threshold: int | None, now: datetime) -> schema.Round:
    return schema.Round(
        run_id=run_id,
        number=number,
        attempt=attempt,
        status="open",
        threshold=threshold,
        phase="open",
        replies=0,
        steps=0,
        tokens=0,
        received_bytes=0,
        sent_bytes=0,
        trained_tokens=0,
        phase_seconds={},
        opened_at=now,
        progress_at=now,
    )


def _abort(opened: schema.Round, reason: str, now: datetime) -> None:
    opened.status, opened.reason = "aborted", storable(reason)
    opened.ended_at = opened.progress_at = now


def _settle_participations(session: Session, commit: RoundCommit) -> int:
    """Write each client's outcome as the commit says; answers the number of survivors."""
    row = schema.Participation
    of_attempt = (row.run_id == commit.run_id, row.number == commit.number, row.attempt == commit.attempt)
    recorded = session.scalars(select(row).where(*of_attempt))
    status: dict[str, str] = {taken.node_id: taken.status for taken in recorded}
    survivors = set(commit.survivors)
    for node_id in sorted(survivors | {node for node, was in status.items() if was == "trained"}):
        if node_id not in survivors or status.get(node_id) not in ("invited", "trained"):
            was = status.get(node_id, "not in the cohort")
            fate = "a survivor" if node_id in survivors else "no survivor"
            raise StorageError(
                f"round {commit.number} of run {commit.run_id} cannot commit: client {node_id} is {fate} but {was}"
            )
    session.execute(update(row).where(*of_attempt, row.node_id.in_(survivors)).values(status="trained", reason=None))
    late = {"status": "late", "reason": "no update came before the round was committed"}
    session.execute(update(row).where(*of_attempt, row.status == "invited").values(**late))
    return len(survivors)
