"""Whether the database can be reached, is of this schema, takes writes, and keeps time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contract.errors import TrunklineError
from storage.home import database_url
from storage.leases import LEASE_S
from trunkline.clocks import judge_skew
from trunkline.finding import NotReadyError, SkippedError

if TYPE_CHECKING:
    from sqlalchemy import Engine

REFUSED_SKEW_S = LEASE_S / 2


def check_database() -> str:
    from storage.engine import opened_engine, shown
    from storage.revisions import current_revision, state

    try:
        with opened_engine(database_url()) as engine:
            standing, place = state(current_revision(engine)), shown(engine)
    except TrunklineError as error:
        raise NotReadyError(str(error), "see TRUNKLINE_DATABASE_URL and TRUNKLINE_HOME") from None
    if standing == "older":
        raise NotReadyError(f"{place} has an older schema", "run `trunkline db upgrade`")
    if standing == "newer":
        raise NotReadyError(f"{place} has a newer schema", "install the trunkline that made it, or a later one")
    return f"{place}, {'made by the first run' if standing == 'absent' else 'schema is current'}"


def check_database_write() -> str:
    """A row is written and taken back again."""
    from storage.engine import opened_engine, shown
    from storage.health import try_write

    try:
        with opened_engine(database_url()) as engine:
            _require_current(engine)
            try_write(engine)
            return f"{shown(engine)} took a row, which was taken back"
    except TrunklineError as error:
        fix = "give its role, or this user, the right to write; see who holds its lock; look for a full disk"
        raise NotReadyError(str(error), fix) from None


def check_database_clock() -> str:
    """PostgreSQL's clock: a run's lease rests on clocks that agree to seconds."""
    from storage.engine import opened_engine, shown
    from storage.health import clock_skew

    try:
        with opened_engine(database_url()) as engine:
            _require_current(engine)
            found, place = clock_skew(engine), shown(engine)
    except TrunklineError as error:
        raise SkippedError(f"not asked: {error}") from None
    if found is None:
        raise SkippedError("SQLite has no clock but this machine's")
    return judge_skew(f"the clock of {place}", *found, REFUSED_SKEW_S)


def _require_current(engine: Engine) -> None:
    """Raise SkippedError for a database that is not there or not of this schema, which `check_database` tells of."""
    from storage.revisions import current_revision, state

    standing = state(current_revision(engine))
    if standing != "current":
        raise SkippedError(f"its schema is {standing}")
