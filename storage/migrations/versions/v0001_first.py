"""The first schema: runs, rounds, clients, participations, adapter versions, metrics, events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    _create_runs()
    _create_rounds()
    _create_clients()
    _create_results()
    _create_events()


def _moment(name: str, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _integer(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=False)


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=False)


def _text(name: str, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=nullable)


def _create_runs() -> None:
    op.create_table(
        "runs",
        _text("run_id"),
        _text("flower_run_id"),
        _text("mode"),
        _text("status"),
        _text("reason", nullable=True),
        sa.Column("config", sa.JSON(), nullable=False),
        _text("model_fingerprint"),
        _moment("created_at"),
        _moment("ended_at", nullable=True),
        sa.PrimaryKeyConstraint("run_id", name="pk_runs"),
    )
    op.create_index("ix_runs_created_at", "runs", ["created_at"])
    op.create_index("ix_runs_flower_run_id", "runs", ["flower_run_id"])


def _create_rounds() -> None:
    op.create_table(
        "rounds",
        _text("run_id"),
        _integer("number"),
        _integer("attempt"),
        _text("status"),
        _text("reason", nullable=True),
        _text("phase"),
        _integer("replies"),
        _count("steps"),
        _count("tokens"),
        _count("received_bytes"),
        _count("sent_bytes"),
        _count("trained_tokens"),
        sa.Column("seconds", sa.Double(), nullable=True),
        sa.Column("phase_seconds", sa.JSON(), nullable=False),
        _moment("opened_at"),
        _moment("progress_at"),
        _moment("ended_at", nullable=True),
        sa.PrimaryKeyConstraint("run_id", "number", "attempt", name="pk_rounds"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_rounds_runs"),
    )
    for name, columns, status in (
        ("uq_rounds_open", ["run_id"], "open"),
        ("uq_rounds_committed", ["run_id", "number"], "committed"),
    ):
        where = sa.text(f"status = '{status}'")
        op.create_index(name, "rounds", columns, unique=True, sqlite_where=where, postgresql_where=where)


def _create_clients() -> None:
    op.create_table(
        "clients",
        _text("node_id"),
        _text("name", nullable=True),
        _moment("first_seen_at"),
        sa.PrimaryKeyConstraint("node_id", name="pk_clients"),
    )
    op.create_table(
        "participations",
        _text("run_id"),
        _integer("number"),
        _integer("attempt"),
        _text("node_id"),
        _text("status"),
        _text("reason", nullable=True),
        sa.PrimaryKeyConstraint("run_id", "number", "attempt", "node_id", name="pk_participations"),
        sa.ForeignKeyConstraint(
            ["run_id", "number", "attempt"],
            ["rounds.run_id", "rounds.number", "rounds.attempt"],
            name="fk_participations_rounds",
        ),
        sa.ForeignKeyConstraint(["node_id"], ["clients.node_id"], name="fk_participations_clients"),
    )
    op.create_index("ix_participations_node_id", "participations", ["node_id"])


def _create_results() -> None:
    op.create_table(
        "adapter_versions",
        _text("run_id"),
        _integer("number"),
        _text("client_sha256"),
        _text("trunk_sha256"),
        _count("trained_tokens"),
        _moment("created_at"),
        sa.PrimaryKeyConstraint("run_id", "number", name="pk_adapter_versions"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_adapter_versions_runs"),
    )
    op.create_table(
        "metrics",
        _text("run_id"),
        _integer("number"),
        _integer("attempt"),
        _text("node_id"),
        _text("name"),
        sa.Column("value", sa.Double(), nullable=False),
        _moment("recorded_at"),
        sa.PrimaryKeyConstraint("run_id", "number", "attempt", "node_id", "name", name="pk_metrics"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_metrics_runs"),
    )


def _create_events() -> None:
    op.create_table(
        "events",
        sa.Column("event_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        _text("run_id", nullable=True),
        _text("kind"),
        _text("message"),
        sa.Column("detail", sa.JSON(), nullable=False),
        _moment("at"),
        sa.PrimaryKeyConstraint("event_id", name="pk_events"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_events_runs"),
    )
    op.create_index("ix_events_run_id_event_id", "events", ["run_id", "event_id"])
