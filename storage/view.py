"""A database that is only looked at: runs and ledger over connections which the database itself keeps from writing."""

from __future__ import annotations

from storage.engine import make_engine, read_only, shown, storage_errors
from storage.home import database_url
from storage.ledger import Ledger
from storage.reader import Reader
from storage.revisions import require_current


class View:
    """Runs and ledger of the database at `url` (default as in open_store), which is neither made nor changed.

    Nothing is asked of the database yet: `require_current` says whether it can be looked at.
    """

    def __init__(self, url: str | None = None) -> None:
        """Raises ConfigError for a URL that is none, or whose driver is absent."""
        self._engine = read_only(make_engine(url or database_url()))
        self.place = shown(self._engine)
        self.reader = Reader(self._engine)
        self.ledger = Ledger(self._engine)

    def require_current(self) -> None:
        """Raise SchemaError unless the schema is this code's, else what open_reader raises; makes no database."""
        with storage_errors(self._engine):
            require_current(self._engine)

    def close(self) -> None:
        """Give the database's connections back."""
        self._engine.dispose()
