"""`trunkline demo`: a trunk server, several clients and a run on real text, all on this machine and gone afterwards."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from aggregation.graph import full_threshold
from contract.config import RunConfig
from contract.errors import DeadlineError, RoundError
from contract.output import OutputFormat, OutputOption, cli_errors, emit, talk
from demo.settings import MODEL_DIR, RUN_CONFIG, SOURCES
from orchestrator.protection import told_protection, told_run_privacy
from storage.home import home_dir
from storage.ledger import open_ledger
from storage.records import RunRow
from storage.store import open_reader, open_store
from trunkline.flower import simulation_config, start_superlink, start_supernode
from trunkline.programs import scripts_dir
from trunkline.run import require_row
from trunkline.watch import POLL_S, run_to_end
from trunkline.workplace import Workplace, cores, open_workplace, start_trunk

app = typer.Typer()

COMPARISON_LIMIT_S = 900.0


@dataclass(frozen=True, slots=True)
class ClientLosses:
    """Loss on one client's own held-out text, in nats per token.

    Measured after the run from texts that are everybody's: in the run itself each client's loss stays with it.
    """

    client: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demo shows at its end. The three losses are over the union of the clients' held-out text."""

    run: str
    secagg: str
    privacy: str
    clients: tuple[ClientLosses, ...]
    base_loss: float
    federated_loss: float
    solo_loss: float
    federation_pays: bool
    adapter: Path
    next: tuple[str, ...]


