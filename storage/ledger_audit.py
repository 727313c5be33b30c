"""Walks every chain of a ledger in SQL and says what is wrong, holding one unit's sums at a time, never the rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage import schema
from storage.ledger_chain import ChainWalk, head_fault, head_shown
from storage.ledger_heads import head_from
from storage.ledger_rows import COLUMNS, shape_fault
from storage.ledger_writer import HEAD_COLUMNS
from storage.records import LedgerRow, SignedHead

_FETCHED_AT_ONCE = 1000


def audit(session: Session, outside: Iterable[SignedHead] = (), signers: Collection[str] = ()) -> list[str]:
    """What is wrong with the ledger that `session` sees in one consistent state, one line each; see Ledger.verify."""
    given: dict[str, list[SignedHead]] = {}
    for head in outside:
        given.setdefault(head.unit_id, []).append(head)
    findings: list[str] = []
    for unit_id in sorted(_named_anywhere(session) | set(given), key=str):
        walk = ChainWalk(unit_id)
        heads = [*_own_heads(session, walk), *given.get(unit_id, ())]
        check_signatures(walk, heads, signers)
        walk.expect(heads)
        _walk_rows(session, walk)
        _compare_unit(session, walk)
        _compare_tallies(session, walk)
        findings += walk.findings
    return findings + _peer_faults(session)


def check_signatures(walk: ChainWalk, heads: Iterable[SignedHead], signers: Collection[str]) -> None:
    """Tell of heads that are not signed by whom they name, or by nobody of `signers` where any are named."""
    for head in heads:
        fault = head_fault(head)
        if fault is not None:
            walk.found(f"{head_shown(head)} is no promise: {fault}")
        elif signers and head.signer not in signers:
            walk.found(f"{head_shown(head)} is signed by {head.signer}, who is none of the signers that were named")


def feed(walk: ChainWalk, columns: Mapping[str, object]) -> None:
    """Let the walk take a row, or what stands where one should."""
    fault = shape_fault(columns)
    if fault is None:
        walk.take(LedgerRow(**columns))  # type: ignore[arg-type]
    else:
        seq = columns.get("seq")
        walk.skip(seq if type(seq) is int else walk.seq + 1, fault)


def _named_anywhere(session: Session) -> set[str]:
    """Every unit_id: a unit of which only a tally or a head is left must not be passed over."""
    found = set(session.scalars(select(schema.PrivacyUnit.unit_id)))
    for table in (schema.PrivacyRow, schema.PrivacyTally):
        found |= set(session.scalars(select(table.unit_id).distinct()))
    own = select(schema.PrivacyHead.unit_id).where(schema.PrivacyHead.source == "own")
    return found | set(session.scalars(own.distinct()))


def _own_heads(session: Session, walk: ChainWalk) -> list[SignedHead]:
    head = schema.PrivacyHead
    query = select(*(getattr(head, name) for name in HEAD_COLUMNS))
    heads = []
    for found in session.execute(query.where(head.source == "own", head.unit_id == walk.unit_id)):
        read = head_from(dict(zip(HEAD_COLUMNS, found, strict=True)))
        if isinstance(read, str):
            walk.found(f"a signed head is none: {read}")
        else:
            heads.append(read)
    return heads


def _walk_rows(session: Session, walk: ChainWalk) -> None:
    row = schema.PrivacyRow
    query = select(*(getattr(row, name) for name in COLUMNS)).where(row.unit_id == walk.unit_id).order_by(row.seq)
    for found in session.execute(query, execution_options={"yield_per": _FETCHED_AT_ONCE}):
        feed(walk, dict(zip(COLUMNS, found, strict=True)))
    walk.end()


def _compare_unit(session: Session, walk: ChainWalk) -> None:
    unit = schema.PrivacyUnit
    query = select(unit.client, unit.dataset, unit.level, unit.seq, unit.hash).where(unit.unit_id == walk.unit_id)
    found = session.execute(query).first()
    if found is None:
        walk.found("there is no row of the unit itself")
        return
    if walk.unit is not None and tuple(found[:3]) != walk.unit:
        walk.found(f"the unit itself is of client {found[0]}, dataset {found[1]}, {found[2]}, its rows are not")
    if tuple(found[3:]) != (walk.seq, walk.hash):
        walk.found(
            f"the unit ends at row {found[3]} ({str(found[4])[:16]}), its chain at row {walk.seq} ({walk.hash[:16]})"
        )


def _compare_tallies(session: Session, walk: ChainWalk) -> None:
    tally = schema.PrivacyTally
    query = select(tally.run, tally.release, tally.count).where(tally.unit_id == walk.unit_id)
    kept = {(run, release): count for run, release, count in session.execute(query)}
    for run, release in sorted(kept.keys() | walk.tally.keys(), key=str):
        counted, noted = walk.tally[run, release], kept.get((run, release), 0)
        if counted != noted:
            walk.found(f"the tally of run {run} has {noted} charges of {release[:200]}, its rows {counted}")


def _peer_faults(session: Session) -> list[str]:
    """Heads that peers signed, of chains that are not here: only their signatures can be wrong."""
    head = schema.PrivacyHead
    query = select(*(getattr(head, name) for name in HEAD_COLUMNS)).where(head.source == "peer")
    faults = []
    for found in session.execute(query, execution_options={"yield_per": _FETCHED_AT_ONCE}):
        read = head_from(dict(zip(HEAD_COLUMNS, found, strict=True)))
        fault = read if isinstance(read, str) else head_fault(read)
        if fault is not None:
            faults.append(f"unit {str(found[0])[:16]}: the peer's head at row {found[1]} is no promise: {fault}")
    return faults
