"""The ledger's contract, the same on both engines."""

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from contract.errors import BudgetError, LedgerError, StorageError, UnpricedError
from contract.privacy_records import ALL_DATASETS, NODE_CONFIG, Budget, PricedRelease, Standing, Unit
from storage import ledger as ledger_module
from storage.engine import make_engine
from storage.ledger import Admit, Ledger, open_ledger_to_read
from storage.ledger_chain import unit_id_of
from storage.records import Account, Refusal, Settled
from tests.storage.ledger_cases import BUDGET, RUN, admit_all, cap, charge, release, spent_of, unit

WARD, CLINIC = unit("ward"), unit("clinic")


@pytest.fixture
def engine(ledger: Ledger, database_url: str) -> Iterator[Engine]:
    made = make_engine(database_url)
    yield made
    made.dispose()


def states(ledger: Ledger, of: Unit = WARD) -> list[str]:
    return [row.state for row in ledger.rows(of)]


def test_a_charge_reads_back_as_it_was_reserved(ledger: Ledger) -> None:
    assert ledger.reserve([charge(WARD, 3, 2)], admit_all) == []
    (row,) = ledger.rows(WARD)
    assert (row.seq, row.kind, row.state) == (1, "charge", "RESERVED")
    assert (row.client, row.dataset, row.level) == ("ward", "notes", "client")
    assert (row.run, row.round, row.attempt, row.channel) == (RUN, 3, 2, "adapter_sum")
    assert (row.mechanism, row.release, row.accountant) == ("gaussian", release().canonical(), "test 1")
    assert row.parameters == '{"clip":"0x1.999999999999ap-4","noise_multiplier":"0x1.0000000000000p+0"}'
    assert row.sampling == (
        '{"holder":{"rate":"1","releases":10},"orchestrator":{"rate":"0x1.999999999999ap-5","releases":10}}'
    )
    assert row.adjacency == '{"holder":"zero-out","orchestrator":"zero-out"}'
    assert (row.operator, row.reason, row.at) == ("", "", "2026-01-01T00:00:01.000000+00:00")
    assert row.previous == row.unit_id == unit_id_of(WARD)
    assert ledger.standing(WARD) == Standing(
        WARD, None, None, {RUN: {release().canonical(): 1}}, {release().canonical(): 1}
    )
    assert ledger.units() == [WARD]
    assert ledger.verify() == []


def test_who_cannot_afford_it_is_refused_and_the_others_go_on(ledger: Ledger) -> None:
    ledger.reserve([charge(WARD, 1)], admit_all)
    refused = ledger.reserve([charge(WARD, 2), charge(CLINIC, 2)], cap(1))
    assert refused == [Refusal(WARD, "the unit has spent 1 of 1, 1 more were proposed")]
    assert states(ledger) == ["RESERVED"]
    assert states(ledger, CLINIC) == ["RESERVED"]


def test_a_unit_that_is_refused_leaves_no_trace_and_pays_for_none_of_its_channels(ledger: Ledger) -> None:
    both = [charge(WARD), charge(WARD, paid=release(channel="wire_forward"))]
    assert [refusal.unit for refusal in ledger.reserve(both, cap(1))] == [WARD]
    assert ledger.units() == []
    assert ledger.reserve(both, cap(2)) == []
    assert states(ledger) == ["RESERVED", "RESERVED"]


