"""A backup of everything that a home's runs are made of: the database, consistent while it is written, and adapters.

    DIR/manifest.json     what this is, the schema's revision, and every file's SHA-256; written last
    DIR/database.sqlite   a copy by VACUUM INTO, or
    DIR/database.dump     pg_dump's custom format
    DIR/artifacts/        the adapters that the database names

Keys are not in it: whoever has a backup must not be able to sign.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import URL, Engine, inspect, make_url

from contract.durable_file import replace_file
from contract.errors import ConfigError, IntegrityError, SchemaError, StorageError
from storage.artifacts import ArtifactStore
from storage.engine import opened_engine, shown
from storage.orphans import named_artifacts
from storage.revisions import current_revision, head_revision, require_current, state

MANIFEST = "manifest.json"
VERSION = 1
PROGRAM_LIMIT_S = 3600.0
_BY_QUERY = {"passfile": "PGPASSFILE", "sslmode": "PGSSLMODE", "sslrootcert": "PGSSLROOTCERT"}
"""What a URL's query tells our own connections, as PostgreSQL's programs are told it."""
_NAMES = {"sqlite": "database.sqlite", "postgresql": "database.dump"}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup holds. `sha256` is of each file, by its path inside of the backup."""

    version: int
    engine: str
    revision: str
    sha256: Mapping[str, str]

    @property
    def adapters(self) -> list[str]:
        return [Path(name).stem for name in self.sha256 if name.startswith("artifacts/")]


def back_up(url: str, artifacts: ArtifactStore, directory: Path) -> Manifest:
    """Write a backup to `directory`, which must not exist or be empty.

    The database may be of an older schema: who is about to upgrade it wants a way back. Raises StorageError,
    IntegrityError for an adapter that is gone or was changed, SchemaError for a newer schema, ConfigError.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is not empty; name a directory that a backup can have for itself")
    with opened_engine(url) as engine:
        revision = _require_readable(engine)
        database = directory / _NAMES[engine.dialect.name]
        try:
            (directory / "artifacts").mkdir(mode=0o700, parents=True, exist_ok=True)
            _dump(engine, make_url(url), database)
            written = [database]
            # After the dump: what it names was there before it was committed, and nothing but `db gc` removes it.
            for sha256 in sorted(named_artifacts(engine)):
                path = directory / "artifacts" / f"{sha256}.safetensors"
                replace_file(path, artifacts.get(sha256))
                written.append(path)
            sums = {str(path.relative_to(directory)): _sha256(path) for path in written}
            manifest = Manifest(VERSION, engine.dialect.name, revision, sums)
            replace_file(directory / MANIFEST, json.dumps(asdict(manifest), indent=1, sort_keys=True).encode())
        except OSError as error:
            raise StorageError(f"{directory}: the backup cannot be written: {error.strerror}") from error
    return manifest


def _require_readable(engine: Engine) -> str:
    """The database's revision. Raises StorageError where it has none, SchemaError for one newer than this code."""
    found = current_revision(engine)
    if found is None or state(found) != "older":
        require_current(engine)
        return head_revision()
    return found


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a whole backup. Raises IntegrityError where a file is gone or changed, ConfigError for none."""
    path = directory / MANIFEST
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**told)
    except FileNotFoundError as error:
        raise ConfigError(f"{directory} holds no {MANIFEST}: it is no backup, or one that was cut off") from error
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error
    if manifest.version != VERSION or manifest.engine not in _NAMES:
        raise ConfigError(f"{path} is of version {manifest.version}, for {manifest.engine}; this code reads {VERSION}")
    for name, sha256 in manifest.sha256.items():
        file = directory / name
        if not file.is_file() or _sha256(file) != sha256:
            raise IntegrityError(f"{file} is not what was backed up")
    return manifest


def restorable(url: str, directory: Path) -> Manifest:
    """The manifest of a backup that `restore` would bring into the database at `url`; nothing is written.

    Raises what read_manifest does; StorageError where the database holds anything, ConfigError where it is of the other
    engine, SchemaError where the backup is newer than this code.
    """
    manifest = read_manifest(directory)
    if state(manifest.revision) == "newer":
        raise SchemaError(f"{directory} is of schema revision {manifest.revision}, newer than this code's")
    with opened_engine(url) as engine:
        if engine.dialect.name != manifest.engine:
            raise ConfigError(f"{directory} is of {manifest.engine}, and {shown(engine)} is {engine.dialect.name}")
        _require_empty(engine)
    return manifest


def restore(url: str, artifacts: ArtifactStore, directory: Path) -> Manifest:
    """Bring a backup into the database at `url`, which must hold nothing, and its adapters into `artifacts`.

    Raises what `restorable` does. A backup of an older schema is to be upgraded afterwards.
    """
    manifest = restorable(url, directory)
    with opened_engine(url) as engine:
        for sha256 in manifest.adapters:
            artifacts.put((directory / "artifacts" / f"{sha256}.safetensors").read_bytes())
        _load(engine, make_url(url), directory / _NAMES[manifest.engine])
    return manifest


def _dump(engine: Engine, url: URL, path: Path) -> None:
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            connection.exec_driver_sql("COMMIT")  # VACUUM runs outside of transactions only
            connection.exec_driver_sql("VACUUM INTO ?", (str(path),))
        path.chmod(0o600)
        return
    _run(["pg_dump", "--format=custom", "--no-owner", "--no-privileges", "--file", str(path)], url)


def _load(engine: Engine, url: URL, path: Path) -> None:
    if engine.dialect.name == "sqlite":
        engine.dispose()
        replace_file(Path(str(engine.url.database)), path.read_bytes())
        return
    name = str(url.database)
    _run(["pg_restore", "--exit-on-error", "--single-transaction", "--no-owner", "--dbname", name, str(path)], url)


def _require_empty(engine: Engine) -> None:
    if engine.dialect.name == "sqlite":
        if Path(str(engine.url.database)).exists():
            raise StorageError(f"{shown(engine)} is there already; move it away first: nothing is written over")
        return
    if current_revision(engine) is not None or inspect(engine).get_table_names():
        raise StorageError(f"{shown(engine)} holds tables already; name an empty database")


def _run(command: Sequence[str], url: URL) -> None:
    """One of PostgreSQL's programs. The password goes by the environment, which only its owner can read."""
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]} is not installed here; it comes with PostgreSQL's client programs")
    told = {"PGHOST": url.host or url.query.get("host"), "PGPORT": url.port, "PGUSER": url.username}
    told |= {"PGPASSWORD": url.password, "PGDATABASE": url.database, "PGCONNECT_TIMEOUT": 10}
    told |= {variable: url.query.get(name) for name, variable in _BY_QUERY.items()}
    environment = os.environ | {name: str(value) for name, value in told.items() if value is not None}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PROGRAM_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise StorageError(f"{command[0]} took longer than {PROGRAM_LIMIT_S:g} s") from error
    if done.returncode:
        raise StorageError(f"{command[0]} failed: {' '.join(done.stderr.split())[-500:]}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
