"""Identities, the roster's version, and which node speaks for which client."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    _create_roster()
    _create_identities()
    _create_node_bindings()


def _moment(name: str, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _text(name: str, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=nullable)


def _create_roster() -> None:
    roster = op.create_table(
        "roster",
        sa.Column("roster_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("roster_id", name="pk_roster"),
        sa.CheckConstraint("roster_id = 1", name="ck_roster_one"),
    )
    op.bulk_insert(roster, [{"roster_id": 1, "version": 0}])


def _create_identities() -> None:
    op.create_table(
        "identities",
        _text("client_id"),
        _text("public_key"),
        _moment("enrolled_at"),
        _text("enrolled_by"),
        _moment("revoked_at", nullable=True),
        _text("revoke_reason", nullable=True),
        sa.Column("roster_version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("client_id", name="pk_identities"),
        sa.UniqueConstraint("public_key", name="uq_identities_public_key"),
    )


def _create_node_bindings() -> None:
    op.create_table(
        "node_bindings",
        _text("node_id"),
        _text("run_id"),
        _text("client_id"),
        _moment("bound_at"),
        _text("signature"),
        sa.PrimaryKeyConstraint("node_id", "run_id", "client_id", name="pk_node_bindings"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_node_bindings_runs"),
        sa.ForeignKeyConstraint(["client_id"], ["identities.client_id"], name="fk_node_bindings_identities"),
    )