def test_admission_sees_budgets_and_spending_by_run_and_over_all_of_the_clients_datasets(ledger: Ledger) -> None:
    other, rows = unit("ward", "letters"), unit("ward", "notes", "example")
    everything = unit("ward", ALL_DATASETS)
    ledger.set_budget(everything, BUDGET, "ops", "for all of its data")
    ledger.set_budget(WARD, replace(BUDGET, epsilon=1.0), "ops", "for these notes")
    ledger.reserve([charge(WARD, 1), charge(other, 1), charge(rows, 1), charge(CLINIC, 1)], admit_all)
    ledger.reserve([charge(WARD, 1, run="r2", paid=release(2.0)), charge(WARD, 2)], admit_all)
    seen: list[Standing] = []
    ledger.reserve([charge(WARD, 9), charge(other, 9)], lambda standing, proposed: seen.append(standing))
    cheap, dear = release(2.0).canonical(), release().canonical()
    assert seen == [
        Standing(
            WARD, replace(BUDGET, epsilon=1.0), BUDGET, {RUN: {dear: 2}, "r2": {cheap: 1}}, {dear: 3, cheap: 1},
            chosen=True, client_chosen=True, other_level=True,
        ),
        # What was just admitted for one dataset is spent when the next one is asked for.
        Standing(other, None, BUDGET, {RUN: {dear: 1}}, {dear: 4, cheap: 1}, client_chosen=True),
    ]  # fmt: skip
    assert ledger.standing(rows).client_spent == {dear: 1}
    assert ledger.standing(everything).budget == ledger.standing(everything).client_budget == BUDGET
    assert ledger.standing(unit("nobody")) == Standing(unit("nobody"), None, None, {}, {})
    assert ledger.standings([rows, other]) == {one: ledger.standing(one) for one in (rows, other)}
    assert ledger.budgets() == {everything: BUDGET, WARD: replace(BUDGET, epsilon=1.0)}


def test_a_budget_that_settings_or_a_run_brought_was_chosen_by_nobody(ledger: Ledger) -> None:
    ledger.register_budgets([WARD], BUDGET, "r7")
    assert not ledger.standing(WARD).chosen
    ledger.set_budget(WARD, BUDGET, "ops", "agreed")
    assert ledger.standing(WARD).chosen
    ledger.set_budget(WARD, BUDGET, NODE_CONFIG, "the site's settings")
    assert not ledger.standing(WARD).chosen


@pytest.mark.parametrize("dataset", [WARD.dataset, ALL_DATASETS])
def test_a_budget_that_a_person_set_at_one_level_is_not_evaded_at_the_other(ledger: Ledger, dataset: str) -> None:
    rows = replace(WARD, level="example")
    ledger.set_budget(replace(rows, dataset=dataset), BUDGET, "ops", "row by row")
    assert ledger.standing(WARD).other_level
    assert not ledger.standing(WARD).chosen
    assert ledger.standing(rows).chosen != ledger.standing(rows).client_chosen
    ledger.set_budget(WARD, BUDGET, "ops", "as a whole too")
    assert ledger.standing(WARD).chosen


def test_what_was_given_back_at_the_other_level_counts_no_more(ledger: Ledger) -> None:
    rows = replace(WARD, level="example")
    ledger.reserve([charge(rows)], admit_all)
    assert ledger.standing(WARD).other_level
    assert not ledger.standing(rows).other_level
    ledger.settle(RUN, 1, 1, "VOID")
    assert not ledger.standing(WARD).other_level


def test_any_other_error_of_admission_reserves_nothing_for_anybody(ledger: Ledger) -> None:
    for error in (UnpricedError("no price"), RuntimeError("a bug"), StorageError("no disk")):

        def admit(standing: Standing, proposed: Sequence[PricedRelease], error: Exception = error) -> None:
            if standing.unit == CLINIC:
                raise error

        with pytest.raises(type(error), match=str(error)):
            ledger.reserve([charge(WARD), charge(CLINIC)], admit)
        assert ledger.units() == []


def test_a_charge_is_reserved_once_for_ever(ledger: Ledger) -> None:
    ledger.reserve([charge(WARD), charge(CLINIC)], admit_all)
    named = "adapter_sum of client ward, dataset notes for attempt 1 at round 1 of run r1"
    again = [charge(CLINIC, 2), charge(WARD, paid=release(3.0))]
    with pytest.raises(LedgerError, match=f"{named} is in the ledger already"):
        ledger.reserve(again, admit_all)
    assert states(ledger, CLINIC) == ["RESERVED"]
    ledger.settle(RUN, 1, 1, "VOID", [WARD])
    with pytest.raises(LedgerError, match="is in the ledger already"):
        ledger.reserve(again, cap(0))
    with pytest.raises(LedgerError, match=f"{named} is charged twice in one reservation"):
        ledger.reserve([charge(WARD), charge(WARD)], admit_all)
    fresh = [
        charge(WARD, attempt=2),
        charge(WARD, 2),
        charge(WARD, run="r2"),
        charge(WARD, paid=release(channel="wire_backward")),
        charge(unit("ward", "letters")),
    ]
    assert ledger.reserve(fresh, admit_all) == []
    assert ledger.reserve([], admit_all) == []


