"""A ledger's report holds what an auditor needs, and says by itself whether it is sound."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.ledger import Ledger, open_ledger
from storage.ledger_chain import signed_head, unit_id_of
from storage.ledger_report import peer_heads_in, verify_report
from tests.storage.conftest import Clock
from tests.storage.ledger_cases import BUDGET, RUN, Key, admit_all, charge, release, unit

WARD, CLINIC = unit("ward"), unit("clinic")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def written(ledger: Ledger) -> dict[str, Any]:
    """The report of a small ledger, as it is after a way through a file."""
    ledger.set_budget(WARD, BUDGET, "ops", "first")
    ledger.reserve([charge(WARD), charge(CLINIC)], admit_all)
    ledger.settle(RUN, 1, 1, "COMMITTED")
    ledger.reserve([charge(WARD, 2, paid=release(2.0))], admit_all)
    ledger.settle(RUN, 2, 1, "VOID")
    ledger.note_peer_head(WARD, signed_head(Key(2), unit_id_of(WARD), 7, "a" * 64, (RUN, 2, 1)))
    report: dict[str, Any] = json.loads(json.dumps(ledger.report(), allow_nan=False))
    return report


def test_a_report_holds_rows_units_heads_and_budgets_and_is_sound(ledger: Ledger) -> None:
    report = written(ledger)
    assert [row["hash"] for row in report["rows"] if row["client"] == "ward"] == [row.hash for row in ledger.rows(WARD)]
    assert {(one["client"], one["seq"]) for one in report["units"]} == {("ward", 5), ("clinic", 2)}
    assert sorted(head["source"] for head in report["heads"]) == ["own"] * 4 + ["peer"]
    assert [one["unit_id"] for one in report["budgets"]] == [unit_id_of(WARD)]
    assert verify_report(report, ledger.heads(), [Key().public_key_text]) == []


def test_a_report_of_one_client_holds_nothing_of_another(ledger: Ledger) -> None:
    written(ledger)
    report = ledger.report("clinic")
    assert "ward" not in json.dumps(report)
    assert unit_id_of(WARD) not in json.dumps(report)
    assert verify_report(report) == []
    assert verify_report(ledger.report("nobody")) == []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ledger = open_ledger(f"sqlite:///{tmp_path_factory.mktemp('report') / 'x.db'}", Clock(), Key())
    told = written(ledger)
    ledger.close()
    return told


def copied(report: dict[str, Any]) -> Any:
    return json.loads(json.dumps(report))


def test_every_field_that_is_edited_is_found(report: dict[str, Any]) -> None:
    missed = []
    for part in ("rows", "units", "heads", "budgets"):
        for number, one in enumerate(report[part]):
            for name, value in one.items():
                for edited in (value + 1 if isinstance(value, int) else f"{value}x", None, [value]):
                    changed = copied(report)
                    changed[part][number][name] = edited
                    if verify_report(changed) == []:
                        missed.append((part, number, name, edited))
    assert missed == []


def test_every_row_that_is_left_out_is_found(report: dict[str, Any]) -> None:
    for part in ("rows", "units", "budgets"):
        for number in range(len(report[part])):
            changed = copied(report)
            del changed[part][number]
            assert verify_report(changed) != [], (part, number)


def test_a_tail_that_is_left_out_with_what_ends_in_it_is_found_by_a_head_from_outside(report: dict[str, Any]) -> None:
    changed = copied(report)
    cut = [row for row in changed["rows"] if row["client"] == "ward"][-2:]
    changed["rows"] = [row for row in changed["rows"] if row not in cut]
    (end,) = (one for one in changed["units"] if one["client"] == "ward")
    end["seq"], end["hash"] = cut[0]["seq"] - 1, cut[0]["previous"]
    (line,) = verify_report(changed)
    assert "client ward, dataset notes, client" in line
    assert "at row 5, is over a row that this chain has no more; it ends at row 3" in line
    changed["heads"] = [head for head in changed["heads"] if head["seq"] != 5]
    assert verify_report(changed) == []
    held = signed_head(Key(), unit_id_of(WARD), 5, cut[1]["hash"], (RUN, 2, 1))
    assert "at row 5, is over a row" in verify_report(changed, [held])[0]


def test_heads_of_another_key_are_told_of_where_the_signers_are_named(report: dict[str, Any]) -> None:
    assert len(verify_report(report, signers=[Key(3).public_key_text])) == 4


def test_the_heads_of_peers_can_be_taken_from_a_report(report: dict[str, Any]) -> None:
    (head,) = peer_heads_in(report)
    assert (head.unit_id, head.seq, head.signer) == (unit_id_of(WARD), 7, Key(2).public_key_text)


@pytest.mark.parametrize("wrong", [{}, {"format": "x"}, {"format": "trunkline privacy ledger 1", "units": [1]}])
def test_what_is_no_report_is_told_of(wrong: dict[str, Any]) -> None:
    assert "this is no report of a privacy ledger" in verify_report(wrong)[0]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_stands_in_a_report_nothing_is_raised(report: dict[str, Any], data: st.DataObject) -> None:
    changed = copied(report)
    part = data.draw(st.sampled_from(["rows", "units", "heads", "budgets"]))
    number = data.draw(st.integers(0, len(changed[part]) - 1))
    name = data.draw(st.sampled_from(sorted(changed[part][number])))
    was, value = changed[part][number][name], data.draw(JSON)
    changed[part][number][name] = value
    told = verify_report(changed)
    same = type(value) is type(was) and value == was
    assert (told == []) == same or value == "peer"
