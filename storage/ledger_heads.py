"""Signed heads in SQL: those of this ledger's chains, and the newest that peers sent of theirs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime

from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from contract.errors import HeadsFullError, LedgerError
from contract.privacy_records import Unit
from storage import schema
from storage.ledger_chain import head_fault, unit_id_of
from storage.ledger_tables import chunks
from storage.ledger_writer import HEAD_COLUMNS, head_columns, moment, take_turn
from storage.records import HeadSource, SignedHead

_INTEGERS = frozenset({"seq", "round", "attempt"})
MOST_SIGNERS = 16
MOST_PEER_CHAINS = 1024
"""Bounds on what strangers can have kept for ever: any key can sign a head, and a peer names its units itself."""


def read_heads(session: Session, source: HeadSource, unit_id: str | None = None) -> list[SignedHead]:
    """The heads of a source, of one unit or of all, oldest first in each unit."""
    head = schema.PrivacyHead
    query = select(*(getattr(head, name) for name in HEAD_COLUMNS)).where(head.source == source)
    if unit_id is not None:
        query = query.where(head.unit_id == unit_id)
    return [SignedHead(*found) for found in session.execute(query.order_by(head.unit_id, head.seq, head.at))]


def newest_heads(session: Session, unit_ids: Iterable[str]) -> list[SignedHead]:
    """The last head that this ledger signed of each of these chains."""
    head, found = schema.PrivacyHead, []
    for some in chunks(unit_ids):
        own = (head.source == "own", head.unit_id.in_(some))
        last = select(head.unit_id, func.max(head.seq)).where(*own).group_by(head.unit_id)
        query = select(*(getattr(head, name) for name in HEAD_COLUMNS)).where(*own)
        ends = tuple_(head.unit_id, head.seq).in_(last)
        found += [SignedHead(*columns) for columns in session.execute(query.where(ends).order_by(head.at))]
    return list({one.unit_id: one for one in found}.values())


def newest_of_each(heads: Iterable[SignedHead]) -> list[SignedHead]:
    """The last head of each unit and signer; `heads` are the oldest first."""
    return list({(head.unit_id, head.signer): head for head in heads}.values())


def note_peer_head(session: Session, unit: Unit, head: SignedHead, at: datetime) -> None:
    """Keep a head that a peer signed of its own chain of `unit`; the newest that is here already changes nothing.

    Raises LedgerError for a head of another unit, a signature that is not its signer's, and a chain that went back: a
    row before the newest that this signer showed, or another row in its place; HeadsFullError for one more signer, or
    one more unit, than there may be.
    """
    if head.unit_id != unit_id_of(unit):
        raise LedgerError(f"a head of unit {head.unit_id[:16]} came for client {unit.client}, dataset {unit.dataset}")
    fault = head_fault(head)
    if fault is not None:
        raise LedgerError(f"the head of client {unit.client}, dataset {unit.dataset} cannot be kept: {fault}")
    take_turn(session)
    of_unit = read_heads(session, "peer", head.unit_id)
    known = [one for one in of_unit if one.signer == head.signer]
    if not known:
        _require_room(session, unit, {one.signer for one in of_unit})
    else:
        newest = known[-1]
        if head.seq < newest.seq or (head.seq == newest.seq and head.hash != newest.hash):
            raise LedgerError(
                f"the chain of client {unit.client}, dataset {unit.dataset} that {head.signer} keeps went back: "
                f"row {newest.seq} was {newest.hash[:16]}, now it shows row {head.seq}, {head.hash[:16]}"
            )
        if head.seq == newest.seq:
            return
    session.add(schema.PrivacyHead(source="peer", at=moment(at), **head_columns(head)))


def _require_room(session: Session, unit: Unit, signers: Collection[str]) -> None:
    """Raise HeadsFullError unless a head of `unit` by another than `signers`, whose heads are kept, may be kept too."""
    if len(signers) >= MOST_SIGNERS:
        raise HeadsFullError(
            f"heads of client {unit.client}, dataset {unit.dataset} by {len(signers)} keys are kept, and another key "
            f"signed this one; a ledger keeps those of {MOST_SIGNERS} keys for a unit"
        )
    head = schema.PrivacyHead
    of_peers = select(func.count(head.unit_id.distinct())).where(head.source == "peer")
    if not signers and (units := session.scalar(of_peers) or 0) >= MOST_PEER_CHAINS:
        raise HeadsFullError(
            f"peers' heads of {units} units are kept, and this one is of another, client {unit.client}, dataset "
            f"{unit.dataset}; a ledger keeps those of {MOST_PEER_CHAINS} units"
        )


def head_from(columns: Mapping[str, object]) -> SignedHead | str:
    """A head from its fields, or why they are none."""
    for name in HEAD_COLUMNS:
        wanted = int if name in _INTEGERS else str
        if type(columns.get(name)) is not wanted:
            return f"its {name} is a {type(columns.get(name)).__name__}, not a {wanted.__name__}"
    return SignedHead(**{name: columns[name] for name in HEAD_COLUMNS})  # type: ignore[arg-type]
