"""A run as it goes, read from SQL: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from storage.reader import Reader
from storage.records import RoundRow, RunRow

_COLUMNS = ("round", "clients", "held-out loss", "train loss", "tokens/s", "on the wire", "seconds", "")

# (number, attempt) of a round: the clients asked; (number, attempt, name) of a value over all clients: the value.
_Asked = Mapping[tuple[int, int], int]
_Values = Mapping[tuple[int, int, str], float]


@dataclass(frozen=True, slots=True)
class RoundLine:
    """One line of the table; None where a number is not known yet. Round 0 is the adapter that the run begins with.

    `held_out_loss` judges the adapter that the round made; the clients tell it at the start of the next one.
    """

    number: int
    replied: int
    asked: int
    held_out_loss: float | None
    train_loss: float | None
    tokens_per_s: float | None
    wire_bytes: int
    seconds: float | None
    phase: str
    committed: bool


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a run stands: its row, a line per round begun, and the share of its work that is done, 0 to 1."""

    run: RunRow
    lines: tuple[RoundLine, ...]
    share: float


def read_standing(reader: Reader, flower_run_id: str) -> Standing | None:
    """Where the run that this Flower run drives stands, or None before it is in SQL.

    Reads what is shown and no more, for a watch asks again and again: nothing of it grows with the number of clients.
    """
    run = reader.run_by_flower_id(flower_run_id)
    if run is None:
        return None
    latest = {row.number: row for row in reader.rounds(run.run_id)}
    values = {(row.number, row.attempt, row.name): row.value for row in reader.metrics(run.run_id, over_clients=True)}
    asked = reader.invited(run.run_id)
    lines = [_line(row, values, asked) for row in latest.values()]
    first = _held_out(values, 0)
    if lines and first is not None:
        lines.insert(0, RoundLine(0, 0, 0, first, None, None, 0, None, "", True))
    return Standing(run, tuple(lines), _share(run, list(latest.values()), asked))


def wire_size(size_bytes: float) -> str:
    """Bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000 or unit == "GB":
            return f"{size_bytes:.0f} {unit}" if unit in ("B", "kB") else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return ""


@contextmanager
def display() -> Iterator[Callable[[Standing], None]]:
    """A function that shows a run's newest standing on stderr."""
    if not sys.stderr.isatty():
        yield _PlainLines()
        return
    with Live(console=Console(stderr=True), refresh_per_second=8, transient=False) as live:
        yield lambda standing: live.update(round_table(standing))


class _PlainLines:
    """For pipes and logs: a line when a round begins, when it is committed, and when its adapter was judged."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, standing: Standing) -> None:
        rounds = standing.run.config.get("num-rounds", "?")
        self._say(f"run {standing.run.run_id}")
        for line in standing.lines:
            if line.number == 0:
                self._say(f"before round 1: held-out loss {_number(line.held_out_loss)}")
                continue
            name = f"round {line.number}/{rounds}"
            self._say(f"{name}: {line.asked} clients asked")
            if line.committed:
                self._say(f"{name}: " + ", ".join(_told(line)))
            if line.held_out_loss is not None:
                self._say(f"{name}: held-out loss {_number(line.held_out_loss)}")

    def _say(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


def _told(line: RoundLine) -> Iterator[str]:
    """What is known of a committed round: a private one tells no losses and no counts."""
    yield f"{line.replied}/{line.asked} replied"
    if line.train_loss is not None:
        yield f"train loss {_number(line.train_loss)}"
    if line.tokens_per_s:
        yield f"{_number(line.tokens_per_s, 0)} tokens/s"
    if line.wire_bytes:
        yield f"{wire_size(line.wire_bytes)} on the wire"
    yield f"{_number(line.seconds, 1)} s"


def round_table(standing: Standing) -> Group:
    """The table of rounds with a bar of the run's progress under it."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("", "clients") else "right")
    for line in standing.lines:
        first = line.number == 0
        table.add_row(
            "start" if first else str(line.number),
            "" if first else f"{line.replied}/{line.asked}",
            _number(line.held_out_loss),
            _number(line.train_loss),
            _number(line.tokens_per_s or None, 0),
            wire_size(line.wire_bytes) if line.wire_bytes else "",
            _number(line.seconds, 1),
            Text(line.phase, style="dim"),
        )
    done = Text(f" {100 * standing.share:3.0f} % of {standing.run.config.get('num-rounds', '?')} rounds")
    bar = Table.grid()
    bar.add_row(ProgressBar(total=1.0, completed=standing.share, width=40), done)
    return Group(table, bar)


def _line(row: RoundRow, values: _Values, asked: _Asked) -> RoundLine:
    committed = row.status == "committed"
    seconds = row.seconds if row.seconds is not None else (row.progress_at - row.opened_at).total_seconds()
    tokens = row.trained_tokens if committed else row.tokens
    return RoundLine(
        number=row.number,
        replied=row.replies,
        asked=asked.get((row.number, row.attempt), 0),
        held_out_loss=_held_out(values, row.number),
        train_loss=values.get((row.number, row.attempt, "train_loss")),
        tokens_per_s=tokens / seconds if seconds > 0 else None,
        wire_bytes=row.received_bytes + row.sent_bytes,
        seconds=seconds if seconds > 0 else None,
        phase="" if committed else row.phase if row.status == "open" else row.status,
        committed=committed,
    )


def _held_out(values: _Values, version: int) -> float | None:
    return values.get((version, 0, "eval_loss"))


def _share(run: RunRow, rounds: Sequence[RoundRow], asked: _Asked) -> float:
    """Committed rounds, and of the open one the steps that the trunk has seen, where steps are what counts a round.

    Of a private run the trunk tells no steps: of it those count that have replied.
    """
    wanted = int(run.config.get("num-rounds", 0) or 0)
    if run.status == "finished":
        return 1.0
    opened = next((row for row in rounds if row.status == "open"), None)
    if not wanted:
        return 0.0
    part = _share_of_round(run, opened, asked.get((opened.number, opened.attempt), 0)) if opened else 0.0
    return min(1.0, (run.committed_rounds + part) / wanted)


def _share_of_round(run: RunRow, opened: RoundRow, clients: int) -> float:
    if run.config.get("dp", "off") != "off":
        done, due = opened.replies, clients
    else:
        done, due = opened.steps, clients * int(run.config.get("local-steps", 0) or 0)
    return min(done / due, 0.99) if due else 0.0


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
