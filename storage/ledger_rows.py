"""What the ledger's rows say: a charge or a budget as columns, and columns back, all without SQL.

A charge's columns besides `release` are there to be read and queried; they say nothing that `release` does not:
`mechanism` and `parameters` (JSON) are its event's, `sampling` is `{adversary: {"rate": hex float, "releases": n}}`,
`adjacency` is `{adversary: adjacency}`. A budget's `parameters` are its numbers, as text of float.hex(); its `run` is
empty and its `round` counts the changes, 1 for the first. Columns that do not apply are empty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from typing import get_args

from contract.errors import LedgerError, PrivacyError
from contract.privacy_records import ADVERSARIES, ALL_DATASETS, Budget, Level, PricedRelease, Unit
from storage.records import Charge, LedgerRow, Settled

COLUMNS = tuple(column.name for column in fields(LedgerRow))
BUDGET_CHANNEL = "budget"
_INTEGERS = frozenset({"seq", "round", "attempt"})


def reserved_row(charge: Charge, at: str) -> LedgerRow:
    """A charge as a row that is not of a chain yet. Raises LedgerError for one that no ledger may hold."""
    unit, release = charge.unit, charge.release.canonical()
    if not charge.run or unit.dataset == ALL_DATASETS:
        what = "no run" if not charge.run else "all of a client's datasets together"
        raise LedgerError(f"a charge to client {unit.client!r} names {what}; it must name a run and one dataset")
    told = _columns_of_release(release)
    return _fresh(
        unit, at, kind="charge", run=charge.run, round=charge.round, attempt=charge.attempt, state="RESERVED",
        release=release, accountant=charge.accountant, **told,
    )  # fmt: skip


def settled_row(reserved: LedgerRow, state: Settled, at: str) -> LedgerRow:
    """The row that settles a reserved one; it repeats what is settled, so that it can be read by itself."""
    return replace(reserved, state=state, at=at, seq=0, previous="", hash="")


def budget_row(unit: Unit, ordinal: int, budget: Budget, operator: str, reason: str, at: str) -> LedgerRow:
    """A unit's budget as a row that is not of a chain yet. Raises LedgerError for numbers that bound nothing."""
    if not operator.strip() or not reason.strip():
        raise LedgerError("a budget is set without an operator or a reason; it must name who sets it, and why")
    return _fresh(
        unit, at, kind="budget", round=ordinal, channel=BUDGET_CHANNEL, state="SET", parameters=budget_text(budget),
        operator=operator, reason=reason,
    )  # fmt: skip


def budget_text(budget: Budget) -> str:
    """A budget as canonical JSON. Raises LedgerError for a number out of its range."""
    _check_budget(budget)
    shares = {name: float(share).hex() for name, share in budget.gaussian_share.items()}
    numbers = {name: float(getattr(budget, name)).hex() for name in ("epsilon", "delta", "order")}
    return _json({**numbers, "gaussian_share": shares})


def budget_from(text: str) -> Budget:
    """What `budget_text` wrote. Raises LedgerError for anything else."""
    try:
        told = json.loads(text)
        shares = {name: float.fromhex(share) for name, share in told.pop("gaussian_share").items()}
        budget = Budget(**{name: float.fromhex(number) for name, number in told.items()}, gaussian_share=shares)
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise LedgerError(f"a ledger row holds no budget: {error}") from error
    if budget_text(budget) != text:
        raise LedgerError("a ledger row's budget is not written as it is by this program")
    return budget


def unit_of(row: LedgerRow) -> Unit:
    """Whose row it is. Raises LedgerError for a level that there is not."""
    for level in get_args(Level):
        if row.level == level:
            return Unit(row.client, row.dataset, level)
    raise LedgerError(f"a ledger row's level is {row.level!r}; it must be one of {', '.join(get_args(Level))}")


def shape_fault(columns: Mapping[str, object]) -> str | None:
    """Why these columns are no row at all (one is absent, of another type, or too many), or None."""
    if set(columns) != set(COLUMNS):
        return f"its columns are {', '.join(sorted(map(str, columns)))[:200]}, which are not a row's"
    for name in COLUMNS:
        wanted = int if name in _INTEGERS else str
        if type(columns[name]) is not wanted:
            return f"its {name} is a {type(columns[name]).__name__}, not a {wanted.__name__}"
    return None


def content_fault(row: LedgerRow) -> str | None:
    """Where a row's columns contradict each other, or None. Its place in a chain is another matter."""
    try:
        unit_of(row)
        if row.kind == "charge":
            wanted = _columns_of_release(row.release) | {"operator": "", "reason": ""}
            allowed = bool(row.run) and row.dataset != ALL_DATASETS and row.state in ("RESERVED", "COMMITTED", "VOID")
        elif row.kind == "budget":
            budget_from(row.parameters)
            empty = ("run", "mechanism", "sampling", "adjacency", "release", "accountant")
            wanted = {"channel": BUDGET_CHANNEL} | dict.fromkeys(empty, "")
            allowed = row.state == "SET" and row.attempt == 0 and bool(row.operator.strip() and row.reason.strip())
        else:
            return f"its kind is {row.kind!r}; it must be charge or budget"
    except (PrivacyError, RecursionError) as error:
        return str(error)
    other = [name for name, value in wanted.items() if getattr(row, name) != value]
    if other:
        return f"its {', '.join(other)} contradicts what it is charged for"
    return None if allowed else f"its state {row.state} is none of a {row.kind}, or it lacks what a {row.kind} names"


@lru_cache(maxsize=1024)
def _columns_of_release(text: str) -> dict[str, str]:
    """The columns that a release's canonical text determines. Raises UnpricedError for another text."""
    release = PricedRelease.from_canonical(text)
    views = release.views.items()
    return {
        "channel": release.channel,
        "mechanism": release.event.mechanism,
        "parameters": _json(dict(release.event.parameters)),
        "sampling": _json({name: {"rate": view.sampling_rate, "releases": view.releases} for name, view in views}),
        "adjacency": _json({name: view.adjacency for name, view in views}),
    }


def _check_budget(budget: Budget) -> None:
    ranges = {"epsilon": (0.0, math.inf), "delta": (0.0, 1.0), "order": (1.0, math.inf)}
    for name, (low, high) in ranges.items():
        value = getattr(budget, name)
        if not low < value < high:
            raise LedgerError(f"the budget's {name} is {value}; it must be a number above {low:g} and below {high:g}")
    for adversary, share in budget.gaussian_share.items():
        if adversary not in ADVERSARIES or not 0.0 <= share <= 1.0:
            raise LedgerError(f"the budget's gaussian_share of {adversary!r} is {share}; it must be from 0 to 1")


def _fresh(unit: Unit, at: str, **told: object) -> LedgerRow:
    blank: dict[str, object] = {name: 0 if name in _INTEGERS else "" for name in COLUMNS}
    of_unit = {"client": unit.client, "dataset": unit.dataset, "level": unit.level}
    return LedgerRow(**{**blank, **of_unit, "at": at, **told})  # type: ignore[arg-type]


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
