"""The tables. Each index says which query needs it. A change here needs a migration beside it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from contract.privacy_records import Level
from storage.records import HeadSource, ParticipationStatus, RoundStatus, RunMode, RunStatus

THE_ROSTER = 1  # the only row of the table `roster`

# Named constraints, so that a later migration can drop or change each by name on both engines.
_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC: SQLite keeps no time zone, so the zone is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=_NAMES)
    type_annotation_map = {
        datetime: UtcDateTime(),
        dict[str, Any]: JSON(),
        float: Double(),
        int: BigInteger(),
        str: Text(),
    }


class Run(Base):
    __tablename__ = "runs"
    __table_args__ = (
        Index("ix_runs_created_at", "created_at"),  # the newest run; runs list
        Index("ix_runs_flower_run_id", "flower_run_id"),  # whoever watches a Flower run finds its run
    )

    run_id: Mapped[str] = mapped_column(primary_key=True)
    flower_run_id: Mapped[str]
    mode: Mapped[RunMode] = mapped_column(Text)
    status: Mapped[RunStatus] = mapped_column(Text)
    reason: Mapped[str | None]
    config: Mapped[dict[str, Any]]
    model_fingerprint: Mapped[str]
    created_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    lease_until: Mapped[datetime | None]


class Round(Base):
    """One row for each attempt at a round."""

    __tablename__ = "rounds"
    __table_args__ = (
        # Two processes that drive one run cannot both have a round open, nor commit a round twice.
        Index(
            "uq_rounds_open",
            "run_id",
            unique=True,
            sqlite_where=text("status = 'open'"),
            postgresql_where=text("status = 'open'"),
        ),
        Index(
            "uq_rounds_committed",
            "run_id",
            "number",
            unique=True,
            sqlite_where=text("status = 'committed'"),
            postgresql_where=text("status = 'committed'"),
        ),
    )

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    status: Mapped[RoundStatus] = mapped_column(Text)
    reason: Mapped[str | None]
    threshold: Mapped[int | None]
    phase: Mapped[str]
    replies: Mapped[int] = mapped_column(Integer)
    steps: Mapped[int]
    tokens: Mapped[int]
    received_bytes: Mapped[int]
    sent_bytes: Mapped[int]
    trained_tokens: Mapped[int]
    seconds: Mapped[float | None]
    phase_seconds: Mapped[dict[str, Any]]
    opened_at: Mapped[datetime]
    progress_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]


class Client(Base):
    __tablename__ = "clients"

    node_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    first_seen_at: Mapped[datetime]


class Participation(Base):
    __tablename__ = "participations"
    __table_args__ = (
        ForeignKeyConstraint(["run_id", "number", "attempt"], ["rounds.run_id", "rounds.number", "rounds.attempt"]),
        Index("ix_participations_node_id", "node_id"),  # what one client took part in
    )

    run_id: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    node_id: Mapped[str] = mapped_column(ForeignKey("clients.node_id"), primary_key=True)
    status: Mapped[ParticipationStatus] = mapped_column(Text)
    reason: Mapped[str | None]


class AdapterVersion(Base):
    __tablename__ = "adapter_versions"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    client_sha256: Mapped[str]
    trunk_sha256: Mapped[str]
    trained_tokens: Mapped[int]
    created_at: Mapped[datetime]


class Metric(Base):
    """One number. `node_id` is empty for a value over all clients: a key's column cannot be null."""

    __tablename__ = "metrics"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    node_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]
    recorded_at: Mapped[datetime]


class Event(Base):
    __tablename__ = "events"
    __table_args__ = (Index("ix_events_run_id_event_id", "run_id", "event_id"),)  # a run's newest events

    event_id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True)
    run_id: Mapped[str | None] = mapped_column(ForeignKey("runs.run_id"))
    kind: Mapped[str]
    message: Mapped[str]
    detail: Mapped[dict[str, Any]]
    at: Mapped[datetime]


class AuditEntry(Base):
    """What an operator did by a command. Append-only, as the ledger's rows are."""

    __tablename__ = "audit_log"
    __table_args__ = (Index("ix_audit_log_at", "at"),)  # the newest entries

    audit_id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True)
    at: Mapped[datetime]
    operator: Mapped[str]
    action: Mapped[str]
    target: Mapped[str]
    detail: Mapped[dict[str, Any]]


