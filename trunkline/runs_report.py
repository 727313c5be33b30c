"""`trunkline runs report`: everything that SQL has of a run as one HTML file that stands alone."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from contract.durable_file import replace_file
from contract.errors import ConfigError, StorageError
from contract.output import OutputFormat, OutputOption, cli_errors, emit
from orchestrator.cli import LastOption, RunArgument, named_run, runs_app
from storage.home import run_dir
from storage.store import utc_now
from storage.view import View

REPORT_FILE = "report.html"


@runs_app.command("report")
@cli_errors
def report(
    run: RunArgument = None,
    last: LastOption = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write it here, over an earlier one.  [default: HOME/runs/RUN/report.html]"),
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Write a run's report: one HTML page that needs no network and no other file.

    Losses, participation, bytes, times, attempts and why they were aborted, what was spent of whose privacy, adapters,
    settings and history, all from SQL. It names sites and tells their reasons: it is for who may know those.
    """
    from trunkline.pages.facts import read_run
    from trunkline.pages.render import run_page

    with closing(View()) as view:
        view.require_current()
        row = view.reader.get_run(named_run(run, last))
        page = run_page(read_run(view, row, utc_now()), report=True).encode()
    path = (out or run_dir(row.run_id) / REPORT_FILE).absolute()
    if path.is_dir():
        raise ConfigError(f"out is {path}, which is a directory; name a file")
    try:
        if out is None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, page)
    except OSError as error:
        raise StorageError(f"cannot write the report {path}: {error.strerror}") from error
    emit({"run": row.run_id, "status": row.status, "report": path, "size_bytes": len(page)}, output)
