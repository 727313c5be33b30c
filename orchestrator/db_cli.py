"""`trunkline db`: the database's schema, of the database that TRUNKLINE_DATABASE_URL names or the one in the home."""

from __future__ import annotations

import typer

from contract.errors import SchemaError, StorageError
from contract.output import OutputFormat, OutputOption, cli_errors, emit, talk
from storage.engine import opened_engine, shown
from storage.home import database_url
from storage.revisions import current_revision, damage, drift, head_revision, require_current, state, upgrade

app = typer.Typer(help="The database's schema: upgrade, current, check.", no_args_is_help=True)


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
