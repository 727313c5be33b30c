"""`--watch`: the same answer again and again, redrawn on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import errno
import select
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from contract.output import OutputFormat, envelope, plain_data, renderable

PAUSE_S = 1.0
PAUSE_SHARE = 4.0
LONGEST_PAUSE_S = 5.0
"""Between two looks pass four times what the last one took: who watches must not slow down what is watched."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one look found; `title` shows on tables only. `final` says that it will change no more."""

    data: object
    title: str | None = None
    final: bool = False


def watch(look: Callable[[], Look], fmt: OutputFormat, columns: Sequence[str] | None = None) -> None:
    """Show what `look` answers until that is final, or for ever: Ctrl-C is for contract.output.cli_errors.

    A table on a terminal is drawn over the last one. Else each line of stdout is an envelope with all of `data`, which
    is printed when it differs from the line before, while somebody reads it. What `look` raises ends the watch.
    """
    if fmt is OutputFormat.TABLE and sys.stdout.isatty():
        _redraw(look, columns)
    else:
        _stream(look)


def _redraw(look: Callable[[], Look], columns: Sequence[str] | None) -> None:
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(file=sys.stdout, highlight=False), auto_refresh=False) as live:
        while True:
            asked = time.monotonic()
            found = look()
            live.update(renderable(found.data, columns, found.title), refresh=True)
            if found.final:
                return
            time.sleep(_pause_s(time.monotonic() - asked))


def _stream(look: Callable[[], Look]) -> None:
    last: object = None
    while True:
        asked = time.monotonic()
        found = look()
        plain = plain_data(found.data)
        if plain != last:
            sys.stdout.write(envelope("ok", data=plain) + "\n")
            sys.stdout.flush()
            last = plain
        if found.final:
            return
        time.sleep(_pause_s(time.monotonic() - asked))
        _require_reader()


def _require_reader() -> None:
    """Raise BrokenPipeError where nobody reads stdout any more: who prints nothing would never hear of it."""
    try:
        looked = select.poll()
        looked.register(sys.stdout.fileno(), 0)  # errors are told unasked
    except (OSError, ValueError):  # no file at all, as where a program has replaced stdout
        return
    if any(told & (select.POLLERR | select.POLLNVAL) for _, told in looked.poll(0)):
        raise BrokenPipeError(errno.EPIPE, "nobody reads what is watched")


def _pause_s(look_s: float) -> float:
    return min(max(PAUSE_S, PAUSE_SHARE * look_s), LONGEST_PAUSE_S)
