"""`trunkline runs resume`: a run whose processes were killed goes on from its last committed round."""

from __future__ import annotations

import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from contract.config import RunConfig
from contract.errors import ConfigError, LeaseError
from contract.output import OutputFormat, OutputOption, cli_errors, emit, talk
from orchestrator.cli import LastOption, RunArgument, named_run, runs_app
from storage.leases import LEASE_S, require_resumable
from storage.reader import Reader
from storage.records import RunRow
from storage.store import open_reader, utc_now
from trunkline.flower import SuperLinkAddress
from trunkline.run import run_deployed, run_simulated, summary

__all__ = ["runs_app"]

_LEASE_SLACK_S = 0.5


@runs_app.command("resume")
@cli_errors
def resume(
    run: RunArgument = None,
    last: LastOption = False,
    simulate: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Clients of a simulation, where the run cannot tell.")
    ] = None,
    superlink: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The SuperLink that a deployed run goes on at.")
    ] = None,
    root_certificates: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="CA of the SuperLink; without it no TLS is used.")
    ] = None,
    trunk: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The trunk, where it is another one than before.")
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Go on with a run that failed, was stopped, or whose orchestrator, SuperLink or trunk was killed.

    Committed rounds stay as they are. The round that was open is played again as a fresh attempt, which privacy budgets
    pay for again. The run keeps its settings; only where things are may change.
    """
    with closing(open_reader()) as reader:
        row = _resumable(reader, reader.get_run(named_run(run, last)).run_id)
        clients = simulate or _simulated_clients(reader, row)
    config = RunConfig.from_flower(row.config).model_copy(update={"resume_run": row.run_id})
    if trunk is not None:
        config = RunConfig.from_flower({**config.to_flower(), "trunk-address": trunk})
    talk(f"run {row.run_id}: {row.committed_rounds} of {config.num_rounds} rounds are committed; it goes on from there")
    if row.mode == "simulation":
        if superlink is not None:
            raise ConfigError(f"run {row.run_id} is a simulation, which goes on at no SuperLink: leave --superlink out")
        emit(summary(run_simulated(config, clients, own_trunk=trunk is None)), output)
        return
    if superlink is None:
        raise ConfigError(f"run {row.run_id} was deployed: name the SuperLink that it goes on at with --superlink")
    certificates = root_certificates.absolute() if root_certificates else None
    done = run_deployed(config, SuperLinkAddress(superlink, certificates))
    if done is not None:
        emit(summary(done), output)


def _resumable(reader: Reader, run_id: str) -> RunRow:
    """The run, once its driver's lease has run out. Raises LeaseError where that is renewed meanwhile."""
    row = reader.get_run(run_id)
    heard = row.lease_until
    while True:
        try:
            require_resumable(row.run_id, row.status, row.lease_until, utc_now())
            return row
        except LeaseError as error:
            if heard is None or row.lease_until != heard:
                raise
            talk(f"{error}; waiting whether it is heard again")
        ends = heard + timedelta(seconds=_LEASE_SLACK_S)
        time.sleep(min(LEASE_S + _LEASE_SLACK_S, max(_LEASE_SLACK_S, (ends - utc_now()).total_seconds())))
        row = reader.get_run(run_id)


def _simulated_clients(reader: Reader, row: RunRow) -> int:
    """How many clients a simulation had: all of them were asked, where no cohort was drawn. 0 for a deployed run."""
    if row.mode != "simulation":
        return 0
    most = max(reader.invited(row.run_id).values(), default=0)
    if not most or row.config.get("cohort-size"):
        raise ConfigError(f"run {row.run_id} does not tell how many clients it simulates: name them with --simulate N")
    return most
