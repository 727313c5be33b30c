"""The audit log for what commands do outside of SQL."""

from __future__ import annotations

from contract.errors import TrunklineError
from contract.output import talk
from storage.records import Deed
from storage.store import Store


def note_done(store: Store, deed: Deed, done: str) -> None:
    """Note what was done already. Where that fails, the person is told that it is done all the same."""
    try:
        store.note(deed)
    except TrunklineError:
        talk(f"{done}, but the audit log does not say so")
        raise