@app.command()
@cli_errors
def demo(
    clients: Annotated[int, typer.Option(min=2, help="How many clients take part.")] = len(SOURCES),
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds they train.")] = int(RUN_CONFIG["num-rounds"]),
    deploy: Annotated[
        bool, typer.Option("--deploy", help="Through a real SuperLink and SuperNodes instead of a simulation.")
    ] = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Fine-tune a small model over several clients whose text stays with them, on this machine and offline."""
    result = run_demo(clients, rounds, deploy=deploy)
    if output is OutputFormat.TABLE:
        _print_result(result)
    else:
        emit(result, output)


def run_demo(clients: int, rounds: int, *, deploy: bool) -> DemoResult:
    """Run the demo to its end; raises what ended it early. No process is left in either case."""
    config = demo_config(clients, rounds)
    open_store().close()  # a database that cannot be used is told of before anything starts
    how = f"a SuperLink and {clients} SuperNodes" if deploy else f"a simulation of {clients} clients"
    talk(f"Trunkline demo: {how}, one trunk server, {rounds} rounds on the standard library's own text")
    with open_workplace(min(clients, cores()) + 1) as workplace:
        row = require_row(_run(workplace, config, clients, deploy=deploy))
        talk("comparing with what each client would get by training alone, as many steps")
        compared = _compare(workplace, row, clients, rounds)
    return _result(row, compared)


def demo_config(clients: int, rounds: int) -> RunConfig:
    """The demo's settings for this many clients and rounds."""
    quorum = min(int(RUN_CONFIG["quorum"]), clients)
    return RunConfig.from_flower({**RUN_CONFIG, "model": str(MODEL_DIR), "num-rounds": rounds, "quorum": quorum})


def _run(workplace: Workplace, config: RunConfig, clients: int, *, deploy: bool) -> RunRow | None:
    supervisor = workplace.supervisor
    trunk = start_trunk(workplace, config, config.model)
    superlink = start_superlink(supervisor, simulation=not deploy)
    trunk_address = trunk.address(supervisor)
    for number in range(clients) if deploy else ():
        source = SOURCES[number % len(SOURCES)]
        floor = full_threshold(clients)  # of members too: what is left when as many are gone as a sum may lose
        site: dict[str, str | int | bool] = {"model": config.model, "data": source, "trunk-address": trunk_address}
        site |= {"secagg-min-members": floor, "secagg-min-threshold": min(floor, full_threshold(floor))}
        start_supernode(supervisor, superlink, f"client-{number}", site)
    needed = list(supervisor.daemons)
    config = config.model_copy(update={"trunk_address": trunk_address})
    talk(f"trunk ready at {config.trunk_address}; the first round waits for the clients to start")
    federation = None if deploy else simulation_config(clients, cores())
    return run_to_end(workplace, config, superlink, needed, federation)


def _compare(workplace: Workplace, row: RunRow, clients: int, rounds: int) -> Mapping[str, Any]:
    """What `demo.solo` answers, run as a process of its own: torch stays out of this one, and a signal ends it."""
    counts = ("--clients", str(clients), "--rounds", str(rounds))
    argv = [sys.executable, "-m", "demo.solo", str(_adapter(row)), *counts, "-o", "json"]
    # Nothing else computes any more: all cores are its own.
    solo = workplace.supervisor.start("solo", argv, {"OMP_NUM_THREADS": str(cores())})
    deadline = time.monotonic() + COMPARISON_LIMIT_S
    while True:
        ended = not solo.alive()
        for line in solo.new_lines():
            if line.startswith("{"):
                answer: Mapping[str, Any] = json.loads(line)["data"]
                return answer
            talk(line)
        if ended:
            raise RoundError(f"the comparison ended without an answer: {solo.last_words()}")
        if time.monotonic() > deadline:
            raise DeadlineError(f"the comparison took longer than {COMPARISON_LIMIT_S:.0f} s")
        time.sleep(POLL_S)


def _result(row: RunRow, compared: Mapping[str, Any]) -> DemoResult:
    with closing(open_reader()) as reader:
        protection = told_protection(reader, row)
    with closing(open_ledger()) as ledger:
        privacy = "; ".join(told_run_privacy(row, ledger))
    sites = tuple(
        ClientLosses(str(site["source"]).removeprefix("stdlib:"), site["base_loss"], site["federated_loss"])
        for site in compared["sites"]
    )
    return DemoResult(
        run=row.run_id,
        secagg=protection,
        privacy=privacy,
        clients=sites,
        base_loss=compared["base_loss"],
        federated_loss=compared["federated_loss"],
        solo_loss=compared["solo_loss"],
        federation_pays=compared["federated_loss"] < min(compared["base_loss"], compared["solo_loss"]),
        adapter=_adapter(row),
        next=_next_commands(_adapter(row)),
    )


def _adapter(row: RunRow) -> Path:
    return home_dir() / "runs" / row.run_id / "adapter"


def _next_commands(adapter: Path) -> tuple[str, ...]:
    """Commands that can be pasted as they are, be this installation on the PATH or not."""
    own = scripts_dir() / "trunkline"
    found = shutil.which("trunkline")
    if not own.exists():
        trunkline = f"{shlex.quote(sys.executable)} -m trunkline"
    else:
        trunkline = "trunkline" if found and Path(found).samefile(own) else shlex.quote(str(own))
    return (
        f"{trunkline} rounds list --last",
        f"{trunkline} runs report --last",
        f"{trunkline} adapter verify {shlex.quote(str(adapter))}",
        f"{trunkline} init my-run && {trunkline} run my-run --simulate 2",
    )


def _print_result(result: DemoResult) -> None:
    columns = ("client", "held-out before", "held-out after")
    told = [(one.client, f"{one.before:.3f}", f"{one.after:.3f}") for one in result.clients]
    rows = [dict(zip(columns, one, strict=True)) for one in told]
    emit(rows, columns=columns)
    verdict = "federation pays" if result.federation_pays else "federation did not pay this time"
    typer.echo(
        f"\nOn everybody's held-out text: base model {result.base_loss:.3f}, federated adapter "
        f"{result.federated_loss:.3f}, mean of the clients alone {result.solo_loss:.3f}: {verdict}.\n"
        f"Secure aggregation: {result.secagg}.\n"
        f"Privacy: {result.privacy}.\n"
        f"\nAdapter (stock PEFT): {result.adapter}\n\nTry next:"
    )
    for command in result.next:
        typer.echo(f"  {command}")
