"""What listings of all units read; the same on both engines, and the same as the ledger's own summary."""

from pathlib import Path

import pytest

from contract.errors import StorageError
from storage.ledger import open_ledger
from storage.ledger_reader import Account, open_ledger_reader
from tests.storage.conftest import Clock
from tests.storage.ledger_cases import BUDGET, RUN, admit_all, charge, release, unit

WARD, CLINIC = unit("ward"), unit("clinic", level="example")


def test_accounts_are_the_summary_with_the_last_round_of_each(database_url: str) -> None:
    ledger = open_ledger(database_url, Clock())
    ledger.set_budget(WARD, BUDGET, "ada", "x")
    dear, cheap = release(1.0), release(2.0, "wire_forward")
    for number in (1, 2, 5):
        ledger.reserve([charge(WARD, number, paid=dear), charge(WARD, number, paid=cheap)], admit_all)
    ledger.reserve([charge(CLINIC, 3, paid=dear), charge(WARD, 1, paid=dear, run="r2")], admit_all)
    ledger.reserve([charge(CLINIC, 9, paid=cheap)], admit_all)
    ledger.settle(RUN, 1, 1, "COMMITTED")
    ledger.settle(RUN, 5, 1, "VOID")
    ledger.settle(RUN, 9, 1, "VOID")
    summary = ledger.summary()
    ledger.close()
    reader = open_ledger_reader(database_url)
    accounts = reader.accounts()
    reader.close()
    assert {(one.unit, one.run, one.release, one.count) for one in accounts} == {
        (one.unit, one.run, one.release, one.count) for one in summary
    }
    assert Account(WARD, RUN, dear.canonical(), 2, 5) in accounts
    assert Account(WARD, "r2", dear.canonical(), 1, 1) in accounts
    assert Account(CLINIC, RUN, dear.canonical(), 1, 3) in accounts
    assert len(accounts) == 4


def test_looking_makes_no_database(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no Trunkline database"):
        open_ledger_reader(f"sqlite:///{tmp_path / 'none.db'}")
    assert list(tmp_path.iterdir()) == []
