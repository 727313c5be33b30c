"""Somebody who may write to the database, and has taken its guards off, rewrites the ledger: verify tells of it.

What cannot be told without a head that somebody else holds is tested too, so that nobody promises it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from sqlalchemy import Engine, text

from storage.engine import make_engine
from storage.ledger import Ledger, open_ledger
from storage.ledger_chain import chained, signed_head, unit_id_of
from storage.ledger_rows import COLUMNS, reserved_row, settled_row
from storage.records import LedgerRow, SignedHead
from tests.storage.conftest import Clock
from tests.storage.ledger_cases import BUDGET, RUN, Key, admit_all, charge, release, unit

WARD, CLINIC = unit("ward"), unit("clinic")
ID = unit_id_of(WARD)
TABLES = ("privacy_rows", "privacy_units", "privacy_tallies", "privacy_heads")


# What is changed, and what is told of it.
BESIDE_THE_ROWS = [
    ("UPDATE privacy_tallies SET count = 0 WHERE unit_id = '{ID}' AND count = 2", "has 0 charges of"),
    ("UPDATE privacy_tallies SET run = 'r9' WHERE unit_id = '{ID}' AND count = 2", "the tally of run r9"),
    ("DELETE FROM privacy_tallies", "has 0 charges of"),
    ("INSERT INTO privacy_tallies VALUES ('{ID}', 'r9', 'x', 1)", "the tally of run r9 has 1 charges of x"),
    ("INSERT INTO privacy_tallies VALUES ('odd', 'r9', 'x', 1)", "unit odd: the tally of run r9"),
    ("UPDATE privacy_units SET client = 'x' WHERE unit_id = '{ID}'", "the unit itself is of client x"),
    ("UPDATE privacy_units SET dataset = 'x' WHERE unit_id = '{ID}'", "the unit itself is of client ward, dataset x"),
    ("UPDATE privacy_units SET level = 'example' WHERE unit_id = '{ID}'", "dataset notes, example, its rows are not"),
    ("UPDATE privacy_units SET seq = 5 WHERE unit_id = '{ID}'", "the unit ends at row 5"),
    ("UPDATE privacy_units SET hash = 'x' WHERE unit_id = '{ID}'", "the unit ends at row 6 (x)"),
    ("DELETE FROM privacy_units WHERE unit_id = '{ID}'", "there is no row of the unit itself"),
    ("INSERT INTO privacy_units VALUES ('odd', 'a', 'b', 'client', 1, 'x')", "unit odd: the unit ends at row 1"),
    ("UPDATE privacy_heads SET unit_id = 'odd' WHERE seq = 3", "unit odd: the head signed after attempt 1"),
    ("UPDATE privacy_heads SET signer = 'x' WHERE seq = 3", "is no promise: it is not signed"),
    ("UPDATE privacy_heads SET seq = 4 WHERE seq = 3", "is no promise: its signature is not made by"),
    ("UPDATE privacy_heads SET run = 'x' WHERE seq = 3", "is no promise"),
    ("UPDATE privacy_heads SET round = 4 WHERE seq = 3", "is no promise"),
    ("UPDATE privacy_heads SET attempt = 4 WHERE seq = 3", "is no promise"),
    ("UPDATE privacy_heads SET hash = 'x' WHERE seq = 3", "is no promise"),
    ("UPDATE privacy_heads SET signature = 'x' WHERE seq = 3", "is no promise"),
]


class Vandal:
    """Changes the ledger's tables with every trigger and foreign key off."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        if engine.dialect.name == "postgresql":
            self.run(*(f"ALTER TABLE {table} DISABLE TRIGGER ALL" for table in TABLES))
        else:
            with engine.connect() as connection:
                ours = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name LIKE 'privacy_%'"
                found = connection.exec_driver_sql(ours).all()
            assert len(found) == 6
            self.run(*(f"DROP TRIGGER {name}" for (name,) in found))

    def run(self, *statements: str, **values: object) -> None:
        with self._engine.connect() as connection:
            if self._engine.dialect.name == "sqlite":
                connection.exec_driver_sql("ROLLBACK")
                connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            for statement in statements:
                connection.execute(text(statement), values)
            connection.commit()

    def save(self) -> dict[str, list[dict[str, Any]]]:
        """All that is in the ledger's tables."""
        with self._engine.connect() as connection:
            return {
                table: [dict(row) for row in connection.execute(text(f"SELECT * FROM {table}")).mappings()]
                for table in TABLES
            }

    def restore(self, saved: dict[str, list[dict[str, Any]]]) -> None:
        """Put back what `save` saw."""
        self.run(*(f"DELETE FROM {table}" for table in TABLES))
        for table, rows in saved.items():
            for row in rows:
                names, marks = ", ".join(f'"{name}"' for name in row), ", ".join(f":{name}" for name in row)
                self.run(f"INSERT INTO {table} ({names}) VALUES ({marks})", **row)

    def forge(self, rows: Sequence[LedgerRow]) -> None:
        """Make WARD's chain anew from `rows`, its hashes, end and tallies right: all but the heads."""
        made: list[LedgerRow] = []
        for row in rows:
            made.append(chained(row, ID, len(made) + 1, made[-1].hash if made else ID))
        self.run(*(f"DELETE FROM {table} WHERE unit_id = '{ID}'" for table in ("privacy_rows", "privacy_tallies")))
        names, marks = ", ".join(f'"{name}"' for name in COLUMNS), ", ".join(f":{name}" for name in COLUMNS)
        tally: dict[tuple[str, str], int] = {}
        for row in made:
            columns = {name: getattr(row, name) for name in COLUMNS}
            self.run(f"INSERT INTO privacy_rows ({names}) VALUES ({marks})", **columns)
            change = {"RESERVED": 1, "VOID": -1}.get(row.state, 0)
            tally[row.run, row.release] = tally.get((row.run, row.release), 0) + change
        for (run, paid), count in tally.items():
            values = {"run": run, "paid": paid, "count": count}
            self.run(f"INSERT INTO privacy_tallies VALUES ('{ID}', :run, :paid, :count)", **values)
        end = {"seq": made[-1].seq, "hash": made[-1].hash}
        self.run(f"UPDATE privacy_units SET seq = :seq, hash = :hash WHERE unit_id = '{ID}'", **end)


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    """WARD: a budget, three charges of which one is committed, one void, and one is left as it is. CLINIC: one."""
    opened = open_ledger(database_url, Clock(), Key())
    opened.set_budget(WARD, BUDGET, "ops", "first")
    opened.reserve([charge(WARD), charge(CLINIC)], admit_all)
    opened.settle(RUN, 1, 1, "COMMITTED")
    opened.reserve([charge(WARD, 2, paid=release(2.0))], admit_all)
    opened.settle(RUN, 2, 1, "VOID")
    opened.reserve([charge(WARD, 3)], admit_all)
    assert opened.verify() == []
    yield opened
    opened.close()