class RosterCounter(Base):
    """One row. Its version counts changes of identities, and outlives them: a roster's version is never used twice."""

    __tablename__ = "roster"
    __table_args__ = (CheckConstraint(f"roster_id = {THE_ROSTER}", "one"),)

    roster_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    version: Mapped[int]


class Identity(Base):
    """A client id and its key, which stay taken once revoked; `roster_version` is that of the row's last change.

    `certificate_key_sha256` is of the public key (SubjectPublicKeyInfo) in the TLS certificate that the client shows.
    """

    __tablename__ = "identities"
    # One TLS key speaks for one client.
    __table_args__ = (Index("uq_identities_certificate_key_sha256", "certificate_key_sha256", unique=True),)

    client_id: Mapped[str] = mapped_column(primary_key=True)
    public_key: Mapped[str] = mapped_column(unique=True)
    enrolled_at: Mapped[datetime]
    enrolled_by: Mapped[str]
    certificate_key_sha256: Mapped[str | None]
    revoked_at: Mapped[datetime | None]
    revoke_reason: Mapped[str | None]
    roster_version: Mapped[int]


class NodeBinding(Base):
    """Which client a Flower node spoke for in a run; `signature` is that of its first contact, in hex."""

    __tablename__ = "node_bindings"

    node_id: Mapped[str] = mapped_column(primary_key=True)  # first: a node is looked up over all runs
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), primary_key=True)
    client_id: Mapped[str] = mapped_column(ForeignKey("identities.client_id"), primary_key=True)
    bound_at: Mapped[datetime]
    signature: Mapped[str]


class PrivacyUnit(Base):
    """Whose privacy is spent, and where its chain of rows ends; whoever appends holds this row."""

    __tablename__ = "privacy_units"
    __table_args__ = (
        Index("ix_privacy_units_client_level", "client", "level"),
    )  # what a client's units spent together

    unit_id: Mapped[str] = mapped_column(primary_key=True)
    client: Mapped[str]
    dataset: Mapped[str]
    level: Mapped[Level] = mapped_column(Text)
    seq: Mapped[int]
    hash: Mapped[str]


class PrivacyRow(Base):
    """A change to what a unit spent or may spend; storage.records.LedgerRow has the same columns.

    Append-only: triggers refuse every other change, also to whoever writes SQL by hand.
    """

    __tablename__ = "privacy_rows"
    __table_args__ = (
        # The database itself refuses a charge that is reserved, or settled, twice; a unit's budget is found by it too.
        UniqueConstraint("unit_id", "run", "round", "attempt", "channel", "state", name="uq_privacy_rows_charge"),
        Index("ix_privacy_rows_run_round_attempt", "run", "round", "attempt"),  # what an attempt reserved
    )

    unit_id: Mapped[str] = mapped_column(ForeignKey("privacy_units.unit_id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str]
    client: Mapped[str]
    dataset: Mapped[str]
    level: Mapped[str]
    run: Mapped[str]
    round: Mapped[int]
    attempt: Mapped[int]
    channel: Mapped[str]
    mechanism: Mapped[str]
    parameters: Mapped[str]
    sampling: Mapped[str]
    adjacency: Mapped[str]
    release: Mapped[str]
    accountant: Mapped[str]
    state: Mapped[str]
    operator: Mapped[str]
    reason: Mapped[str]
    at: Mapped[str]
    previous: Mapped[str]
    hash: Mapped[str]


class PrivacyTally(Base):
    """How many charges of one release a unit has that are not void: what can be counted from its rows, kept at hand."""

    __tablename__ = "privacy_tallies"

    unit_id: Mapped[str] = mapped_column(ForeignKey("privacy_units.unit_id"), primary_key=True)
    run: Mapped[str] = mapped_column(primary_key=True)
    release: Mapped[str] = mapped_column(primary_key=True)
    count: Mapped[int]


class PrivacyHead(Base):
    """A signed head of a chain of this ledger, or, from a peer, of the chain that the peer keeps. Append-only."""

    __tablename__ = "privacy_heads"
    source: Mapped[HeadSource] = mapped_column(Text, primary_key=True)
    unit_id: Mapped[str] = mapped_column(primary_key=True)  # of a peer's chain: no unit of this ledger, perhaps
    signer: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    run: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    hash: Mapped[str]
    signature: Mapped[str]
    at: Mapped[str]
