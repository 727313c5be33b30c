"""What is hashed and signed, to the byte: another program must be able to check it from the description alone."""

import hashlib
import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.errors import LedgerError
from storage.ledger_chain import ChainWalk, _encoded, chained, head_fault, row_hash, signed_head, unit_id_of
from storage.ledger_rows import COLUMNS, budget_from, budget_row, budget_text, reserved_row, settled_row, unit_of
from storage.records import LedgerRow
from tests.storage.ledger_cases import BUDGET, Key, charge, unit

AT = "2026-01-01T00:00:00.000000+00:00"
VALUES = st.one_of(st.text(), st.integers(-(2**63), 2**63))


def by_hand(*values: str | int) -> str:
    """The encoding as the documentation says it, written apart."""
    told = b""
    for value in values:
        data = str(value).encode()
        told += (b"i" if isinstance(value, int) else b"s") + struct.pack(">Q", len(data)) + data
    return hashlib.sha256(told).hexdigest()


def chain() -> list[LedgerRow]:
    """A budget, a charge and its settlement."""
    unit_id = unit_id_of(unit())
    reserved = reserved_row(charge(), AT)
    rows: list[LedgerRow] = []
    previous = unit_id
    for row in (budget_row(unit(), 1, BUDGET, "ops", "why", AT), reserved, settled_row(reserved, "COMMITTED", AT)):
        rows.append(chained(row, unit_id, len(rows) + 1, previous))
        previous = rows[-1].hash
    return rows


def faults(rows: list[LedgerRow]) -> str:
    walk = ChainWalk(unit_id_of(unit()))
    for row in rows:
        walk.take(row)
    walk.end()
    return "\n".join(walk.findings)


def relinked(rows: list[LedgerRow]) -> list[LedgerRow]:
    """The rows as a chain whose hashes are right."""
    made: list[LedgerRow] = []
    for row in rows:
        made.append(chained(row, unit_id_of(unit()), len(made) + 1, made[-1].hash if made else unit_id_of(unit())))
    return made


def test_hashes_are_made_as_the_documentation_says() -> None:
    assert unit_id_of(unit()) == by_hand("trunkline privacy unit 1", "ward", "notes", "client")
    for row in chain():
        columns = [getattr(row, name) for name in COLUMNS if name != "hash"]
        assert row.hash == row_hash(row) == by_hand("trunkline privacy row 1", *columns)


def test_hashes_stay_what_they_were() -> None:
    """A ledger that was written by an earlier version must stay sound."""
    assert [row.hash[:16] for row in chain()] == ["8e82366c77784a26", "67daf9a01c50f6dd", "7086f0629c14c624"]


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, max_size=4), st.lists(VALUES, max_size=4))
def test_no_two_sequences_are_encoded_alike(one: list[str | int], other: list[str | int]) -> None:
    differ = [(type(value), value) for value in one] != [(type(value), value) for value in other]
    assert (_encoded(*one) != _encoded(*other)) == differ


@pytest.mark.parametrize(
    ("values", "others"),
    [(("ab", "c"), ("a", "bc")), ((1,), ("1",)), (("",), ()), ((12, 3), (1, 23)), (("s",), ("i",))],
)
def test_values_do_not_run_into_each_other(values: tuple[str | int, ...], others: tuple[str | int, ...]) -> None:
    assert _encoded(*values) != _encoded(*others)


def test_a_head_is_signed_over_all_of_it() -> None:
    head = signed_head(Key(), "u" * 64, 3, "a" * 64, ("r1", 2, 1))
    assert head_fault(head) is None
    for change in (
        {"unit_id": "v" * 64}, {"seq": 4}, {"hash": "b" * 64}, {"run": "r2"}, {"round": 1}, {"attempt": 2},
        {"signer": Key(2).public_key_text}, {"signature": "00" * 64},
    ):  # fmt: skip
        assert "is not made by" in str(head_fault(replace(head, **change)))  # type: ignore[arg-type]
    for change in ({"signer": "nobody"}, {"signature": "zz"}):
        assert "it is not signed" in str(head_fault(replace(head, **change)))


def test_a_sound_chain_has_no_fault() -> None:
    assert faults(chain()) == ""
    assert faults(relinked([replace(row, hash="") for row in chain()])) == ""


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"kind": "gift"}, "its kind is 'gift'"),
        ({"state": "SET"}, "its state SET is none of a charge"),
        ({"state": "RESERVED"}, "row 3 makes RESERVED what is RESERVED"),
        ({"round": 9}, "row 3 makes COMMITTED what is not reserved"),
        ({"accountant": "other"}, "row 3 settles another release than the one that was reserved"),
        ({"channel": "metrics"}, "its channel contradicts what it is charged for"),
        ({"mechanism": "skellam"}, "its mechanism contradicts"),
        ({"parameters": "{}"}, "its parameters contradicts"),
        ({"sampling": "{}", "adjacency": "{}"}, "its sampling, adjacency contradicts"),
        ({"operator": "ops"}, "its operator contradicts"),
        ({"release": "[]"}, "holds no release that can be priced"),
        ({"run": ""}, "or it lacks what a charge names"),
        ({"client": "clinic"}, "row 3 is of client clinic, dataset notes, client, no row of this unit"),
        ({"level": "ward"}, "level is 'ward'"),
    ],
)
def test_a_row_that_contradicts_itself_is_found_though_its_hash_is_right(change: dict[str, str], found: str) -> None:
    rows = chain()
    assert found in faults(relinked([*rows[:2], replace(rows[2], **change)]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"parameters": "{}"}, "holds no budget"),
        ({"parameters": budget_text(BUDGET).replace("{", "{ ", 1)}, "is not written as it is by this program"),
        ({"parameters": budget_text(BUDGET).replace("0x1.0000000000000p+3", "-0x1.0p+0")}, "epsilon is -1.0"),
        ({"parameters": budget_text(BUDGET).replace("0x1.0000000000000p+3", "0x1p+9999")}, "holds no budget"),
        ({"round": 2}, "row 1 is change 2 of the budget; change 1 comes next"),
        ({"reason": " "}, "or it lacks what a budget names"),
        ({"state": "COMMITTED"}, "its state COMMITTED is none of a budget"),
        ({"release": "[]"}, "its release contradicts"),
    ],
)
def test_a_budget_that_contradicts_itself_is_found_though_its_hash_is_right(change: dict[str, str], found: str) -> None:
    rows = chain()
    assert found in faults(relinked([replace(rows[0], **change), *rows[1:]]))  # type: ignore[arg-type]


def test_rows_back_to_units_and_budgets() -> None:
    assert unit_of(chain()[0]) == unit()
    assert budget_from(chain()[0].parameters) == BUDGET
    with pytest.raises(LedgerError, match="it must be one of client, example"):
        unit_of(replace(chain()[0], level="row"))
