"""`trunkline runs|rounds|config`: what was run, what came of it, and what a run would be set to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contract.errors import ConfigError, StorageError
from contract.operators import OperatorOption, operator_name
from contract.options import DryRunOption, LimitOption, NewestOption, SinceOption, WatchOption, YesOption, in_utc
from contract.output import OutputFormat, OutputOption, cli_errors, emit, require_agreed, talk
from contract.watching import Look, watch
from orchestrator.metrics import judged_losses
from orchestrator.protection import told_run_privacy
from orchestrator.run_view import rounds_data, run_data, told_silence
from storage.home import adapter_dir
from storage.reader import LAST, Reader
from storage.records import Deed, RoundRow

if TYPE_CHECKING:
    from storage.ledger import Ledger

runs_app = typer.Typer(help="Runs: what was started, how it stands or ended.", no_args_is_help=True)
rounds_app = typer.Typer(help="Rounds of a run.", no_args_is_help=True)
config_app = typer.Typer(help="A run's settings.", no_args_is_help=True)

RunArgument = Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run's id, or its Flower run id.")]
LastOption = Annotated[bool, typer.Option("--last", help="The newest run.")]

RUN_COLUMNS = (
    *("run_id", "status", "mode", "rounds", "held_out_loss", "best_round", "secagg", "created_at", "silent_since"),
    "reason",
)
SHOW_COLUMNS = (
    *("run_id", "flower_run_id", "status", "reason", "mode", "rounds", "secagg", "held_out_losses", "best_round"),
    *("privacy", "adapter", "model_fingerprint", "created_at", "ended_at", "silent_since"),
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


class AttemptStatus(StrEnum):
    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


@runs_app.callback()
@rounds_app.callback()
@config_app.callback()
def _group() -> None:
    """Keeps a group with one command a group."""


@runs_app.command("list")
@cli_errors
def list_runs(
    limit: LimitOption = 20,
    status: Annotated[Status | None, typer.Option(help="Only runs that stand like this.")] = None,
    since: SinceOption = None,
    watching: WatchOption = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """The newest runs."""
    with _reader() as reader:

        def found() -> list[dict[str, Any]]:
            runs = reader.list_runs(limit, status.value if status else None, since=in_utc(since))
            return [run_data(reader, run, datetime.now(UTC)) for run in runs]

        if watching:
            watch(lambda: Look(found()), output, RUN_COLUMNS)
            return
        rows = found()
    emit(rows, output, columns=RUN_COLUMNS)
    _tell_silence(rows)


def _tell_silence(rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        if row["silent_since"] is not None:
            told = told_silence(row["run_id"], row["silent_since"], datetime.now(UTC))
            talk(f"run {row['run_id']}: {told}")


@runs_app.command("show")
@cli_errors
def show_run(run: RunArgument = None, last: LastOption = False, output: OutputOption = OutputFormat.TABLE) -> None:
    """One run: how it ended and why, and its losses. `-o json` tells its settings too."""
    with _reader() as reader:
        row = reader.get_run(named_run(run, last))
        data = run_data(reader, row, datetime.now(UTC))
        data["held_out_losses"] = judged_losses(reader.metrics(row.run_id, over_clients=True))
        with _ledger() as ledger:
            data["privacy"] = "; ".join(told_run_privacy(row, ledger))
        data["adapter"] = adapter_dir(row.run_id) if adapter_dir(row.run_id).is_dir() else None
        data |= {"flower_run_id": row.flower_run_id, "model_fingerprint": row.model_fingerprint}
        data |= {"ended_at": row.ended_at, "config": row.config}
    emit(data, output, columns=SHOW_COLUMNS)
    _tell_silence([data])


@runs_app.command("stop")
@cli_errors
def stop_run(
    run: RunArgument = None,
    last: LastOption = False,
    reason: Annotated[str, typer.Option(help="Why, for the run's history.")] = "",
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    operator: OperatorOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """End a run: its open round is aborted, what is committed stays, and its orchestrator ends when it next looks.

    That is within seconds, unless it waits for a trunk that is gone.

    `trunkline runs resume` goes on with it.
    """
    from storage.store import open_present_store

    named, who = named_run(run, last), operator_name(operator)
    with closing(open_present_store()) as store:
        row = store.get_run(named)
        if row.status != "running":
            raise StorageError(f"run {row.run_id} has {row.status} already")
        told = f"stopped by {who}" + (f": {reason}" if reason else "")
        if dry_run:
            emit({"run": row.run_id, "status": row.status, "committed_rounds": row.committed_rounds}, output)
            talk("it would be stopped; its open round, if there is one, would be aborted")
            return
        require_agreed("a run is ended", f"Stop run {row.run_id}, {row.committed_rounds} rounds committed?", yes=yes)
        deed = Deed(who, "run-stopped", row.run_id, {"reason": reason})
        if not store.finish_run(row.run_id, "stopped", told, deed=deed):
            raise StorageError(f"run {row.run_id} ended by itself meanwhile")
        emit({"run": row.run_id, "status": "stopped", "reason": told}, output)


@rounds_app.command("list")
@cli_errors
def list_rounds(
    run: RunArgument = None,
    last: LastOption = False,
    status: Annotated[AttemptStatus | None, typer.Option(help="Only attempts that stand like this.")] = None,
    since: SinceOption = None,
    limit: NewestOption = None,
    watching: WatchOption = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Every attempt at every round of a run. The held-out loss is that of the adapter which the round committed."""
    with _reader() as reader:
        run_id, opened = reader.get_run(named_run(run, last)).run_id, in_utc(since)

        def look() -> Look:
            row = reader.get_run(run_id)
            attempts = [one for one in reader.rounds(run_id) if status is None or one.status == status.value]
            attempts = [one for one in attempts if opened is None or one.opened_at >= opened]
            metrics = reader.metrics(run_id, over_clients=True)
            newest = attempts if limit is None else attempts[-limit:]
            data = rounds_data(newest, reader.participations(run_id), metrics)
            return Look(data, f"run {run_id}: {row.status}", final=row.status != "running")

        if watching:
            watch(look, output, ROUND_COLUMNS)
            return
        found = look()
    emit(found.data, output, columns=ROUND_COLUMNS, title=found.title)


