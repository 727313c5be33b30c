"""How every `trunkline` command speaks: data on stdout in one envelope, talk on stderr, exit codes by error class.

The envelope of `-o json` is `{"schema_version": 1, "status": "ok", "data": ...}`; `-o jsonl` prints one envelope a row.
An error prints `error: REASON` on stderr and, under `-o json` or `-o jsonl`, an envelope with status "error" on stdout.
Two things are no such error: wrong usage, which the option parser tells on stderr in its own words, and a check that
fails, whose findings are data (status "ok") with exit code 1.

Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 connection or authentication, 4 timeout, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

from contract.errors import ConfigError, TrunklineError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

SCHEMA_VERSION = 1
EXIT_INTERRUPTED = 130
PIPED_TABLE_WIDTH = 4000

P = ParamSpec("P")
R = TypeVar("R")


class OutputFormat(StrEnum):
    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"


OutputOption = Annotated[
    OutputFormat, typer.Option("-o", "--output", help="How the data is printed on stdout.", show_default=True)
]


def emit(
    data: object, fmt: OutputFormat = OutputFormat.TABLE, columns: Sequence[str] | None = None, title: str | None = None
) -> None:
    """Print `data` on stdout: a sequence of rows (mappings, dataclasses or models), or one such object.

    `columns` picks and orders the columns of a table; JSON always carries everything. `title` shows on tables only.
    """
    plain = plain_data(data)
    if fmt is OutputFormat.TABLE:
        _print_table(plain, columns, title)
    elif fmt is OutputFormat.JSONL and isinstance(plain, list):
        for row in plain:
            typer.echo(envelope("ok", data=row))
    else:
        typer.echo(envelope("ok", data=plain))


def talk(message: str) -> None:
    """One line to the person, on stderr, so that stdout stays data."""
    typer.echo(message, err=True)


def require_agreed(what: str, question: str, *, yes: bool) -> None:
    """Ask, unless `yes` was given, before something that cannot be taken back; who says no ends the command with 1.

    Raises ConfigError, which says `what` it is, where there is no terminal to ask at.
    """
    if yes:
        return
    if not has_terminal():
        raise ConfigError(f"{what}, and there is no terminal to ask at: give --yes")
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        raise KeyboardInterrupt from None
    if not agreed:
        talk("nothing was changed")
        raise typer.Exit(1)


def has_terminal() -> bool:
    return sys.stdin.isatty()


def plain_data(value: object) -> Any:
    """`value` as JSON's own types. A NaN or an infinity becomes None: JSON has no word for it."""
    if value is None or isinstance(value, bool | int | str) and not isinstance(value, Enum):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Enum):
        return plain_data(value.value)
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [plain_data(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return plain_data(value.model_dump())
    raise TypeError(f"cannot print a {type(value).__name__} as data")


def cli_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Decorate a command (below `@app.command`) so that its errors become one line and the documented exit code."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except TrunklineError as error:
            report_error(error, _chosen_format(kwargs))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            talk("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return guarded


def report_error(error: TrunklineError, fmt: OutputFormat = OutputFormat.TABLE) -> None:
    """Say `error` in one line on stderr, and as an envelope on stdout where the reader asked for JSON."""
    reason = " ".join(str(error).split())
    talk(f"error: {reason}")
    if fmt is not OutputFormat.TABLE:
        detail = {"type": type(error).__name__, "message": reason, "exit_code": error.exit_code}
        typer.echo(envelope("error", error=detail))


def _chosen_format(arguments: Mapping[str, object]) -> OutputFormat:
    chosen = (value for value in arguments.values() if isinstance(value, OutputFormat))
    return next(chosen, OutputFormat.TABLE)


def envelope(status: str, **body: object) -> str:
    """One line of JSON as every command prints it; `body` is `data` or `error`."""
    return json.dumps({"schema_version": SCHEMA_VERSION, "status": status, **body}, ensure_ascii=False, allow_nan=False)


def _print_table(plain: Any, columns: Sequence[str] | None, title: str | None) -> None:
    from rich.console import Console

    # A pipe has no width: without this rich would fold every row at 80 characters.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPED_TABLE_WIDTH, highlight=False)
    console.print(renderable(plain, columns, title))


def renderable(data: object, columns: Sequence[str] | None, title: str | None) -> Table | Text:
    """`data` as `emit` shows it to people, for who draws it by other means."""
    from rich.text import Text

    plain = plain_data(data)
    if isinstance(plain, list):
        return _rows_table(plain, columns, title)
    if isinstance(plain, dict):
        return _object_table(plain, columns, title)
    return Text(_cell(plain))


def _rows_table(rows: list[Any], columns: Sequence[str] | None, title: str | None) -> Table:
    from rich.table import Table
    from rich.text import Text

    records = [row if isinstance(row, dict) else {"value": row} for row in rows]
    names = list(columns) if columns is not None else list(dict.fromkeys(name for row in records for name in row))
    table = Table(title=_literal(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in names:
        numeric = any(isinstance(row.get(name), int | float) for row in records)
        table.add_column(name.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in records:
        table.add_row(*(Text(_cell(row.get(name))) for name in names))
    return table


def _object_table(record: dict[str, Any], columns: Sequence[str] | None, title: str | None) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=_literal(title), title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name in columns if columns is not None else record:
        table.add_row(Text(name.replace("_", " ")), Text(_cell(record.get(name))))
    return table


def _literal(title: str | None) -> str | None:
    """A title may be a file's name: rich would read what stands in brackets as its markup."""
    from rich.markup import escape

    return None if title is None else escape(title)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
