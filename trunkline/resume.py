"""`trunkline runs resume`: a run whose processes were killed goes on from its last committed round."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from contract.config import RunConfig
from contract.errors import ConfigError, LeaseError
from contract.operators import OperatorOption, operator_name
from contract.output import OutputFormat, OutputOption, cli_errors, emit, talk
from orchestrator.cli import LastOption, RunArgument, named_run, runs_app
from orchestrator.resumption import MAY_CHANGE, RESUMED
from orchestrator.settings import parse_overrides
from storage.leases import LEASE_S, require_resumable
from storage.reader import Reader
from storage.records import Deed, RunRow
from storage.store import open_present_store, open_reader, utc_now
from trunkline.flower import SuperLinkAddress
from trunkline.run import run_deployed, run_simulated, summary

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
    run_config: Annotated[
        list[str] | None, typer.Option("--run-config", "-c", help="Other waits, such as 'node-wait-s=600'.")
    ] = None,
    operator: OperatorOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Go on with a run that failed, was stopped, or whose orchestrator, SuperLink or trunk was killed.

    Committed rounds stay as they are. The round that was open is played again as a fresh attempt, which privacy budgets
    pay for again. The run keeps its settings; only where things are may change. A simulation starts a trunk of its own
    unless --trunk names one.
    """
    who = operator_name(operator)
    with closing(open_reader()) as reader:
        row = _resumable(reader, reader.get_run(named_run(run, last)).run_id)
        clients = simulate or _simulated_clients(reader, row)
    config = _config(row, trunk, run_config or [])
    talk(f"run {row.run_id}: {row.committed_rounds} of {config.num_rounds} rounds are committed; it goes on from there")
    if row.mode == "simulation":
        if superlink is not None:
            raise ConfigError(f"run {row.run_id} is a simulation, which goes on at no SuperLink: leave --superlink out")
        _note(row, who, None)
        emit(summary(run_simulated(config, clients, own_trunk=trunk is None)), output)
        return
    if superlink is None:
        raise ConfigError(f"run {row.run_id} was deployed: name the SuperLink that it goes on at with --superlink")
    _note(row, who, superlink)
    certificates = root_certificates.absolute() if root_certificates else None
    done = run_deployed(config, SuperLinkAddress(superlink, certificates))
    if done is not None:
        emit(summary(done), output)


def _note(row: RunRow, operator: str, superlink: str | None) -> None:
    how = {"was": row.status, "committed_rounds": row.committed_rounds, "superlink": superlink}
    with closing(open_present_store()) as store:
        store.note(Deed(operator, "run-resumed", row.run_id, how))


def _config(row: RunRow, trunk: str | None, overrides: Sequence[str]) -> RunConfig:
    """The run's own settings but for what may change. Raises ConfigError naming what may not."""
    changes = parse_overrides(overrides) | ({} if trunk is None else {"trunk-address": trunk})
    for key in changes:
        if key not in MAY_CHANGE or key == RESUMED:
            may = ", ".join(sorted(MAY_CHANGE - {RESUMED}))
            raise ConfigError(f"{key} stays what run {row.run_id} began with; only these may change: {may}")
    return RunConfig.from_flower({**row.config, **changes, RESUMED: row.run_id})


def _resumable(reader: Reader, run_id: str) -> RunRow:
    """The run, once its driver's lease has run out. Raises LeaseError where that is renewed meanwhile.

    It is not waited for twice: a lease that ends later than it may is of a machine whose clock goes ahead of this one.
    """
    row = reader.get_run(run_id)
    try:
        require_resumable(row.run_id, row.status, row.lease_until, utc_now())
        return row
    except LeaseError as error:
        if row.lease_until is None:
            raise
        talk(f"{error}; waiting whether it is heard again")
    ends = row.lease_until + timedelta(seconds=_LEASE_SLACK_S)
    time.sleep(min(LEASE_S + _LEASE_SLACK_S, max(_LEASE_SLACK_S, (ends - utc_now()).total_seconds())))
    row = reader.get_run(run_id)
    require_resumable(row.run_id, row.status, row.lease_until, utc_now())
    return row


def _simulated_clients(reader: Reader, row: RunRow) -> int:
    """How many clients a simulation had: all of them were asked, where no cohort was drawn. 0 for a deployed run."""
    if row.mode != "simulation":
        return 0
    most = max(reader.invited(row.run_id).values(), default=0)
    if not most or row.config.get("cohort-size"):
        raise ConfigError(f"run {row.run_id} does not tell how many clients it simulates: name them with --simulate N")
    return most
