"""`trunkline db`: the database that TRUNKLINE_DATABASE_URL names or the one in the home, and the files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

import typer

from contract.errors import ConfigError, SchemaError, StorageError
from contract.operators import OperatorOption, operator_name
from contract.options import DryRunOption, LimitOption, SinceOption, WatchOption, YesOption, in_utc
from contract.output import OutputFormat, OutputOption, cli_errors, emit, require_agreed, talk
from contract.watching import Look, watch
from orchestrator.deeds import note_done
from storage.artifacts import ArtifactStore
from storage.backup import Manifest, back_up, restorable, restore
from storage.engine import opened_engine, shown
from storage.home import DATABASE_VARIABLE, HOME_VARIABLE, artifacts_dir, database_url, home_database
from storage.orphans import YOUNGEST_S, Orphan, orphans, remove_orphans
from storage.records import Deed
from storage.revisions import current_revision, damage, drift, head_revision, require_current, state, upgrade
from storage.store import open_present_store, open_reader

app = typer.Typer(help="The database: upgrade, current, check, log, gc, backup, restore.", no_args_is_help=True)

LOG_COLUMNS = ("at", "operator", "action", "target", "detail")
_NAMED_FILES = 100
"""How many removed files the audit log names; it counts all of them."""


@app.command("upgrade")
@cli_errors
def upgrade_database(
    dry_run: DryRunOption = False, operator: OperatorOption = None, output: OutputOption = OutputFormat.TABLE
) -> None:
    """Bring the database to this version's schema, or make it. Back it up first: there is no way down."""
    who = operator_name(operator)
    with opened_engine(database_url()) as engine:
        if dry_run:
            before, after = current_revision(engine), head_revision()
        else:
            before, after = upgrade(engine, who)
        emit({"database": shown(engine), "before": before, "revision": after}, output)
    would = "would be upgraded" if dry_run else "upgraded"
    talk("already current" if before == after else f"{would} from {before or 'nothing'} to {after}")


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


@app.command("log")
@cli_errors
def show_log(
    limit: LimitOption = 50,
    since: SinceOption = None,
    by: Annotated[str | None, typer.Option("--operator", metavar="NAME", help="Only what this operator did.")] = None,
    action: Annotated[
        str | None, typer.Option(metavar="ACTION", help="Only this, such as client-revoked or run-stopped.")
    ] = None,
    watching: WatchOption = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """The audit log: what operators changed by commands, the newest first. The database lets nobody alter it.

    What changes SQL is noted in the same transaction. Removals and drained trunks are noted before they are done, so
    that an entry may be of what then failed; exports, backups and published rosters after it.
    """
    with closing(open_reader()) as reader:

        def look() -> Look:
            return Look(reader.audit_log(limit, since=in_utc(since), operator=by, action=action))

        if watching:
            watch(look, output, LOG_COLUMNS)
            return
        rows = look().data
    emit(rows, output, columns=LOG_COLUMNS)


@app.command("gc")
@cli_errors
def collect_garbage(
    older_than_h: Annotated[
        float, typer.Option(min=YOUNGEST_S / 3600, help="Leave what is younger: a round may be about to commit it.")
    ] = 24.0,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    operator: OperatorOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Remove adapters on disk that no committed round names: attempts that were cut off leave them behind.

    A home's adapters are taken for those of one database: give each database a home of its own.
    """
    own, url, who = home_database(), database_url(), operator_name(operator)
    if own.exists() and unquote(url) != f"sqlite:///{own}":
        raise ConfigError(
            f"{artifacts_dir()} may hold adapters of the database {own} too, which is not the one that "
            f"{DATABASE_VARIABLE} names: give each database a {HOME_VARIABLE} of its own"
        )
    which = (url, artifacts_dir(), 3600.0 * older_than_h)
    found = orphans(*which)
    if found and not dry_run:
        require_agreed("what is removed is gone", f"Remove {_counted(found)}?", yes=yes)
        names = [one.path.name for one in found[:_NAMED_FILES]]
        how = {"files": len(found), "bytes": sum(one.size_bytes for one in found), "names": names}
        with closing(open_present_store()) as store:
            store.note(Deed(who, "artifacts-removed", str(artifacts_dir()), how))
        found = remove_orphans(*which, found)
    emit([{"file": one.path.name, "bytes": one.size_bytes, "age_h": one.age_s / 3600} for one in found], output)
    talk(_counted(found) + (" would be removed" if dry_run else " removed"))


def _counted(found: Sequence[Orphan]) -> str:
    return f"{len(found)} files, {sum(orphan.size_bytes for orphan in found) / 1e6:.1f} MB"


@app.command("backup")
@cli_errors
def back_up_database(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory for the backup.")],
    operator: OperatorOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Copy the database, also while runs go on, and the adapters that it names. Keys are not in it.

    It may be of an older schema, which keeps no log of it.
    """
    url, who = database_url(), operator_name(operator)
    with opened_engine(url) as engine:
        older = state(current_revision(engine)) == "older"
    if older:
        manifest = back_up(url, ArtifactStore(artifacts_dir()), directory)
        talk(f"its schema is revision {manifest.revision}: the audit log is that of `trunkline db upgrade` and later")
    else:
        with closing(open_present_store()) as store:
            manifest = back_up(url, ArtifactStore(artifacts_dir()), directory)
            how = {"revision": manifest.revision, "adapters": len(manifest.adapters)}
            note_done(store, Deed(who, "database-backed-up", str(directory.absolute()), how), "the backup is written")
    emit(_told(manifest, directory), output)


@app.command("restore")
@cli_errors
def restore_database(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `db backup` wrote.")],
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    operator: OperatorOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Bring a backup back into an empty database; every file of it is checked first, and nothing is written over.

    A privacy ledger that is restored has forgotten what was spent since.
    """
    url, who = database_url(), operator_name(operator)
    manifest = restorable(url, directory)
    if not dry_run:
        what = f"the database of {directory}, with {len(manifest.adapters)} adapters"
        question = f"Restore {what}? Its privacy ledger has forgotten what was spent since."
        require_agreed("a restored database forgets what happened since its backup", question, yes=yes)
        manifest = restore(url, ArtifactStore(artifacts_dir()), directory)
        if manifest.revision == head_revision():  # an older one has another log, or none
            with closing(open_present_store()) as store:
                how = {"revision": manifest.revision, "adapters": len(manifest.adapters)}
                deed = Deed(who, "database-restored", str(directory.absolute()), how)
                note_done(store, deed, "the database is restored")
    emit(_told(manifest, directory), output)
    if dry_run:
        talk("it is whole, and would be restored")
    if manifest.revision != head_revision():
        talk("it is of an older schema: run `trunkline db upgrade`")


def _told(manifest: Manifest, directory: Path) -> dict[str, object]:
    return {
        "backup": directory,
        "database": manifest.engine,
        "revision": manifest.revision,
        "adapters": len(manifest.adapters),
    }
