"""`trunkline runs|rounds|adapter|config`: what was run, what came of it, and what a run would be set to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contract.errors import ConfigError, StorageError
from contract.output import OutputFormat, OutputOption, cli_errors, emit, require_agreed, talk
from orchestrator.metrics import best_version, judged_losses
from orchestrator.operators import OperatorOption, operator_name
from orchestrator.protection import told_run_privacy
from orchestrator.run_view import rounds_data, run_data
from storage.home import artifacts_dir, run_dir
from storage.reader import LAST, Reader
from storage.records import RoundRow, RunRow

if TYPE_CHECKING:
    from storage.ledger import Ledger

runs_app = typer.Typer(help="Runs: what was started, how it stands or ended.", no_args_is_help=True)
rounds_app = typer.Typer(help="Rounds of a run.", no_args_is_help=True)
adapter_app = typer.Typer(help="Adapters: what a run is for.", no_args_is_help=True)
config_app = typer.Typer(help="A run's settings.", no_args_is_help=True)

RunArgument = Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run's id, or its Flower run id.")]
LastOption = Annotated[bool, typer.Option("--last", help="The newest run.")]

RUN_COLUMNS = ("run_id", "status", "mode", "rounds", "held_out_loss", "best_round", "secagg", "created_at", "reason")
SHOW_COLUMNS = (
    *("run_id", "flower_run_id", "status", "reason", "mode", "rounds", "secagg", "held_out_losses", "best_round"),
    *("privacy", "adapter", "model_fingerprint", "created_at", "ended_at"),
)
ROUND_COLUMNS = (
    *("round", "attempt", "status", "phase", "clients", "threshold", "train_loss", "held_out_loss"),
    *("tokens", "tokens_per_s", "wire_mb", "seconds", "reason"),
)

CLIENT_COLUMNS = ("attempt", "client", "status", "reason")


class Status(StrEnum):
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


@runs_app.callback()
@rounds_app.callback()
@adapter_app.callback()
@config_app.callback()
def _group() -> None:
    """Keeps a group with one command a group."""


@runs_app.command("list")
@cli_errors
def list_runs(
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
    status: Annotated[Status | None, typer.Option(help="Only runs that stand like this.")] = None,
    since: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="Only runs that began then (UTC) or later."),
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """The newest runs."""
    began = None if since is None else since.replace(tzinfo=UTC)
    with _reader() as reader:
        found = reader.list_runs(limit, status.value if status else None, since=began)
        rows = [run_data(reader, run) for run in found]
    emit(rows, output, columns=RUN_COLUMNS)


@runs_app.command("show")
@cli_errors
def show_run(run: RunArgument = None, last: LastOption = False, output: OutputOption = OutputFormat.TABLE) -> None:
    """One run: how it ended and why, and its losses. `-o json` tells its settings too."""
    with _reader() as reader:
        row = reader.get_run(named_run(run, last))
        data = run_data(reader, row)
        data["held_out_losses"] = judged_losses(reader.metrics(row.run_id, over_clients=True))
        with _ledger() as ledger:
            data["privacy"] = "; ".join(told_run_privacy(row, ledger))
        data["adapter"] = _adapter_directory(row.run_id) if _adapter_directory(row.run_id).is_dir() else None
        data |= {"flower_run_id": row.flower_run_id, "model_fingerprint": row.model_fingerprint}
        data |= {"ended_at": row.ended_at, "config": row.config}
    emit(data, output, columns=SHOW_COLUMNS)


@runs_app.command("stop")
@cli_errors
def stop_run(
    run: RunArgument = None,
    last: LastOption = False,
    reason: Annotated[str, typer.Option(help="Why, for the run's history.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    operator: OperatorOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """End a run: its open round is aborted, what is committed stays, and its orchestrator ends when it next looks.

    That is within seconds, unless it waits for a trunk that is gone.

    `trunkline runs resume` goes on with it.
    """
    from storage.store import open_store

    with closing(open_store()) as store:
        row = store.get_run(named_run(run, last))
        if row.status != "running":
            raise StorageError(f"run {row.run_id} has {row.status} already")
        require_agreed("a run is ended", f"Stop run {row.run_id}, {row.committed_rounds} rounds committed?", yes=yes)
        told = f"stopped by {operator_name(operator)}" + (f": {reason}" if reason else "")
        if not store.finish_run(row.run_id, "stopped", told):
            raise StorageError(f"run {row.run_id} ended by itself meanwhile")
        emit({"run": row.run_id, "status": "stopped", "reason": told}, output)


@rounds_app.command("list")
@cli_errors
def list_rounds(run: RunArgument = None, last: LastOption = False, output: OutputOption = OutputFormat.TABLE) -> None:
    """Every attempt at every round of a run. The held-out loss is that of the adapter which the round committed."""
    with _reader() as reader:
        row = reader.get_run(named_run(run, last))
        metrics = reader.metrics(row.run_id, over_clients=True)
        rows = rounds_data(reader.rounds(row.run_id), reader.participations(row.run_id), metrics)
    emit(rows, output, columns=ROUND_COLUMNS, title=f"run {row.run_id}: {row.status}")


@rounds_app.command("show")
@cli_errors
def show_round(
    number: Annotated[int, typer.Option("--round", min=1, help="Which round.")],
    run: RunArgument = None,
    last: LastOption = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """What each client did in every attempt at one round, and why it fell out."""
    with _reader() as reader:
        row = reader.get_run(named_run(run, last))
        attempts = {one.attempt: one for one in reader.rounds(row.run_id) if one.number == number}
        if not attempts:
            raise StorageError(f"run {row.run_id} never began round {number}")
        found = reader.participations(row.run_id, number)
    rows = [
        {
            "attempt": one.attempt,
            "attempt_status": attempts[one.attempt].status,
            "client": one.name or one.node_id,
            "status": one.status,
            "reason": one.reason,
            "metrics": one.metrics,
            "node_id": one.node_id,
        }
        for one in found
    ]
    title = f"run {row.run_id}, round {number}: " + "; ".join(map(_attempt_told, attempts.values()))
    emit(rows, output, columns=CLIENT_COLUMNS, title=title)


@adapter_app.command("list")
@cli_errors
def list_adapters(run: RunArgument = None, last: LastOption = False, output: OutputOption = OutputFormat.TABLE) -> None:
    """The adapters that a run committed, version 0 first, with the hashes of both halves."""
    with _reader() as reader:
        row = reader.get_run(named_run(run, last))
        losses = judged_losses(reader.metrics(row.run_id, over_clients=True))
        versions = reader.adapter_versions(row.run_id)
    rows = [
        {
            "round": version.number,
            "held_out_loss": losses.get(version.number),
            "trained_tokens": version.trained_tokens,
            "client_sha256": version.client_sha256,
            "trunk_sha256": version.trunk_sha256,
            "created_at": version.created_at.replace(microsecond=0),
        }
        for version in versions
    ]
    emit(rows, output, title=f"run {row.run_id}: {row.status}")


@adapter_app.command("export")
@cli_errors
def export(
    run: RunArgument = None,
    last: LastOption = False,
    number: Annotated[
        int | None, typer.Option("--round", min=0, help="The adapter of this round; 0 is the first one.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The adapter with the lowest held-out loss.")] = False,
    out: Annotated[Path | None, typer.Option(help="Directory to write; default: HOME/runs/RUN/adapter.")] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Write a committed adapter, by default the newest, as a directory that stock PEFT loads."""
    from orchestrator.export import export_adapter
    from storage.artifacts import ArtifactStore

    if best and number is not None:
        raise ConfigError("--best and --round both choose an adapter; give one of them")
    with _reader() as reader:
        row = reader.get_run(named_run(run, last))
        chosen = row.committed_rounds if number is None else number
        if best:
            chosen = _best(reader, row)
        directory = (out or _adapter_directory(row.run_id)).absolute()
        export = export_adapter(reader, ArtifactStore(artifacts_dir()), row, chosen, directory)
    emit(export, output)
    talk(f"check it with: trunkline adapter verify {directory}")