@pytest.fixture
def vandal(ledger: Ledger, database_url: str) -> Iterator[Vandal]:
    engine = make_engine(database_url)
    yield Vandal(engine)
    engine.dispose()


def found(ledger: Ledger, *parts: str, outside: Sequence[SignedHead] = ()) -> bool:
    """Whether one line of what verify tells has all of `parts`."""
    return any(all(part in line for part in parts) for line in ledger.verify(outside))


def test_every_column_of_every_row_that_is_edited_is_found(ledger: Ledger, vandal: Vandal) -> None:
    missed = []
    for row in list(ledger.rows(WARD)):
        where = f"WHERE seq = {row.seq} AND unit_id = '{ID}'"
        for name in COLUMNS:
            value = getattr(row, name)
            changed = value + 70 if isinstance(value, int) else f"{value}x"
            at = where.replace(f"seq = {row.seq}", f"seq = {changed}") if name == "seq" else where
            at = at.replace(ID, f"{ID}x") if name == "unit_id" else at
            vandal.run(f'UPDATE privacy_rows SET "{name}" = :changed {where}', changed=changed)
            told = changed if name == "seq" else row.seq
            if not found(ledger, ID[:16], "client ward", f"row {told}"):
                missed.append((row.seq, name, ledger.verify()))
            vandal.run(f'UPDATE privacy_rows SET "{name}" = :value {at}', value=value)
    assert missed == []
    assert ledger.verify() == []


def test_every_row_that_is_deleted_is_found(ledger: Ledger, vandal: Vandal) -> None:
    rows, saved = list(ledger.rows(WARD)), vandal.save()
    for row in rows:
        vandal.run(f"DELETE FROM privacy_rows WHERE unit_id = '{ID}' AND seq = {row.seq}")
        if row.seq == len(rows):
            assert found(ledger, "client ward", f"the unit ends at row {row.seq}", f"its chain at row {row.seq - 1}")
        else:
            assert found(ledger, "client ward", f"row {row.seq + 1} comes after row {row.seq - 1}: what was between")
        vandal.restore(saved)
    assert ledger.verify() == []


def test_rows_that_change_places_are_found(ledger: Ledger, vandal: Vandal) -> None:
    swap = "UPDATE privacy_rows SET seq = {} WHERE seq = {} AND unit_id = '{}'"
    vandal.run(swap.format(99, 2, ID), swap.format(2, 4, ID), swap.format(4, 99, ID))
    assert found(ledger, "row 2 does not follow row 1")
    assert found(ledger, "row 2 was changed")
    vandal.run(swap.format(99, 2, ID), swap.format(2, 4, ID), swap.format(4, 99, ID))
    assert ledger.verify() == []
    rows = list(ledger.rows(WARD))
    vandal.forge([rows[3], rows[1], rows[2], rows[0], *rows[4:]])
    assert found(ledger, "client ward", "at row 3, is of another row 3")


