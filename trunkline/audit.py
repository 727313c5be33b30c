"""`trunkline audit`: attack a site's own text and see what gets out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from contract.config import ConfigValue, RunConfig
from contract.errors import ConfigError
from contract.openmp import waiting
from contract.output import OutputFormat, OutputOption, cli_errors, emit, talk
from orchestrator.settings import parse_overrides
from trunkline.bundle import project_config

if TYPE_CHECKING:
    from clients.audits.audit import AuditReport
    from clients.audits.findings import Attack

app = typer.Typer(help="Attacks on a site's own text, as a test bench.", no_args_is_help=True)

OutOption = Annotated[Path, typer.Option(metavar="DIR", help="Where report.json, .md and .png are written.")]
ModelOption = Annotated[str, typer.Option(metavar="DIR", help="The whole base model; else the settings' model.")]
DataOption = Annotated[str, typer.Option(metavar="FILE", help="Text to attack, or stdlib:NAME; else the settings'.")]
AuxiliaryOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="Public text like it, for attackers to learn from; else the standard library's other domains.",
    ),
]
ProjectOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Take the settings from this project.")]
RunConfigOption = Annotated[
    list[str] | None, typer.Option("--run-config", "-c", help="Settings of the run: 'KEY=VALUE ...'.")
]
HeadOption = Annotated[int | None, typer.Option(min=0, help="The setting head-layers.")]
TailOption = Annotated[int | None, typer.Option(min=0, help="The setting tail-layers.")]
WireOption = Annotated[
    str | None,
    typer.Option(metavar="off|empirical|dp", help="The setting wire; dp brings dp=example and metrics=off with it."),
]
ModeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="'NAME: KEY=VALUE ...'",
        help="A mode to audit: settings over the run's. Without any, the run's own are the only mode.",
    ),
]
AttacksOption = Annotated[str, typer.Option(metavar="NAME,...", help="Which attacks, parted by commas.")]
TokensOption = Annotated[int, typer.Option(min=100, help="How many tokens of the text are attacked.")]
PassesOption = Annotated[
    int, typer.Option(min=0, help="How often the trunk is sent each row; 0: as often as in a run by the settings.")
]
AdapterOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Ask of this exported adapter which rows it was trained on.")
]
MembersOption = Annotated[str, typer.Option(metavar="FILE", help="Rows that --adapter was trained on.")]
NonmembersOption = Annotated[str, typer.Option(metavar="FILE", help="Rows like them that it never saw.")]
FailAboveOption = Annotated[
    float | None,
    typer.Option(
        metavar="POINTS",
        min=0.0,
        help="Exit 1 when an attack is surely, by its interval, so many percentage points above the best guesser.",
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Chooses rows and canaries. The noise is drawn anew each time.")]

_ALL_ATTACKS = "enumeration,inversion,labels,membership,canaries"
_BESIDE_WIRE_DP: Mapping[str, ConfigValue] = {"dp": "example", "metrics": "off"}


@app.callback()
def _audit() -> None:
    """Keeps `run` a command of its own while it is the only one."""


@app.command("run")
@cli_errors
def run(
    out: OutOption,
    model: ModelOption = "",
    data: DataOption = "",
    auxiliary: AuxiliaryOption = None,
    project: ProjectOption = None,
    run_config: RunConfigOption = None,
    head_layers: HeadOption = None,
    tail_layers: TailOption = None,
    wire: WireOption = None,
    mode: ModeOption = None,
    attacks: AttacksOption = _ALL_ATTACKS,
    tokens: TokensOption = 5000,
    passes: PassesOption = 0,
    adapter: AdapterOption = None,
    members: MembersOption = "",
    nonmembers: NonmembersOption = "",
    fail_above: FailAboveOption = None,
    seed: SeedOption = 0,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Attack a site's own text. Exits 1 when a control fails, or when an attack beats --fail-above."""
    told = {"model": model, "data": data, "head-layers": head_layers, "tail-layers": tail_layers, "wire": wire}
    modes = _modes(
        project, run_config or [], {key: value for key, value in told.items() if value not in (None, "")}, mode or []
    )
    chosen = _chosen_attacks(attacks, trained=adapter is None)
    os.environ.update(waiting(os.environ))
    from clients.audits.audit import AuditPlan, Released, public_text_beside, run_audit
    from clients.audits.report import require_writable, write_report

    first = _require_sources(next(iter(modes.values())))
    if adapter is not None and not (members and nonmembers):
        raise ConfigError("--adapter needs --members and --nonmembers: rows that it was trained on, and rows like them")
    plan = AuditPlan(
        model=first.model,
        data=first.data,
        modes=modes,
        auxiliary=auxiliary or public_text_beside(first.data),
        attacks=chosen,
        tokens=tokens,
        seed=seed,
        passes=passes,
        released=Released(adapter, members, nonmembers) if adapter else None,
    )
    require_writable(out)
    report = run_audit(plan, talk)
    _tell(report, write_report(report, out), output)
    _judge(report, fail_above)


