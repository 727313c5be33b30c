"""The options that mean the same for every command that has them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

SINCE_FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]

SinceOption = Annotated[
    datetime | None, typer.Option(formats=SINCE_FORMATS, help="Only what began or was made then (UTC) or later.")
]
LimitOption = Annotated[int, typer.Option(min=1, help="How many, newest first.")]
NewestOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Only the newest so many; without it all of them.")
]
WatchOption = Annotated[
    bool,
    typer.Option(
        "--watch",
        help="Show it anew whenever it changes, until Ctrl-C. Without a terminal, or with json or jsonl, each line of "
        "stdout is then the whole answer as it stands.",
    ),
]
YesOption = Annotated[
    bool, typer.Option("--yes", "-y", help="Do not ask; needed where there is no terminal to ask at.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


def in_utc(moment: datetime | None) -> datetime | None:
    """What --since names, with its time zone."""
    return None if moment is None else moment.replace(tzinfo=UTC)
