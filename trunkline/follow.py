"""`trunkline runs watch`: a run as it goes, from SQL, whoever drives it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

from contract.errors import RoundError
from contract.output import OutputFormat, OutputOption, cli_errors, talk
from contract.watching import Look, watch
from orchestrator.cli import LastOption, RunArgument, named_run, runs_app
from orchestrator.run_view import told_silence
from storage.leases import silent_since
from storage.reader import Reader
from storage.records import RunRow
from storage.store import open_reader, utc_now
from trunkline.live import Standing, display, read_standing
from trunkline.watch import pause_s


@runs_app.command("watch")
@cli_errors
def watch_run(run: RunArgument = None, last: LastOption = False, output: OutputOption = OutputFormat.TABLE) -> None:
    """Show a run's rounds as they go, until it ends: exits 0 if it finished, 1 otherwise. Ctrl-C ends the watch alone.

    With json or jsonl stdout gets a line whenever anything changed: how the run stands, with its rounds.

    A run that was killed says nothing of it: it is told where its orchestrator was not heard for a while.
    """
    with closing(open_reader()) as reader:
        run_id = reader.get_run(named_run(run, last)).run_id
        row = follow(reader, run_id) if output is OutputFormat.TABLE else _stream(reader, run_id, output)
    if row.status != "finished":
        raise RoundError(f"run {row.run_id} {row.status}: {row.reason or 'it left no reason'}")
    talk(f"run {row.run_id} finished" + (f": {row.reason}" if row.reason else ""))


def follow(reader: Reader, run_id: str) -> RunRow:
    """Show the run until it has ended; its row then."""
    tell_silence = _silence_teller()
    with display() as show:
        while True:
            looked_s = time.monotonic()
            row = reader.get_run(run_id)
            standing = read_standing(reader, row.flower_run_id)
            if standing is not None:
                show(standing)
            if row.status != "running":
                return row
            tell_silence(row)
            time.sleep(pause_s(time.monotonic() - looked_s))


def _stream(reader: Reader, run_id: str, output: OutputFormat) -> RunRow:
    """The same as lines of JSON."""
    tell_silence = _silence_teller()
    row = reader.get_run(run_id)

    def look() -> Look:
        nonlocal row
        row = reader.get_run(run_id)
        standing = read_standing(reader, row.flower_run_id)
        tell_silence(row)
        return Look(_as_data(row, standing), final=row.status != "running")

    watch(look, output)
    return row


def _as_data(row: RunRow, standing: Standing | None) -> dict[str, object]:
    rounds, share = ((), 0.0) if standing is None else (standing.lines, standing.share)
    told = {"run_id": row.run_id, "status": row.status, "reason": row.reason, "committed_rounds": row.committed_rounds}
    return {**told, "share": share, "rounds": rounds}


def _silence_teller() -> Callable[[RunRow], None]:
    """Says, once for each silence, that a running run's orchestrator was not heard for a while."""
    told = False

    def tell(row: RunRow) -> None:
        nonlocal told
        since = silent_since(row.status, row.lease_until, utc_now())
        if since is not None and not told:
            talk(told_silence(row.run_id, since, utc_now()))
        told = since is not None

    return tell