def _modes(
    project: Path | None, run_config: Sequence[str], told: Mapping[str, ConfigValue], modes: Sequence[str]
) -> dict[str, RunConfig]:
    """The settings of each mode by its name: the project's, then --run-config, then options, then the mode's own."""

    def settings(overrides: Sequence[str]) -> RunConfig:
        own = project_config(project, run_config).to_flower() if project else {}
        beside = _BESIDE_WIRE_DP if told.get("wire") == "dp" else {}
        said = {**parse_overrides(run_config), **told, **parse_overrides(overrides)}
        paths: dict[str, ConfigValue] = {key: own[key] for key in ("model", "data") if key in own and key not in told}
        return RunConfig.from_flower({**own, **beside, **said, **paths})

    if not modes:
        config = settings([])
        return {f"wire {config.wire}, dp {config.dp}": config}
    found = {}
    for text in modes:
        name, parted, overrides = text.partition(":")
        if not parted or not name.strip():
            raise ConfigError(f"--mode is {text!r}; it must be 'NAME: KEY=VALUE ...'")
        found[name.strip()] = settings([overrides])
    return found


def _require_sources(config: RunConfig) -> RunConfig:
    for key, value in (("model", config.model), ("data", config.data)):
        if not value:
            raise ConfigError(f"{key} is not set; name it with --{key}, in a --project or by --run-config")
    if "{partition}" in config.data:
        raise ConfigError(f"data is {config.data!r}; an audit needs one site's text: name it with --data")
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    return config


def _chosen_attacks(text: str, *, trained: bool) -> tuple[Attack, ...]:
    known = _ALL_ATTACKS.split(",")
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--attacks has {unknown[0]!r}; it must be some of {', '.join(known)}")
    if not trained and "membership" not in names:
        raise ConfigError("--adapter is attacked by membership, which --attacks leaves out")
    kept = known if trained else [name for name in known if name != "canaries"]
    return tuple(name for name in kept if name in names)  # type: ignore[misc]


def _tell(report: AuditReport, written: Sequence[Path], output: OutputFormat) -> None:
    from clients.audits.report import NO_PICTURE, PICTURE_FILE, summary_rows

    emit(summary_rows(report) if output is OutputFormat.TABLE else report, output)
    talk(f"written: {', '.join(str(path) for path in written)}")
    if PICTURE_FILE not in {path.name for path in written}:
        talk(NO_PICTURE)


def _judge(report: AuditReport, fail_above: float | None) -> None:
    """Exit 1 where the report shows that something is wrong, or shows nothing."""
    broken = report.broken_controls
    for one in broken:
        talk(f"error: {one.attack}, {one.variant}: {one.measure} {one.value.value:.3f} where it must be {one.least}")
    over = [] if fail_above is None else report.over(fail_above)
    for one in over:
        talk(
            f"error: mode {one.mode}: {one.attack}, {one.variant} ({one.measure}) is {100 * one.above.lower:.1f} "
            f"points or more above the best guesser; at most {fail_above:g} are allowed"
        )
    if broken or over:
        raise typer.Exit(1)
