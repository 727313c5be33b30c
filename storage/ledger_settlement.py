"""What an attempt reserved becomes COMMITTED or VOID, within a transaction that somebody else opened and ends."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from contract.errors import LedgerError
from contract.privacy_records import Unit
from storage import schema
from storage.ledger_chain import unit_id_of
from storage.ledger_rows import COLUMNS, settled_row
from storage.ledger_tables import chunks
from storage.ledger_writer import LedgerWriter, moment, take_turn
from storage.records import HeadSigner, LedgerRow, Settled

Attempt = tuple[str, int, int]
"""Run, round, attempt."""


def settle_in(
    session: Session,
    attempt: Attempt,
    state: Settled,
    *,
    at: datetime,
    units: Iterable[Unit] | None = None,
    signer: HeadSigner | None = None,
) -> None:
    """Append a row of `state` for each charge of `attempt` that is RESERVED and not settled, and sign the heads.

    With `units` for theirs alone, and each must have reserved. COMMITTED again changes nothing, and without `units` it
    leaves alone what is VOID. Raises LedgerError where nothing was reserved, for VOID of anything that is COMMITTED,
    for VOID of what is VOID already, and for COMMITTED of named units' charges that are VOID.
    """
    take_turn(session)
    named = None if units is None else {unit_id_of(unit): unit for unit in units}
    charges = _charges_of(session, attempt, named)
    writer = LedgerWriter(session, (row.unit_id for row in charges))
    for unit_id, unit in (named or {}).items():
        if all(row.unit_id != unit_id for row in charges):
            raise LedgerError(f"client {unit.client}, dataset {unit.dataset} reserved nothing for {_shown(attempt)}")
    if not charges:
        raise LedgerError(f"nothing was reserved for {_shown(attempt)}; what left unreserved cannot be settled")
    opened = _unsettled(charges, attempt, state, every_one=named is not None)
    for row in opened:
        writer.append(settled_row(row, state, moment(at)))
    writer.write()
    if signer is not None:
        writer.sign(signer, at)


def _charges_of(session: Session, attempt: Attempt, unit_ids: Iterable[str] | None) -> list[LedgerRow]:
    """All rows of an attempt, in the order of each chain."""
    row = schema.PrivacyRow
    query = select(*(getattr(row, name) for name in COLUMNS)).where(*_of(attempt)).order_by(row.unit_id, row.seq)
    if unit_ids is None:
        return [LedgerRow(*found) for found in session.execute(query)]
    return [
        LedgerRow(*found) for some in chunks(unit_ids) for found in session.execute(query.where(row.unit_id.in_(some)))
    ]


def _unsettled(charges: Iterable[LedgerRow], attempt: Attempt, state: Settled, every_one: bool) -> list[LedgerRow]:
    """The reserved rows to settle; raises LedgerError where one may not be settled so."""
    reserved = {(row.unit_id, row.channel): row for row in charges if row.state == "RESERVED"}
    settled = {(row.unit_id, row.channel): row for row in charges if row.state != "RESERVED"}
    for row in settled.values():
        wrong = row.state == "COMMITTED" if state == "VOID" else row.state == "VOID" and every_one
        if wrong:
            raise LedgerError(
                f"{_shown(attempt)} of client {row.client}, dataset {row.dataset} is {row.state} on {row.channel}: "
                f"it cannot become {state}"
            )
    opened = [row for key, row in reserved.items() if key not in settled]
    if state == "VOID" and (not opened or (every_one and settled)):
        raise LedgerError(f"{_shown(attempt)} is VOID already; what is given back is given back once")
    return opened


def _of(attempt: Attempt) -> tuple[ColumnElement[bool], ...]:
    row = schema.PrivacyRow
    run, number, made = attempt
    return (row.run == run, row.round == number, row.attempt == made, row.kind == "charge")


def _shown(attempt: Attempt) -> str:
    run, number, made = attempt
    return f"attempt {made} at round {number} of run {run}"
