"""The privacy ledger: units, their chains of rows, tallies, signed heads, and triggers that let nobody rewrite them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

# The tables that only grow, each with its keys.
_APPEND_ONLY = {
    "privacy_rows": (("unit_id", "seq"), ("unit_id", "run", "round", "attempt", "channel", "state")),
    "privacy_heads": (("source", "unit_id", "signer", "seq", "run", "round", "attempt"),),
}


def upgrade() -> None:
    _create_units()
    _create_rows()
    _create_tallies()
    _create_heads()
    if op.get_bind().dialect.name == "postgresql":
        _guard_on_postgresql()
    else:
        _guard_on_sqlite()


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=False)


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), autoincrement=False, nullable=False)


def _create_units() -> None:
    op.create_table(
        "privacy_units",
        _text("unit_id"),
        _text("client"),
        _text("dataset"),
        _text("level"),
        _count("seq"),
        _text("hash"),
        sa.PrimaryKeyConstraint("unit_id", name="pk_privacy_units"),
    )
    op.create_index("ix_privacy_units_client_level", "privacy_units", ["client", "level"])


def _create_rows() -> None:
    op.create_table(
        "privacy_rows",
        _text("unit_id"),
        _count("seq"),
        _text("kind"),
        _text("client"),
        _text("dataset"),
        _text("level"),
        _text("run"),
        _count("round"),
        _count("attempt"),
        _text("channel"),
        _text("mechanism"),
        _text("parameters"),
        _text("sampling"),
        _text("adjacency"),
        _text("release"),
        _text("accountant"),
        _text("state"),
        _text("operator"),
        _text("reason"),
        _text("at"),
        _text("previous"),
        _text("hash"),
        sa.PrimaryKeyConstraint("unit_id", "seq", name="pk_privacy_rows"),
        sa.ForeignKeyConstraint(["unit_id"], ["privacy_units.unit_id"], name="fk_privacy_rows_privacy_units"),
        sa.UniqueConstraint("unit_id", "run", "round", "attempt", "channel", "state", name="uq_privacy_rows_charge"),
    )
    op.create_index("ix_privacy_rows_run_round_attempt", "privacy_rows", ["run", "round", "attempt"])


def _create_tallies() -> None:
    op.create_table(
        "privacy_tallies",
        _text("unit_id"),
        _text("run"),
        _text("release"),
        _count("count"),
        sa.PrimaryKeyConstraint("unit_id", "run", "release", name="pk_privacy_tallies"),
        sa.ForeignKeyConstraint(["unit_id"], ["privacy_units.unit_id"], name="fk_privacy_tallies_privacy_units"),
    )


def _create_heads() -> None:
    op.create_table(
        "privacy_heads",
        _text("source"),
        _text("unit_id"),
        _text("signer"),
        _count("seq"),
        _text("run"),
        _count("round"),
        _count("attempt"),
        _text("hash"),
        _text("signature"),
        _text("at"),
        sa.PrimaryKeyConstraint(
            "source", "unit_id", "signer", "seq", "run", "round", "attempt", name="pk_privacy_heads"
        ),
    )  # fmt: skip


def _guard_on_sqlite() -> None:
    for table, keys in _APPEND_ONLY.items():
        for change in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only: no {change}'); END"
            )
        # INSERT OR REPLACE deletes the row in its way without asking the trigger on DELETE.
        same = " OR ".join(" AND ".join(f"{column} = NEW.{column}" for column in key) for key in keys)
        op.execute(
            f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} "
            f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {same}) "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only: there is such a row already'); END"
        )


def _guard_on_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION trunkline_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION '% is append-only: no %', TG_TABLE_NAME, TG_OP; END $$"
    )
    for table in _APPEND_ONLY:
        for change in ("UPDATE", "DELETE", "TRUNCATE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table} "
                "FOR EACH STATEMENT EXECUTE FUNCTION trunkline_append_only()"
            )