@adapter_app.command("verify")
@cli_errors
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An exported adapter.")],
    model: Annotated[
        str | None, typer.Option(help="The whole base model; default: the one that the export names.")
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Load an adapter with stock PEFT in a fresh process; fail unless it is what was trained."""
    from orchestrator.verification import verify_adapter
    from storage.artifacts import ArtifactStore

    with _reader_if_any() as reader:
        found = verify_adapter(directory.absolute(), model, reader, ArtifactStore(artifacts_dir()))
    if output is OutputFormat.TABLE:
        emit(found.findings, output, columns=("check", "ok", "found"), title=f"adapter {found.adapter_sha256[:12]}")
    else:
        emit({"ok": found.ok, "adapter": found.adapter, "model": found.model, "committed": found.committed,
              "adapter_sha256": found.adapter_sha256, "findings": found.findings}, output)  # fmt: skip
    if not found.committed:
        talk("note: this machine's database does not know the run; hashes were compared with the export's record only")
    if not found.ok:
        talk(f"error: {directory} is not what was trained: " + _failed_checks(found.findings))
        raise typer.Exit(1)


@config_app.command("show")
@cli_errors
def show_config(
    project: Annotated[Path, typer.Argument(help="A project directory.")] = Path(),
    resolved: Annotated[bool, typer.Option("--resolved", help="Every setting, with the place it comes from.")] = False,
    run_config: Annotated[
        list[str] | None, typer.Option("--run-config", "-c", help="key=value ..., as of a run.")
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """What a run of a project would be set to; without --resolved only what is not the default."""
    from contract.config import RunConfig
    from orchestrator.settings import parse_overrides, resolve_settings

    settings = resolve_settings(project, parse_overrides(run_config or []))
    defaults = RunConfig.from_flower({}).to_flower()
    shown = [setting for setting in settings if resolved or setting.value != defaults[setting.key]]
    emit(shown, output, columns=("key", "value", "origin"))


@contextmanager
def _reader() -> Iterator[Reader]:
    from storage.store import open_reader

    reader = open_reader()
    try:
        yield reader
    finally:
        reader.close()


@contextmanager
def _ledger() -> Iterator[Ledger]:
    from storage.ledger import open_ledger

    ledger = open_ledger()
    try:
        yield ledger
    finally:
        ledger.close()


@contextmanager
def _reader_if_any() -> Iterator[Reader | None]:
    """None where this machine has no database: who received an adapter may verify it too."""
    from storage.store import has_database

    if not has_database():
        yield None
        return
    with _reader() as reader:
        yield reader


def named_run(run: str | None, last: bool) -> str:
    """What a command was told of which run it is for. Raises ConfigError unless that is one."""
    if (run is None) != last:
        raise ConfigError("name one run: RUN or --last" + (", not both" if last else ""))
    return LAST if run is None else run


def _adapter_directory(run_id: str) -> Path:
    return run_dir(run_id) / "adapter"


def _best(reader: Reader, run: RunRow) -> int:
    if run.config.get("dp", "off") != "off":
        raise ConfigError(
            f"run {run.run_id} has differential privacy, and --best would choose its adapter by losses that nothing "
            "prices; choose one with --round"
        )
    best = best_version(judged_losses(reader.metrics(run.run_id, over_clients=True)))
    if best is None:
        raise StorageError(f"no adapter of run {run.run_id} was judged on held-out text; choose one with --round")
    return best


def _attempt_told(attempt: RoundRow) -> str:
    return f"attempt {attempt.attempt} {attempt.status}" + (f" ({attempt.reason})" if attempt.reason else "")


def _failed_checks(findings: Any) -> str:
    return "; ".join(f"{finding.check} ({finding.found})" for finding in findings if not finding.ok)