def test_a_charge_names_a_run_and_one_dataset(ledger: Ledger) -> None:
    for wrong in (charge(run=""), charge(unit(dataset=ALL_DATASETS))):
        with pytest.raises(LedgerError, match="it must name a run and one dataset"):
            ledger.reserve([charge(CLINIC), wrong], admit_all)
    assert ledger.units() == []


def test_what_is_void_is_given_back_and_what_is_committed_stays_spent(ledger: Ledger) -> None:
    ledger.reserve([charge(WARD), charge(CLINIC), charge(WARD, 2)], admit_all)
    ledger.settle(RUN, 1, 1, "VOID", [WARD])
    ledger.settle(RUN, 1, 1, "COMMITTED")
    assert states(ledger) == ["RESERVED", "RESERVED", "VOID"]
    assert states(ledger, CLINIC) == ["RESERVED", "COMMITTED"]
    assert (spent_of(ledger.standing(WARD)), spent_of(ledger.standing(CLINIC))) == (1, 1)
    assert ledger.reserve([charge(WARD, 3)], cap(1)) != []
    ledger.settle(RUN, 2, 1, "VOID")
    assert ledger.standing(WARD) == Standing(WARD, None, None, {}, {})
    assert ledger.reserve([charge(WARD, 3)], cap(1)) == []
    assert ledger.verify() == []


def test_settled_is_settled(ledger: Ledger) -> None:
    transitions: list[tuple[Settled, Settled, list[Unit] | None, str]] = [
        ("COMMITTED", "VOID", None, "is COMMITTED on adapter_sum: it cannot become VOID"),
        ("COMMITTED", "VOID", [WARD], "is COMMITTED on adapter_sum: it cannot become VOID"),
        ("VOID", "VOID", None, "is VOID already"),
        ("VOID", "VOID", [WARD], "is VOID already"),
        ("VOID", "COMMITTED", [WARD], "is VOID on adapter_sum: it cannot become COMMITTED"),
        ("VOID", "COMMITTED", None, ""),
        ("COMMITTED", "COMMITTED", None, ""),
        ("COMMITTED", "COMMITTED", [WARD], ""),
    ]
    for number, (first, then, units, refused) in enumerate(transitions):
        ledger.reserve([charge(WARD, number)], admit_all)
        ledger.settle(RUN, number, 1, first)
        if refused:
            with pytest.raises(LedgerError, match=refused):
                ledger.settle(RUN, number, 1, then, units)
        else:
            ledger.settle(RUN, number, 1, then, units)
        assert states(ledger)[2 * number :] == ["RESERVED", first]


def test_what_was_not_reserved_cannot_be_settled(ledger: Ledger) -> None:
    ledger.reserve([charge(WARD)], admit_all)
    for settled in (("r1", 2, 1), ("r1", 1, 2), ("r2", 1, 1)):
        with pytest.raises(LedgerError, match="nothing was reserved for attempt"):
            ledger.settle(*settled, "COMMITTED")
    with pytest.raises(LedgerError, match="client clinic, dataset notes reserved nothing for attempt 1 at round 1"):
        ledger.settle(RUN, 1, 1, "COMMITTED", [WARD, CLINIC])
    assert states(ledger) == ["RESERVED"]


def test_a_budget_reads_back_to_the_bit_and_its_changes_stay_with_who_made_them_and_why(ledger: Ledger) -> None:
    odd = Budget(0.1 + 0.2, 1e-300, math.nextafter(1.0, 2.0), {"holder": 1 / 3, "orchestrator": 0.0, "trunk": 1.0})
    ledger.set_budget(WARD, BUDGET, "ops", "first")
    ledger.reserve([charge(WARD)], admit_all)
    ledger.set_budget(WARD, odd, "dana", "the board said so\x00")
    assert ledger.standing(WARD).budget == odd
    rows = [row for row in ledger.rows(WARD) if row.kind == "budget"]
    assert [(row.round, row.run, row.attempt, row.channel, row.state) for row in rows] == [
        (1, "", 0, "budget", "SET"),
        (2, "", 0, "budget", "SET"),
    ]
    assert [(row.operator, row.reason) for row in rows] == [("ops", "first"), ("dana", "the board said so")]
    assert ledger.verify() == []


