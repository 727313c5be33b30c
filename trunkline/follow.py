"""`trunkline runs watch`: a run as it goes, from SQL, whoever drives it."""

from __future__ import annotations

import time
from contextlib import closing

from contract.errors import RoundError
from contract.output import cli_errors, talk
from orchestrator.cli import LastOption, RunArgument, named_run, runs_app
from storage.leases import LEASE_S, heard_s_ago
from storage.reader import Reader
from storage.records import RunRow
from storage.store import open_reader, utc_now
from trunkline.live import display, read_standing
from trunkline.watch import pause_s


@runs_app.command("watch")
@cli_errors
def watch(run: RunArgument = None, last: LastOption = False) -> None:
    """Show a run's rounds as they go, until it ends: exits 0 if it finished, 1 otherwise. Ctrl-C ends the watch alone.

    A run that was killed says nothing of it: it is told where its orchestrator was not heard for a while.
    """
    with closing(open_reader()) as reader:
        row = follow(reader, reader.get_run(named_run(run, last)).run_id)
    if row.status != "finished":
        raise RoundError(f"run {row.run_id} {row.status}: {row.reason or 'it left no reason'}")
    talk(f"run {row.run_id} finished" + (f": {row.reason}" if row.reason else ""))


def follow(reader: Reader, run_id: str) -> RunRow:
    """Show the run until it has ended; its row then."""
    told = False
    with display() as show:
        while True:
            looked_s = time.monotonic()
            row = reader.get_run(run_id)
            standing = read_standing(reader, row.flower_run_id)
            if standing is not None:
                show(standing)
            if row.status != "running":
                return row
            silent_s = heard_s_ago(row.lease_until, utc_now())
            if silent_s > 2 * LEASE_S and not told:
                how = f"trunkline runs resume {run_id}"
                talk(f"its orchestrator was last heard {silent_s:.0f} s ago; if it is dead: {how}")
            told = silent_s > 2 * LEASE_S
            time.sleep(pause_s(time.monotonic() - looked_s))
