"""What operators did by commands: appended in the transaction of what they changed, never altered, never removed.

`action` is a past participle that says of what: `client-enrolled`, `run-stopped`, `budget-set`.
"""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime

from sqlalchemy import Connection, insert, select
from sqlalchemy.orm import Session

from storage import schema
from storage.engine import storable
from storage.records import AuditRow, Deed

_LOG = schema.Base.metadata.tables["audit_log"]
_COLUMNS = tuple(column.name for column in fields(AuditRow))


def note(executor: Session | Connection, deed: Deed, now: datetime) -> None:
    """Append an entry, in a transaction that somebody else opened and ends."""
    told = {"operator": storable(deed.operator), "action": deed.action, "target": storable(deed.target)}
    executor.execute(insert(_LOG), {**told, "detail": dict(deed.detail), "at": now})


def newest(
    session: Session, limit: int, *, since: datetime | None, operator: str | None, action: str | None
) -> list[AuditRow]:
    """The newest `limit` entries, newest first; of those only what each filter that is given lets through."""
    query = select(*(_LOG.c[name] for name in _COLUMNS)).order_by(_LOG.c.audit_id.desc()).limit(limit)
    if since is not None:
        query = query.where(_LOG.c.at >= since)
    if operator is not None:
        query = query.where(_LOG.c.operator == operator)
    if action is not None:
        query = query.where(_LOG.c.action == action)
    return [AuditRow(**found._mapping) for found in session.execute(query)]