def test_a_budget_that_bounds_nothing_or_comes_from_nobody_is_refused(ledger: Ledger) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"epsilon": 0.0}, "epsilon is 0.0; it must be a number above 0 and below inf"),
        ({"epsilon": math.nan}, "epsilon is nan"),
        ({"epsilon": math.inf}, "epsilon is inf"),
        ({"delta": 1.0}, "delta is 1.0; it must be a number above 0 and below 1"),
        ({"order": 1.0}, "order is 1.0; it must be a number above 1"),
        ({"gaussian_share": {"holder": 1.5}}, "gaussian_share of 'holder' is 1.5; it must be from 0 to 1"),
        ({"gaussian_share": {"nobody": 1.0}}, "gaussian_share of 'nobody'"),
    ]
    for change, named in wrong:
        with pytest.raises(LedgerError, match=named):
            ledger.set_budget(WARD, replace(BUDGET, **change), "ops", "because")
    for operator, reason in (("", "because"), ("ops", " ")):
        with pytest.raises(LedgerError, match="it must name who sets it, and why"):
            ledger.set_budget(WARD, BUDGET, operator, reason)
    assert ledger.units() == []


def test_a_run_registers_a_budget_only_where_there_is_none(ledger: Ledger) -> None:
    ledger.set_budget(WARD, BUDGET, "ops", "first")
    ledger.register_budgets([WARD, CLINIC, CLINIC], replace(BUDGET, epsilon=2.0), "r7")
    ledger.register_budgets([CLINIC], replace(BUDGET, epsilon=99.0), "r8")
    assert ledger.budgets() == {WARD: BUDGET, CLINIC: replace(BUDGET, epsilon=2.0)}
    (row,) = ledger.rows(CLINIC)
    assert (row.operator, row.seq) == ("run r7", 1)


def test_the_summary_counts_over_all_units_what_standings_say_of_each(ledger: Ledger) -> None:
    units = [unit(client, dataset) for client in ("a", "b") for dataset in ("x", "y")]
    for number, run, noise in itertools.product((1, 2), ("r1", "r2"), (1.0, 2.0)):
        paid = release(noise, "adapter_sum" if noise == 1.0 else "wire_forward")
        ledger.reserve([charge(one, number, paid=paid, run=run) for one in units], admit_all)
    ledger.settle("r1", 1, 1, "VOID", units[:2])
    ledger.settle("r2", 2, 1, "VOID", units[:1])
    ledger.settle("r1", 2, 1, "COMMITTED")
    ledger.set_budget(units[0], BUDGET, "ops", "not a charge")
    counted = {(one.unit, one.run, one.release): one.count for one in ledger.accounts()}
    assert counted == {
        (one, run, text): count
        for one in units
        for run, counts in ledger.standing(one).spent.items()
        for text, count in counts.items()
    }
    assert sum(counted.values()) == 32 - 4 - 2
    ledger.settle("r1", 1, 1, "VOID", units[2:])
    ledger.reserve([charge(unit("c"), 1)], admit_all)
    ledger.settle("r1", 1, 1, "VOID", [unit("c")])
    assert unit("c") not in {one.unit for one in ledger.accounts()}
    assert ledger.charged_clients() == {one.client for one in units}


def test_an_account_has_the_last_round_of_a_release_in_a_run(ledger: Ledger, database_url: str) -> None:
    dear, cheap = release(1.0), release(2.0, "wire_forward")
    for number in (1, 2, 5):
        ledger.reserve([charge(WARD, number, paid=dear), charge(WARD, number, paid=cheap)], admit_all)
    ledger.reserve([charge(CLINIC, 3, paid=dear), charge(WARD, 1, paid=dear, run="r2")], admit_all)
    ledger.settle(RUN, 5, 1, "VOID")
    reader = open_ledger_to_read(database_url)
    accounts = reader.accounts()
    assert Account(WARD, RUN, dear.canonical(), 2, 5) in accounts
    assert Account(CLINIC, RUN, dear.canonical(), 1, 3) in accounts
    assert len(accounts) == 4
    assert reader.accounts("r2") == [Account(WARD, "r2", dear.canonical(), 1, 1)]
    reader.close()


