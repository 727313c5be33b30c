"""`trunkline data ...`: a look at a site's own text before it joins a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from contract.output import OutputFormat, OutputOption, cli_errors, emit, talk

if TYPE_CHECKING:
    from clients.data import DataReport

data_app = typer.Typer(help="A site's own text.", no_args_is_help=True)


@data_app.callback()
def _data() -> None:
    """Keeps `check` a command of its own while it is the only one."""


@data_app.command("check")
@cli_errors
def check(
    file: Annotated[str, typer.Argument(help="JSONL, JSON, Parquet or plain-text file, or stdlib:NAME.")],
    model: Annotated[Path, typer.Option(help="Model directory (or hub id) whose tokenizer the run will use.")],
    max_length: Annotated[int, typer.Option(min=2, help="The run's max-length, in tokens.")] = 128,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Count rows, tokens and truncated rows, and name the first broken row. Exits 1 where there is one, or too few."""
    from clients.data import check_dataset, load_tokenizer

    report = check_dataset(file, load_tokenizer(model), max_length)
    emit(_plain(file, report), output, title=file)
    if report.problem:
        talk(f"error: {file}: {report.problem}")
        raise typer.Exit(1)


def _plain(file: str, report: DataReport) -> dict[str, object]:
    counts = report.counts
    return {
        "file": file,
        "sound": not report.problem,
        "rows": counts.rows,
        "empty_rows": counts.empty,
        "truncated_rows": counts.truncated,
        "tokens": counts.tokens,
        "masked_share": round(counts.masked_share, 4),
        "first_broken_row": report.problem if report.broken else None,
        "problem": report.problem or None,
    }
