"""Alembic's way in; storage.revisions passes the connection, whose transaction it also ends."""

from __future__ import annotations

from alembic import context

from storage.revisions import VERSION_TABLE
from storage.schema import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, version_table=VERSION_TABLE
)
context.run_migrations()
