"""`trunkline run`: a project's run, simulated here or on a SuperLink, watched to its end."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from contract.config import RunConfig
from contract.errors import ConfigError, ModelError
from contract.output import OutputFormat, OutputOption, cli_errors, emit, talk
from orchestrator.base_model import HUB_ID
from orchestrator.protection import told_protection, told_run_privacy
from storage.home import home_dir
from storage.ledger import open_ledger
from storage.records import RunRow
from storage.store import open_reader, open_store
from trunkline.bundle import project_config
from trunkline.flower import SuperLinkAddress, simulation_config, start_superlink
from trunkline.watch import run_to_end
from trunkline.workplace import cores, open_workplace, start_trunk

app = typer.Typer()

PARTITION, STDLIB_PREFIX = "{partition}", "stdlib:"


@app.command()
@cli_errors
def run(
    project: Annotated[Path, typer.Argument(help="The project's directory, as `trunkline init` writes it.")] = Path(),
    run_config: Annotated[
        list[str] | None, typer.Option("--run-config", "-c", help="Settings over the project's: 'KEY=VALUE ...'.")
    ] = None,
    simulate: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Simulate N clients on this machine, all started here.")
    ] = None,
    superlink: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Run on the SuperNodes of this SuperLink.")
    ] = None,
    root_certificates: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="CA of the SuperLink; without it no TLS is used.")
    ] = None,
    trunk: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A trunk that serves already, or several parted by commas; a simulation starts its own.",
        ),
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Run PROJECT and watch it; exits 0 when the run finished, 1 when it failed or was stopped."""
    if (simulate is None) == (superlink is None):
        raise ConfigError("say where to run: --simulate N for clients on this machine, or --superlink HOST:PORT")
    overrides = [*(run_config or []), *([f'trunk-address="{trunk}"'] if trunk else [])]
    config = project_config(project, overrides)
    if simulate is not None:
        emit(summary(run_simulated(config, simulate, own_trunk=trunk is None)), output)
        return
    certificates = root_certificates.absolute() if root_certificates else None
    row = run_deployed(config, SuperLinkAddress(str(superlink), certificates))
    if row is not None:
        emit(summary(row), output)


def run_simulated(config: RunConfig, clients: int, *, own_trunk: bool = True) -> RunRow:
    """Run with `clients` virtual ones, a SuperLink and, unless told otherwise, a trunk started for it."""
    require_simulable(config, clients)
    talk(f"data: simulated clients read {config.data}, where {{partition}} is their number, 0 to {clients - 1}")
    if not own_trunk:
        require_trunk(config.trunk_address)
    workers = min(clients, cores())
    with open_workplace(workers + 1) as workplace:
        supervisor = workplace.supervisor
        trunk = start_trunk(workplace, config, config.model) if own_trunk else None
        superlink = start_superlink(supervisor, simulation=True)
        needed = list(supervisor.daemons)
        if trunk is not None:
            config = config.model_copy(update={"trunk_address": trunk.address(supervisor)})
        talk(f"trunk {config.trunk_address}, {clients} clients, {workers} at a time; the first round starts up slowly")
        row = run_to_end(workplace, config, superlink, needed, simulation_config(clients, workers))
        return require_row(row)


def run_deployed(config: RunConfig, superlink: SuperLinkAddress) -> RunRow | None:
    """Run on a SuperLink that is there; None where this machine does not see the database that the run writes to.

    Sites read their own data and get the settings of the run: where the project keeps its samples is not theirs to see.
    """
    config = config.model_copy(update={"data": ""})
    talk("data: each SuperNode reads what its own node config names")
    talk(f"trunk {config.trunk_address}, SuperLink {superlink.address}")
    with open_workplace(1) as workplace:
        return run_to_end(workplace, config, superlink)


def require_simulable(config: RunConfig, clients: int) -> None:
    """Raise, before anything is started, what else `clients` simulated ones would run into minutes later."""
    for key, value in (("model", config.model), ("data", config.data)):
        if not value:
            raise ConfigError(f"{key} is not set; a simulation takes it from the project's settings or --run-config")
    if config.secagg == "on" and clients < 2:
        raise ConfigError(f"secagg is on and {clients} client is simulated; a sum over one hides nothing: 2 or more")
    if config.quorum > clients:
        raise ConfigError(
            f"quorum is {config.quorum} but only {clients} clients are simulated; it must be at most that"
        )
    _require_model(config.model)
    _require_data(config.data, clients)
    open_store().close()


def _require_model(model: str) -> None:
    # Whoever loads it works in another directory than this one: a relative path that the project does not hold names
    # nothing there, and only a hub id may look like one.
    path = Path(model).expanduser()
    if path.is_absolute() and not path.is_dir() or not path.is_absolute() and not HUB_ID.fullmatch(model):
        raise ModelError(f"model {model!r} is not a directory; it must be one, from the project's on, or a hub id")


def _require_data(data: str, clients: int) -> None:
    if data.startswith(STDLIB_PREFIX):
        return
    for number in range(clients if PARTITION in data else 1):
        path = Path(data.replace(PARTITION, str(number)))
        if not (path.is_absolute() and path.is_file()):
            raise ConfigError(
                f"data {data!r} names no file for simulated client {number}: {path} is not there "
                f"(clients are numbered from 0, and {clients} are simulated)"
            )


def require_trunk(address: str) -> None:
    """Raise ConnectionFailedError, before anything is started, unless a trunk answers at each of its addresses."""
    from orchestrator.replicas import connect

    with closing(connect(address)) as trunk:
        trunk.describe()


def require_row(row: RunRow | None) -> RunRow:
    """The row of a run that wrote to this machine's database, as one started wholly here does."""
    if row is None:
        raise ConfigError("the run finished, but in another database than this one: unset TRUNKLINE_DATABASE_URL")
    return row


def summary(row: RunRow) -> dict[str, object]:
    """What a person wants of a finished run."""
    with closing(open_reader()) as reader:
        protection = told_protection(reader, row)
    with closing(open_ledger()) as ledger:
        privacy = told_run_privacy(row, ledger)
    return {
        "run": row.run_id,
        "status": row.status,
        "rounds": row.committed_rounds,
        "secagg": protection,
        "privacy": "; ".join(privacy),
        "adapter": home_dir() / "runs" / row.run_id / "adapter",
        "note": row.reason,
    }