def test_looking_makes_no_database(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no Trunkline database"):
        open_ledger_to_read(f"sqlite:///{tmp_path / 'none.db'}")
    assert list(tmp_path.iterdir()) == []


def test_rows_are_read_a_few_at_a_time_while_others_write(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_ROWS_AT_ONCE", 3)
    ledger.reserve([charge(WARD, number) for number in range(8)], admit_all)
    reading = ledger.rows(WARD)
    first = next(reading)
    ledger.reserve([charge(WARD, 8)], admit_all)
    assert [row.seq for row in (first, *reading)] == list(range(1, 10))


def test_a_reservation_that_comes_in_anothers_way_sees_what_that_one_spent(ledger: Ledger) -> None:
    """The first one is stopped in the middle of its transaction until the second has begun, or has even ended."""
    for first, second in (
        (WARD, WARD),  # of a unit that is new to the ledger
        (WARD, WARD),  # and of one that is known
        (CLINIC, unit("clinic", "letters")),  # two new units of one client share no row, only what they may spend
        (CLINIC, unit("clinic", "letters")),
    ):
        before = sum(ledger.standing(first).client_spent.values())
        admit = cap(99, client_most=before + 1)
        late = threading.Thread(target=_reserve_one, args=(ledger, second, before + 20, admit, answers := []))

        def slow(standing: Standing, proposed: Sequence[PricedRelease], late: Any = late, admit: Any = admit) -> None:
            if not late.ident:
                late.start()
                late.join(0.2)
            admit(standing, proposed)

        _reserve_one(ledger, first, before + 10, slow, answers)
        late.join(30)
        assert sorted(map(len, answers)) == [0, 1]
        assert sum(ledger.standing(first).client_spent.values()) == before + 1
    assert ledger.verify() == []


def _reserve_one(ledger: Ledger, of: Unit, number: int, admit: Admit, answers: list[list[Refusal]]) -> None:
    answers.append(ledger.reserve([charge(of, number)], admit))


@pytest.mark.parametrize("table", ["privacy_rows", "privacy_heads"])
def test_the_database_itself_refuses_to_rewrite_the_ledger(ledger: Ledger, engine: Engine, table: str) -> None:
    ledger.reserve([charge()], admit_all)
    ledger.settle(RUN, 1, 1, "COMMITTED")
    changes = [f"UPDATE {table} SET hash = 'x'", f"DELETE FROM {table}"]
    if engine.dialect.name == "sqlite":
        changes.append(f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}")
    else:
        changes.append(f"TRUNCATE {table}")
    for change in changes:
        with pytest.raises(Exception, match=f"{table} is append-only"), engine.begin() as connection:
            connection.execute(text(change))
    assert ledger.verify() == []


def test_the_database_itself_refuses_a_charge_twice(ledger: Ledger, engine: Engine) -> None:
    ledger.reserve([charge()], admit_all)
    (row,) = ledger.rows(WARD)
    copied = ", ".join("seq + 1" if name == "seq" else f'"{name}"' for name in ledger_module.COLUMNS)
    named = ", ".join(f'"{name}"' for name in ledger_module.COLUMNS)
    with pytest.raises(Exception, match="uq_privacy_rows_charge|append-only"), engine.begin() as connection:
        connection.execute(text(f"INSERT INTO privacy_rows ({named}) SELECT {copied} FROM privacy_rows"))
    assert list(ledger.rows(WARD)) == [row]


def test_many_units_are_reserved_and_settled_in_one_transaction_each(ledger: Ledger) -> None:
    units = [unit(f"client-{number}") for number in range(1203)]

    refused = ledger.reserve([charge(one) for one in units], lambda standing, proposed: _refuse_some(standing))
    assert [refusal.unit for refusal in refused] == [one for one in units if one.client.endswith("7")]
    ledger.settle(RUN, 1, 1, "COMMITTED")
    assert len(ledger.accounts()) == len(ledger.newest_heads(units)) == len(units) - len(refused)


def _refuse_some(standing: Standing) -> None:
    if standing.unit.client.endswith("7"):
        raise BudgetError("sevens are refused")
