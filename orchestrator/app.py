"""The Flower ServerApp: gathers what a run works with and conducts it. Imports no torch."""

from __future__ import annotations

import logging
import time

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.exit import add_exit_handler

from contract import logs
from orchestrator.grid import BoundedGrid
from orchestrator.ledger_key import open_ledger_key
from orchestrator.run import Start, conduct
from storage.artifacts import ArtifactStore
from storage.home import artifacts_dir, home_dir
from storage.ledger import open_ledger
from storage.records import RunMode
from storage.store import open_store

app = ServerApp()


class SystemClock:
    """Real time."""

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Conduct the run that Flower started. Raises what ended it early, so that Flower shows finished:failed."""
    speak()
    signer, mode = open_ledger_key(), mode_of(grid)
    start = Start(
        values=context.run_config,
        flower_run_id=str(context.run_id),
        mode=mode,
        grid=grid if mode == "simulation" else BoundedGrid(grid),
        store=open_store(signer=signer),
        artifacts=ArtifactStore(artifacts_dir()),
        runs_dir=home_dir() / "runs",
        clock=SystemClock(),
        ledger=open_ledger(signer=signer),
        at_exit=add_exit_handler,
    )
    conduct(start)


def mode_of(grid: object) -> RunMode:
    """Simulations run the ServerApp beside the clients' engine, with a grid in memory."""
    return "simulation" if type(grid).__name__ == "InMemoryGrid" else "deployment"


def speak() -> None:
    """Let our own log reach Flower's: it forwards stderr to `flwr run --stream`, and configures only its own logger."""
    logger = logging.getLogger("trunkline")
    if not logger.handlers:
        logger.addHandler(logs.handler("%(levelname)-7s trunkline: %(message)s"))
        logger.setLevel(logging.INFO)
