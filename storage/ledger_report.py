"""A ledger as plain JSON for an auditor, and the check of it, which needs neither the database nor a secret.

    {"format": "trunkline privacy ledger 1",
     "units": [{"unit_id", "client", "dataset", "level", "seq", "hash"}],
     "rows": [every column of storage.records.LedgerRow, in the order of each chain],
     "heads": [every field of storage.records.SignedHead, and "source": "own" or "peer"],
     "budgets": [{"unit_id", "parameters"}]}

It holds nothing that an epsilon could be read from without recomputing it. Who signs the whole is not said here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage import schema
from storage.ledger_audit import check_signatures, feed
from storage.ledger_chain import ChainWalk
from storage.ledger_heads import head_from, read_heads
from storage.ledger_rows import COLUMNS
from storage.ledger_writer import head_columns
from storage.records import HeadSource, SignedHead

FORMAT = "trunkline privacy ledger 1"
_PARTS = ("units", "rows", "heads", "budgets")
_UNIT_COLUMNS = ("unit_id", "client", "dataset", "level", "seq", "hash")


def report_of(session: Session, client: str | None = None) -> dict[str, Any]:
    """The ledger that `session` sees, of one client or of all, as the module says."""
    unit, row = schema.PrivacyUnit, schema.PrivacyRow
    units = select(*(getattr(unit, name) for name in _UNIT_COLUMNS)).order_by(unit.unit_id)
    rows = select(*(getattr(row, name) for name in COLUMNS)).order_by(row.unit_id, row.seq)
    if client is not None:
        units, rows = units.where(unit.client == client), rows.where(row.client == client)
    told = [dict(zip(_UNIT_COLUMNS, found, strict=True)) for found in session.execute(units)]
    chains = [dict(zip(COLUMNS, found, strict=True)) for found in session.execute(rows)]
    budgets = {taken["unit_id"]: taken["parameters"] for taken in chains if taken["kind"] == "budget"}
    ids = {one["unit_id"] for one in told}
    sources: tuple[HeadSource, HeadSource] = ("own", "peer")
    heads = [
        {**head_columns(head), "source": source}
        for source in sources
        for head in read_heads(session, source)
        if client is None or head.unit_id in ids
    ]
    named = [{"unit_id": unit_id, "parameters": text} for unit_id, text in budgets.items()]
    return {"format": FORMAT, "units": told, "rows": chains, "heads": heads, "budgets": named}


def verify_report(
    report: Mapping[str, Any], outside: Iterable[SignedHead] = (), signers: Collection[str] = ()
) -> list[str]:
    """What is wrong with a report, one line each; empty where it is sound. Never raises on what a report may hold.

    Chains, columns, transitions, heads and budgets are checked as Ledger.verify checks them. `outside` are heads from
    elsewhere that its chains must agree with; where `signers` are named, its own heads must be theirs.
    """
    if report.get("format") != FORMAT or not all(_is_list_of_objects(report.get(part)) for part in _PARTS):
        return [f"this is no report of a privacy ledger: it must be {FORMAT!r} with lists of {', '.join(_PARTS)}"]
    units, unit_faults = _by_unit(report["units"], "units")
    rows, row_faults = _by_unit(report["rows"], "rows")
    budgets, budget_faults = _by_unit(report["budgets"], "budgets")
    heads, head_faults = _heads_in(report, "own")
    findings = [*unit_faults, *row_faults, *budget_faults, *head_faults, *_heads_in(report, "peer")[1]]
    for head in outside:
        heads.setdefault(head.unit_id, []).append(head)
    for unit_id in sorted(units.keys() | rows.keys() | budgets.keys() | heads.keys()):
        walk = ChainWalk(unit_id)
        check_signatures(walk, heads.get(unit_id, ()), signers)
        walk.expect(heads.get(unit_id, ()))
        for columns in rows.get(unit_id, ()):
            feed(walk, columns)
        walk.end()
        _compare(walk, units.get(unit_id, []), budgets.get(unit_id, []))
        findings += walk.findings
    for unit_id, found in _heads_in(report, "peer")[0].items():
        walk = ChainWalk(unit_id)
        check_signatures(walk, found, ())
        findings += walk.findings
    return findings


def peer_heads_in(report: Mapping[str, Any]) -> list[SignedHead]:
    """The heads that the ledger of a report was sent by its peers: what those peers' own ledgers must agree with."""
    return [head for heads in _heads_in(report, "peer")[0].values() for head in heads]


def _compare(walk: ChainWalk, units: Sequence[Mapping[str, Any]], budgets: Sequence[Mapping[str, Any]]) -> None:
    client, dataset, level = walk.unit or ("", "", "")
    ends = {"unit_id": walk.unit_id, "client": client, "dataset": dataset, "level": level}
    if list(units) != [{**ends, "seq": walk.seq, "hash": walk.hash}]:
        walk.found(f"what the report says of the unit itself is not what its {walk.seq} rows end in")
    wanted = [{"unit_id": walk.unit_id, "parameters": walk.budget}] if walk.budget else []
    if list(budgets) != wanted:
        walk.found("the budget that the report names is not the last one of its rows")


def _heads_in(report: Mapping[str, Any], source: HeadSource) -> tuple[dict[str, list[SignedHead]], list[str]]:
    """The heads of a source by unit_id, and what is wrong with those that are none."""
    heads: dict[str, list[SignedHead]] = {}
    faults = []
    for columns in report["heads"]:
        if columns.get("source") != source:
            if source == "own" and columns.get("source") != "peer":
                faults.append("a head of the report is neither its own nor a peer's")
            continue
        head = head_from(columns)
        if isinstance(head, str):
            faults.append(f"a head of the report is none: {head}")
        else:
            heads.setdefault(head.unit_id, []).append(head)
    return heads, faults


def _by_unit(objects: Sequence[Mapping[str, Any]], part: str) -> tuple[dict[str, list[Mapping[str, Any]]], list[str]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    faults = []
    for one in objects:
        if isinstance(one.get("unit_id"), str):
            found.setdefault(one["unit_id"], []).append(one)
        else:
            faults.append(f"one of the report's {part} names no unit")
    return found, faults


def _is_list_of_objects(part: object) -> bool:
    return isinstance(part, list) and all(isinstance(one, dict) for one in part)
