"""`trunkline adapter`: the adapters that runs committed: listed, compared, exported, verified."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from contract.errors import ConfigError, StorageError
from contract.operators import OperatorOption, operator_name
from contract.options import NewestOption, SinceOption, WatchOption, in_utc
from contract.output import OutputFormat, OutputOption, cli_errors, emit, talk
from contract.watching import Look, watch
from orchestrator.cli import LastOption, RunArgument, named_run
from orchestrator.metrics import best_version, judged_losses
from storage.home import adapter_dir, artifacts_dir
from storage.reader import Reader
from storage.records import AdapterVersionRow, Deed, RunRow

app = typer.Typer(help="Adapters: what a run is for.", no_args_is_help=True)

DIFF_COLUMNS = ("name", "equal", "norm_a", "norm_b", "norm_difference", "relative", "cosine", "max_abs", "note")
NAMED = "RUN, RUN@ROUND, or the directory of an exported adapter; `last` is the newest run."


@app.callback()
def _adapter() -> None:
    """Keeps this a group."""


@app.command("list")
@cli_errors
def list_adapters(
    run: RunArgument = None,
    last: LastOption = False,
    since: SinceOption = None,
    limit: NewestOption = None,
    watching: WatchOption = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """The adapters that a run committed, version 0 first, with the hashes of both halves."""
    from storage.store import open_reader

    with closing(open_reader()) as reader:
        run_id = reader.get_run(named_run(run, last)).run_id
        if watching:
            watch(lambda: _look_at_adapters(reader, run_id, since, limit), output)
            return
        found = _look_at_adapters(reader, run_id, since, limit)
    emit(found.data, output, title=found.title)


def _look_at_adapters(reader: Reader, run_id: str, since: datetime | None, limit: int | None) -> Look:
    row = reader.get_run(run_id)
    losses = judged_losses(reader.metrics(run_id, over_clients=True))
    versions = _newest(reader.adapter_versions(run_id), in_utc(since), limit)
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
    return Look(rows, f"run {run_id}: {row.status}", final=row.status != "running")


@app.command("diff")
@cli_errors
def show_difference(
    a: Annotated[str, typer.Argument(metavar="A", help=NAMED)],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one, named likewise.")],
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """How far adapter B is from adapter A: by parameter, by what each module's LoRA adds to its weights, and in total.

    `relative` is the norm of B - A over the norm of A. A product is s B A of a module, so that factors which differ and
    still add the same are seen to. Adapters with the same hash are equal to the bit.
    """
    from orchestrator.adapter_diff import diff, read_adapter
    from storage.artifacts import ArtifactStore

    artifacts = ArtifactStore(artifacts_dir())
    with _reader_if_any() as reader:
        found = diff(read_adapter(a, reader, artifacts), read_adapter(b, reader, artifacts))
    if output is not OutputFormat.TABLE:
        emit(found, output)
        return
    emit([found.parameters, *found.by_parameter], output, DIFF_COLUMNS, f"parameters: A is {found.a}, B is {found.b}")
    emit([found.products, *found.by_module], output, DIFF_COLUMNS, "products s B A")
    talk("equal to the bit" if found.equal else f"not equal: A is {found.a_sha256}, B is {found.b_sha256}")


@app.command("export")
@cli_errors
def export(
    run: RunArgument = None,
    last: LastOption = False,
    number: Annotated[
        int | None, typer.Option("--round", min=0, help="The adapter of this round; 0 is the first one.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The adapter with the lowest held-out loss.")] = False,
    out: Annotated[Path | None, typer.Option(help="Directory to write; default: HOME/runs/RUN/adapter.")] = None,
    operator: OperatorOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Write a committed adapter, by default the newest, as a directory that stock PEFT loads."""
    from orchestrator.deeds import note_done
    from orchestrator.export import export_adapter
    from storage.artifacts import ArtifactStore
    from storage.store import open_present_store

    if best and number is not None:
        raise ConfigError("--best and --round both choose an adapter; give one of them")
    named, who = named_run(run, last), operator_name(operator)
    with closing(open_present_store()) as store:
        row = store.get_run(named)
        chosen = row.committed_rounds if number is None else number
        if best:
            chosen = _best(store, row)
        directory = (out or adapter_dir(row.run_id)).absolute()
        export = export_adapter(store, ArtifactStore(artifacts_dir()), row, chosen, directory)
        how = {"round": chosen, "directory": str(directory), "adapter_sha256": export.adapter_sha256}
        note_done(store, Deed(who, "adapter-exported", row.run_id, how), "the adapter is exported")
    emit(export, output)
    talk(f"check it with: trunkline adapter verify {directory}")


@app.command("verify")
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


@contextmanager
def _reader_if_any() -> Iterator[Reader | None]:
    """None where this machine has no database: who received an adapter may look at it too."""
    from storage.store import has_database, open_reader

    if not has_database():
        yield None
        return
    with closing(open_reader()) as reader:
        yield reader


def _newest(versions: list[AdapterVersionRow], since: datetime | None, limit: int | None) -> list[AdapterVersionRow]:
    kept = [version for version in versions if since is None or version.created_at >= since]
    return kept if limit is None else kept[-limit:]


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


def _failed_checks(findings: Any) -> str:
    return "; ".join(f"{finding.check} ({finding.found})" for finding in findings if not finding.ok)
