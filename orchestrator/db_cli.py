"""`trunkline db`: the database that TRUNKLINE_DATABASE_URL names or the one in the home, and the files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

import typer

from contract.errors import ConfigError, SchemaError, StorageError
from contract.output import OutputFormat, OutputOption, cli_errors, emit, require_agreed, talk
from storage.artifacts import ArtifactStore
from storage.backup import Manifest, back_up, restore
from storage.engine import opened_engine, shown
from storage.home import DATABASE_VARIABLE, HOME_VARIABLE, artifacts_dir, database_url, home_database
from storage.orphans import YOUNGEST_S, Orphan, orphans, remove_orphans
from storage.revisions import current_revision, damage, drift, head_revision, require_current, state, upgrade

app = typer.Typer(help="The database: upgrade, current, check, gc, backup, restore.", no_args_is_help=True)


@app.command("upgrade")
@cli_errors
def upgrade_database(output: OutputOption = OutputFormat.TABLE) -> None:
    """Bring the database to this version's schema, or make it. Back it up first: there is no way down."""
    with opened_engine(database_url()) as engine:
        before, after = upgrade(engine)
        emit({"database": shown(engine), "before": before, "revision": after}, output)
    talk("already current" if before == after else f"upgraded from {before or 'nothing'} to {after}")


@app.command("current")
@cli_errors
def show_current(output: OutputOption = OutputFormat.TABLE) -> None:
    """The database's schema revision beside this version's: absent, older, current or newer."""
    with opened_engine(database_url()) as engine:
        found = current_revision(engine)
        data = {"database": shown(engine), "revision": found, "newest": head_revision(), "state": state(found)}
    emit(data, output)


@app.command("check")
@cli_errors
def check_database(output: OutputOption = OutputFormat.TABLE) -> None:
    """Fail unless the schema is this version's, its tables are as they should be and SQLite's file is whole."""
    with opened_engine(database_url()) as engine:
        require_current(engine)
        for faults, error in ((damage(engine), StorageError), (drift(engine), SchemaError)):
            if faults:
                raise error(f"{shown(engine)} is not sound: " + "; ".join(faults[:5]))
        emit({"database": shown(engine), "revision": head_revision(), "sound": True}, output)


@app.command("gc")
@cli_errors
def collect_garbage(
    older_than_h: Annotated[
        float, typer.Option(min=YOUNGEST_S / 3600, help="Leave what is younger: a round may be about to commit it.")
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Remove adapters on disk that no committed round names: attempts that were cut off leave them behind.

    A home's adapters are taken for those of one database: give each database a home of its own.
    """
    own, url = home_database(), database_url()
    if own.exists() and unquote(url) != f"sqlite:///{own}":
        raise ConfigError(
            f"{artifacts_dir()} may hold adapters of the database {own} too, which is not the one that "
            f"{DATABASE_VARIABLE} names: give each database a {HOME_VARIABLE} of its own"
        )
    which = (url, artifacts_dir(), 3600.0 * older_than_h)
    found = orphans(*which)
    if found and not dry_run:
        require_agreed("what is removed is gone", f"Remove {_counted(found)}?", yes=yes)
        found = remove_orphans(*which, found)
    emit([{"file": one.path.name, "bytes": one.size_bytes, "age_h": one.age_s / 3600} for one in found], output)
    talk(_counted(found) + (" would be removed" if dry_run else " removed"))


def _counted(found: Sequence[Orphan]) -> str:
    return f"{len(found)} files, {sum(orphan.size_bytes for orphan in found) / 1e6:.1f} MB"


@app.command("backup")
@cli_errors
def back_up_database(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory for the backup.")],
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Copy the database, also while runs go on, and the adapters that it names. Keys are not in it."""
    manifest = back_up(database_url(), ArtifactStore(artifacts_dir()), directory)
    emit(_told(manifest, directory), output)


@app.command("restore")
@cli_errors
def restore_database(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `db backup` wrote.")],
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Bring a backup back into an empty database; every file of it is checked first, and nothing is written over."""
    manifest = restore(database_url(), ArtifactStore(artifacts_dir()), directory)
    emit(_told(manifest, directory), output)
    if manifest.revision != head_revision():
        talk("it is of an older schema: run `trunkline db upgrade`")


def _told(manifest: Manifest, directory: Path) -> dict[str, object]:
    return {
        "backup": directory,
        "database": manifest.engine,
        "revision": manifest.revision,
        "adapters": len(manifest.adapters),
    }