@rounds_app.command("show")
@cli_errors
def show_round(
    number: Annotated[int, typer.Option("--round", min=1, help="Which round.")],
    run: RunArgument = None,
    last: LastOption = False,
    watching: WatchOption = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """What each client did in every attempt at one round, and why it fell out."""
    with _reader() as reader:
        run_id = reader.get_run(named_run(run, last)).run_id
        if watching:
            watch(lambda: _look_at_round(reader, run_id, number), output, CLIENT_COLUMNS)
            return
        found = _look_at_round(reader, run_id, number)
    emit(found.data, output, columns=CLIENT_COLUMNS, title=found.title)


def _look_at_round(reader: Reader, run_id: str, number: int) -> Look:
    row = reader.get_run(run_id)
    attempts = {one.attempt: one for one in reader.rounds(run_id) if one.number == number}
    if not attempts:
        raise StorageError(f"run {run_id} never began round {number}")
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
        for one in reader.participations(run_id, number)
    ]
    title = f"run {run_id}, round {number}: " + "; ".join(map(_attempt_told, attempts.values()))
    committed = any(one.status == "committed" for one in attempts.values())
    return Look(rows, title, final=committed or row.status != "running")


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


def named_run(run: str | None, last: bool) -> str:
    """What a command was told of which run it is for. Raises ConfigError unless that is one."""
    if (run is None) != last:
        raise ConfigError("name one run: RUN or --last" + (", not both" if last else ""))
    return LAST if run is None else run


def _attempt_told(attempt: RoundRow) -> str:
    return f"attempt {attempt.attempt} {attempt.status}" + (f" ({attempt.reason})" if attempt.reason else "")
