"""The `trunkline` command: a table of contents that loads a chapter only when it is asked for.

`trunkline --help` imports no torch, no Flower and no database: a command's module is imported when that command runs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click
import typer
from typer.core import TyperGroup

from contract.errors import TrunklineError
from contract.output import EXIT_INTERRUPTED, report_error
from trunkline import __version__

COMPLETION_PARAMETERS = ("install_completion", "show_completion")
START, WATCH, SERVE = "Start here", "Look", "Run a site"

EXIT_CODES = (
    "Exit codes: 0 ok · 1 failed · 2 usage or configuration · 3 connection or authentication · 4 timeout · "
    "130 interrupted."
)


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a command lives: `module:attribute` of a typer app, and its line in the table of contents."""

    target: str
    help: str
    panel: str


MOUNTS = {
    "demo": Mount("trunkline.demo:app", "Fine-tune a small model over several clients on this machine.", START),
    "doctor": Mount("trunkline.doctor:app", "Check this machine: PASS, WARN, FAIL or SKIP, and what to do.", START),
    "init": Mount("trunkline.project:app", "Write a project to edit and run.", START),
    "run": Mount("trunkline.run:app", "Run a project, simulated here or on a SuperLink.", START),
    "runs": Mount("trunkline.runs:runs_app", "Runs: list, show, watch, report, resume, stop.", WATCH),
    "dashboard": Mount("trunkline.dashboard:app", "Serve runs as live pages, read-only, from SQL.", WATCH),
    "rounds": Mount("orchestrator.cli:rounds_app", "Rounds of a run: list, show.", WATCH),
    "adapter": Mount("orchestrator.adapter_cli:app", "Adapters: list, diff, export as stock PEFT, verify.", WATCH),
    "config": Mount("orchestrator.cli:config_app", "A run's settings: show.", WATCH),
    "clients": Mount("orchestrator.clients_cli:app", "Who may take part: keygen, enroll, list, show, revoke.", WATCH),
    "secagg": Mount("orchestrator.secagg_cli:app", "Secure sums: plan what a number of clients stands.", WATCH),
    "budget": Mount("orchestrator.budget_cli:app", "Privacy budgets: show, set, plan, verify, export.", WATCH),
    "db": Mount("orchestrator.db_cli:app", "The database: upgrade, current, check, log, gc, backup, restore.", WATCH),
    "trunk": Mount("server_trunk.cli:app", "The trunk server: serve, status, sessions, drain.", SERVE),
    "model": Mount("server_trunk.cli:model_app", "Checkpoints: split into a client part and a trunk part.", SERVE),
    "pki": Mount(
        "orchestrator.pki_cli:app", "Certificates for TLS to the trunk: init, issue, show, ticket-key.", SERVE
    ),
    "data": Mount("clients.cli:data_app", "A site's text: check it before anyone joins a run.", SERVE),
    "audit": Mount("trunkline.audit:app", "Attack a site's own text, and see what gets out: run.", SERVE),
}


class LazyCommand(TyperGroup):
    """Stands for a command whose module is imported when the command is run."""

    def __init__(self, name: str, mount: Mount) -> None:
        super().__init__(name=name, help=mount.help, rich_help_panel=mount.panel)
        self.mount = mount

    def loaded(self) -> click.Command:
        module, _, attribute = self.mount.target.partition(":")
        command = typer.main.get_command(getattr(importlib.import_module(module), attribute))
        command.name = self.name
        # Typer gives every app these; they belong to the root alone.
        command.params = [parameter for parameter in command.params if parameter.name not in COMPLETION_PARAMETERS]
        return command

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            return self.loaded().make_context(info_name, args, parent, **extra)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


class LazyGroup(TyperGroup):
    """The root: its commands are the mounts."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(MOUNTS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return LazyCommand(cmd_name, MOUNTS[cmd_name]) if cmd_name in MOUNTS else None


app = typer.Typer(
    name="trunkline",
    cls=LazyGroup,
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trunkline {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Federated split fine-tuning: several organisations tune one model on text that none of them may share."""


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every top-level command with its name, loaded; for the generated reference."""
    for name, mount in MOUNTS.items():
        yield name, LazyCommand(name, mount).loaded()


def main() -> None:
    """Entry point. An error that a command did not catch itself still is one line and its documented exit code."""
    try:
        app(prog_name="trunkline")
    except TrunklineError as error:
        report_error(error)
        sys.exit(error.exit_code)