@pytest.mark.parametrize("cut", [3, 4, 5])
def test_a_tail_that_is_cut_off_with_all_that_counts_it_is_found_by_the_signed_heads(
    ledger: Ledger, vandal: Vandal, cut: int
) -> None:
    held = ledger.heads()
    vandal.forge(list(ledger.rows(WARD))[:-cut])
    assert found(
        ledger, "client ward", "attempt 1 at round 2 of run r1, at row 5, is over a row that this chain has no"
    )
    # With the heads gone the ledger is sound in itself; a head that a client holds tells.
    vandal.run("DELETE FROM privacy_heads")
    assert ledger.verify() == []
    assert found(ledger, "client ward", "at row 5, is over a row that this chain has no more", outside=held)


def test_a_chain_that_is_made_anew_with_a_cheaper_charge_is_found_by_the_signed_heads(
    ledger: Ledger, vandal: Vandal
) -> None:
    held = ledger.heads()
    rows = list(ledger.rows(WARD))
    cheap = reserved_row(charge(WARD, paid=release(1e6)), rows[1].at)
    vandal.forge([rows[0], cheap, settled_row(cheap, "COMMITTED", rows[2].at), *rows[3:]])
    for seq in (3, 5):
        assert found(ledger, "client ward", f"at row {seq}, is of another row {seq} than this chain has")
    # Whoever has no key can sign with another one: so name the key.
    ends = {row.seq: row.hash for row in ledger.rows(WARD)}
    for head in held:
        if head.unit_id == ID:
            attempt = (head.run, head.round, head.attempt)
            forged = signed_head(Key(66), ID, head.seq, ends[head.seq], attempt)
            values = {"hash": forged.hash, "signer": forged.signer, "signature": forged.signature}
            vandal.run(
                "UPDATE privacy_heads SET hash = :hash, signer = :signer, signature = :signature "
                f"WHERE unit_id = '{ID}' AND seq = {head.seq}",
                **values,
            )
    assert ledger.verify() == []
    told = ledger.verify(signers=[Key().public_key_text])
    assert len(told) == 3
    assert all(f"is signed by {Key(66).public_key_text}, who is none of the signers" in line for line in told)
    assert found(ledger, "at row 3, is of another row 3 than this chain has", outside=held)


def test_a_unit_that_is_gone_without_a_trace_is_found_by_a_head_from_outside(ledger: Ledger, vandal: Vandal) -> None:
    held = ledger.heads(CLINIC)
    gone = [f"DELETE FROM {table} WHERE unit_id = '{unit_id_of(CLINIC)}'" for table in TABLES]
    vandal.run(gone[0])
    assert found(ledger, unit_id_of(CLINIC)[:16], "the unit ends at row 2")
    vandal.run(gone[1])
    assert found(ledger, unit_id_of(CLINIC)[:16], "the tally of run r1 has 1")
    vandal.run(gone[2])
    assert found(ledger, unit_id_of(CLINIC)[:16], "is over a row that this chain has no more; it ends at row 0")
    vandal.run(gone[3])
    assert ledger.verify() == []
    assert found(ledger, unit_id_of(CLINIC)[:16], "is over a row that this chain has no more", outside=held)


def test_rows_after_the_last_head_can_be_cut_off_unnoticed(ledger: Ledger, vandal: Vandal) -> None:
    """The limit of what a chain can show; it is why heads are signed whenever a round is committed."""
    held = ledger.heads()
    vandal.forge(list(ledger.rows(WARD))[:-1])
    assert ledger.verify(held) == []


def test_what_is_kept_beside_the_rows_agrees_with_them(ledger: Ledger, vandal: Vandal) -> None:
    saved = vandal.save()
    for change, told in BESIDE_THE_ROWS:
        vandal.run(change.replace("{ID}", ID))
        assert found(ledger, told), (change, ledger.verify())
        vandal.restore(saved)
    assert ledger.verify() == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_value_of_another_type_is_told_of_and_stops_nothing(ledger: Ledger, vandal: Vandal) -> None:
    """SQLite takes any value in any column."""
    saved = vandal.save()
    for change, told in (
        ("UPDATE privacy_rows SET round = 'x' WHERE seq = 3", "row 3: its round is a str, not a int"),
        ("UPDATE privacy_rows SET attempt = 1.5 WHERE seq = 3", "row 3: its attempt is a float, not a int"),
        ("UPDATE privacy_rows SET release = x'00' WHERE seq = 3", "row 3: its release is a bytes, not a str"),
        ("UPDATE privacy_rows SET unit_id = x'00' WHERE seq = 3", "row 3: its unit_id is a bytes"),
        ("UPDATE privacy_rows SET seq = 'x' WHERE seq = 3", "its seq is a str, not a int"),
        ("UPDATE privacy_units SET seq = 'x'", "the unit ends at row x"),
        ("UPDATE privacy_units SET client = x'00'", "the unit itself is of client"),
        ("UPDATE privacy_tallies SET count = 'x'", "has x charges"),
        ("UPDATE privacy_heads SET seq = 'x' WHERE seq = 3", "a signed head is none: its seq is a str"),
        ("UPDATE privacy_heads SET hash = x'00' WHERE seq = 3", "a signed head is none: its hash is a bytes"),
    ):
        vandal.run(change)
        assert found(ledger, told), (change, ledger.verify())
        vandal.restore(saved)
