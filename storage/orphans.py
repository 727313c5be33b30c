"""Artifacts that no adapter version names: what attempts left that were cut off between the file and its commit."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from contract.durable_file import PARTIAL_PREFIX
from contract.errors import ConfigError, StorageError
from storage import schema
from storage.engine import opened_engine
from storage.revisions import require_current

YOUNGEST_S = 3600.0
"""What is younger may belong to a round that is about to commit."""


@dataclass(frozen=True, slots=True)
class Orphan:
    path: Path
    size_bytes: int
    age_s: float


def named_artifacts(engine: Engine) -> set[str]:
    """The hashes of both halves of every adapter version."""
    row = schema.AdapterVersion
    with Session(engine) as session:
        return {sha256 for pair in session.execute(select(row.client_sha256, row.trunk_sha256)) for sha256 in pair}


def orphans(url: str, artifacts: Path, older_than_s: float) -> list[Orphan]:
    """Files in `artifacts` that the database at `url` names nowhere, at least `older_than_s` old, by name.

    Raises ConfigError where the database names none of the files that are there, and so is another one's; StorageError,
    SchemaError and ConnectionFailedError.
    """
    with opened_engine(url) as engine:
        require_current(engine)
        named = named_artifacts(engine)
    found = list(_files(artifacts, named, time.time()))
    if found and not any((artifacts / f"{sha256}.safetensors").exists() for sha256 in named):
        raise ConfigError(f"none of the adapters in {artifacts} is of the database that is asked: is it the right one?")
    return [orphan for orphan in found if orphan.age_s >= max(older_than_s, YOUNGEST_S)]


def remove_orphans(url: str, artifacts: Path, older_than_s: float, agreed: Collection[Orphan]) -> list[Orphan]:
    """Remove those of `agreed` that are orphans still; answers them. Raises as `orphans`, or where one stays."""
    paths = {orphan.path for orphan in agreed}
    removed = [orphan for orphan in orphans(url, artifacts, older_than_s) if orphan.path in paths]
    for orphan in removed:
        try:
            orphan.path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{orphan.path} cannot be removed: {error.strerror}") from error
    return removed


def _files(artifacts: Path, named: set[str], now: float) -> Iterator[Orphan]:
    try:
        found = sorted(artifacts.iterdir()) if artifacts.is_dir() else []
        for path in found:
            whole = path.suffix == ".safetensors" and path.stem not in named
            if path.is_file() and (whole or path.name.startswith(PARTIAL_PREFIX)):
                status = path.stat()
                yield Orphan(path, status.st_size, now - status.st_mtime)
    except OSError as error:
        raise StorageError(f"{artifacts} cannot be read: {error.strerror}") from error
