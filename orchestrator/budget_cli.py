"""`trunkline budget`: what clients may spend of their privacy and have spent, what a plan needs, and proof of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from contract.errors import ConfigError, IntegrityError
from contract.operators import OperatorOption, operator_name
from contract.options import WatchOption
from contract.output import OutputFormat, OutputOption, cli_errors, emit, talk
from contract.watching import Look, watch

if TYPE_CHECKING:
    from contract.config import RunConfig
    from contract.privacy_records import Budget, Unit
    from orchestrator.spending_view import SpendingRow
    from storage.ledger import Ledger
    from storage.records import Account, SignedHead

SITE_LEDGER, SITE_KEY = "ledger.db", "ledger-key.pem"
SHOW_COLUMNS = (
    *("client", "dataset", "level", "channel", "holder", "orchestrator", "trunk", "budget", "left", "last_round"),
)

app = typer.Typer(
    help="Privacy budgets: what each client may spend and has spent, against whom, and proof of it. An epsilon is told "
    "with its adversary: `holder` is who holds the released adapter, `orchestrator` the orchestrator and the other "
    "clients, `trunk` the trunk; against one who sees a channel that nothing prices, none is told.",
    no_args_is_help=True,
)

SiteOption = Annotated[
    Path | None, typer.Option("--site", metavar="DIR", help="A site's own ledger, in its state directory.")
]
DatasetOption = Annotated[str | None, typer.Option(help="A dataset's name.")]
EpsilonOption = Annotated[float, typer.Option(help="What may be spent against each adversary by itself.")]
DeltaOption = Annotated[float, typer.Option(help="The chance at which epsilon may not hold.")]


class LevelChoice(StrEnum):
    CLIENT = "client"
    EXAMPLE = "example"


class WireChoice(StrEnum):
    OFF = "off"
    DP = "dp"


@app.command("show")
@cli_errors
def show(
    client: Annotated[str | None, typer.Option(help="Only this client.")] = None,
    dataset: DatasetOption = None,
    run: Annotated[str | None, typer.Option(help="Only what this run spent, against its own dp-epsilon.")] = None,
    watching: WatchOption = False,
    site: SiteOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """What each client's datasets have spent and have left, recomputed from the ledger's rows.

    A client's rows under channel `all` are over all channels together, and under dataset `*` over all its datasets; who
    sees one channel only has one row. `-o json` has a row for each adversary, with the reason where no epsilon is told.
    """
    from orchestrator.spending_view import folded, told_withheld

    def look() -> Look:
        spent = _spent(run, site)
        rows = [row for row in spent if client in (None, row.client) and dataset in (None, row.dataset)]
        withheld = "\n".join(told_withheld(rows))
        return Look(rows if output is not OutputFormat.TABLE else folded(rows), withheld or None)

    if watching:
        watch(look, output, SHOW_COLUMNS)
        return
    found = look()
    emit(found.data, output, columns=SHOW_COLUMNS)
    if output is OutputFormat.TABLE and found.title is not None:
        talk(found.title)


def _spent(run: str | None, site: Path | None) -> list[SpendingRow]:
    """What the ledger says by now, of one run only where it is named."""
    from orchestrator.spending_view import run_budgets, spending_rows

    with _reading(site) as ledger:
        accounts: list[Account] = ledger.accounts()
        budgets: Mapping[Unit, Budget] = ledger.budgets()
    settings = _settings({one.run for one in accounts}) if site is None else {}
    if run is not None:
        accounts = [one for one in accounts if one.run == run]
        budgets = run_budgets(run, accounts, budgets, settings)
    return list(spending_rows(accounts, budgets, settings))


@app.command("set")
@cli_errors
def set_budget(
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="The client, as `budget show` names it.")],
    level: Annotated[LevelChoice, typer.Option(help="Protect all of a client's text, or each row of it.")],
    epsilon: EpsilonOption,
    delta: DeltaOption,
    reason: Annotated[str, typer.Option(help="Why, for the record.")],
    dataset: DatasetOption = None,
    all_datasets: Annotated[bool, typer.Option("--all-datasets", help="Over all of its datasets together.")] = False,
    operator: OperatorOption = None,
    site: SiteOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Set what a client's dataset may spend over all runs, for the first time, higher or lower; a row of the ledger
    says who did and why.

    It does not change what a run may spend by itself, its dp-epsilon. At a site it binds what the site releases.
    """
    from contract.identity import check_client_id
    from contract.privacy_records import ALL_DATASETS, Unit
    from privacy.plan import operators_budget

    if (dataset is None) != all_datasets:
        raise ConfigError("give either --dataset or --all-datasets")
    who = operator_name(operator)
    if not reason.strip():
        raise ConfigError("--reason is empty; say why, for the record")
    unit = Unit(check_client_id(client), ALL_DATASETS if dataset is None else dataset, level.value)
    with _writing(site) as ledger:
        before = ledger.budgets().get(unit)
        after = operators_budget(epsilon, delta, unit.level, before)
        ledger.set_budget(unit, after, who, reason)
    old = "none" if before is None else f"epsilon {before.epsilon:g} at delta {before.delta:g}"
    talk(f"the budget was {old}; it is epsilon {epsilon:g} at delta {delta:g} now, set by {who}")
    numbers = {"epsilon": epsilon, "delta": delta, "order": after.order}
    was = None if before is None else {"epsilon": before.epsilon, "delta": before.delta, "order": before.order}
    named = {"client": unit.client, "dataset": unit.dataset, "level": unit.level}
    emit({**named, **numbers, "before": was, "operator": who, "reason": reason}, output)


@app.command("plan")
@cli_errors
def plan(
    epsilon: EpsilonOption,
    delta: DeltaOption,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the run.")],
    level: Annotated[LevelChoice, typer.Option(help="Protect all of a client's text, or each row of it.")] = (
        LevelChoice.CLIENT
    ),
    clients: Annotated[int, typer.Option(min=2, help="Clients of a round.")] = 10,
    threshold: Annotated[int, typer.Option(min=0, help="secagg-threshold; 0: as a run has it.")] = 0,
    colluders: Annotated[int, typer.Option(min=1, help="dp-colluders, at client level.")] = 1,
    size: Annotated[int, typer.Option(min=1, help="Values that a round trains.")] = 100_000,
    clip: Annotated[float, typer.Option(help="dp-clip.")] = 1.0,
    sample_rate: Annotated[float, typer.Option(help="dp-sample-rate, at example level.")] = 0.05,
    steps: Annotated[int, typer.Option(min=1, help="local-steps, at example level.")] = 10,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a client, at example level.")] = 1000,
    wire: Annotated[WireChoice, typer.Option(help="dp: noise on the wire too, at example level.")] = WireChoice.OFF,
    wire_releases: Annotated[int, typer.Option(min=1, help="wire-releases: how often a row is sent in a round.")] = 1,
    max_length: Annotated[int, typer.Option(min=2, help="max-length, for the noise on a token of the wire.")] = 128,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """The noise that a run needs to keep to a budget, and whether what is left is of use.

    Signal is the most that the clips let through, where everybody's contribution agrees. The noise in the whole run's
    change of the adapter is called usable up to 0.1 times that, doubtful up to 1, useless above; the noise on a token
    of the wire up to 1, up to 10, and above. `pld` is what privacy loss distributions make of a plan that is fixed
    beforehand, where dp-accounting has them; the filters enforce `epsilon`, which also holds where rounds are chosen as
    one goes.
    """
    from orchestrator.budget_plan import planned

    values: dict[str, str | int | float | bool] = {
        "dp": level.value, "dp-epsilon": epsilon, "dp-delta": delta, "dp-clip": clip, "dp-colluders": colluders,
        "dp-sample-rate": sample_rate, "local-steps": steps, "num-rounds": rounds, "wire": wire.value, "metrics": "off",
        "wire-releases": wire_releases, "max-length": max_length, "trunk-adapter": "frozen",
    }  # fmt: skip
    if threshold:
        values["secagg-threshold"] = threshold
    found = planned(values, clients=clients, size=size, rows=rows)
    emit(found.for_people() if output is OutputFormat.TABLE else found, output)


@app.command("verify")
@cli_errors
def verify(
    site: SiteOption = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="REPORT", help="A report of `budget export`; needs no database.")
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option(metavar="REPORT", help="A site's report: the heads that it was sent must be of this ledger."),
    ] = None,
    signer: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Whose signatures count: `ed25519:...`; repeatable.")
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Walk every chain, check every signature, and recompute by the filters whether each charge fitted its budget.

    Exits with 1 where anything is wrong. Rows cut off the end together with the heads over them are found only by
    heads that others hold: a site's report has those that the orchestrator sent it, so give it by --heads.
    """
    from orchestrator.budget_report import peer_heads_of

    if file is not None and site is not None:
        raise ConfigError("--file and --site are two ledgers; give one of them")
    signers = _signers(signer)
    outside = [] if heads is None else peer_heads_of(heads)
    found = _verified_file(file, outside, signers) if file is not None else _verified(site, outside, signers)
    if output is OutputFormat.TABLE:
        emit({name: value for name, value in found.items() if name != "findings"}, output)
        if found["findings"]:
            emit([{"finding": line} for line in found["findings"]], output)
    else:
        emit(found, output)
    if found["findings"]:
        raise typer.Exit(1)


@app.command("export")
@cli_errors
def export(
    out: Annotated[Path, typer.Option(help="File for the report; an earlier one there is replaced.")],
    client: Annotated[str | None, typer.Option(help="Only this client.")] = None,
    site: SiteOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Write the ledger as a signed JSON report that an auditor checks elsewhere by `budget verify --file`.

    It holds every row, head and budget, the runs' settings but for paths, and the epsilons. Give the auditor the
    public key below on another way than the file.
    """
    from orchestrator.budget_report import report_body, write_report
    from orchestrator.ledger_key import open_ledger_key

    key = open_ledger_key(None if site is None else _in(site, SITE_KEY))
    with _reading(site) as ledger:
        runs = {one.run for one in ledger.accounts()}
        settings = _settings(runs) if site is None else {}
        body = report_body(ledger, settings, client, key, datetime.now(UTC))
    write_report(out, body, key)
    emit({"report": out.absolute(), "rows": len(body["ledger"]["rows"]), "signer": key.public_key_text}, output)


# ---- ledgers ---------------------------------------------------------------------------------------------------------


@contextmanager
def _reading(site: Path | None) -> Iterator[Ledger]:
    from storage.ledger import open_ledger_to_read

    if site is not None and not _in(site, SITE_LEDGER).exists():
        raise ConfigError(f"there is no ledger {_in(site, SITE_LEDGER)}; --site is a site's state directory")
    ledger = open_ledger_to_read(_url(site))
    try:
        yield ledger
    finally:
        ledger.close()


@contextmanager
def _writing(site: Path | None) -> Iterator[Any]:
    from orchestrator.ledger_key import open_ledger_key
    from storage.ledger import open_ledger

    if site is not None and not site.is_dir():
        raise ConfigError(f"there is no directory {site}; --site is a site's state directory")
    ledger = open_ledger(_url(site), signer=open_ledger_key() if site is None else None)
    try:
        yield ledger
    finally:
        ledger.close()


def _in(site: Path, name: str) -> Path:
    return site.absolute() / name


def _url(site: Path | None) -> str | None:
    return None if site is None else f"sqlite:///{quote(str(_in(site, SITE_LEDGER)))}"


def _settings(runs: set[str]) -> dict[str, RunConfig]:
    """The settings of those runs that the database still has, as far as this version reads them."""
    from orchestrator.spending_view import read_settings
    from storage.store import open_reader

    with closing(open_reader()) as reader:
        found, unread = read_settings(reader, runs)
    for line in unread:
        talk(line)
    return found


# ---- verifying -------------------------------------------------------------------------------------------------------


def _signers(named: list[str] | None) -> list[str]:
    from contract.identity import parse_public_key, public_key_text

    return [public_key_text(parse_public_key(line, "--signer")) for line in named or ()]


def _verified(site: Path | None, outside: list[SignedHead], signers: list[str]) -> dict[str, Any]:
    """What the database's own ledger comes to. The home's key counts as a signer, where there is one."""
    from orchestrator.ledger_key import KEY_FILE, open_ledger_key
    from orchestrator.ledger_replay import Replay
    from storage.home import home_dir

    if site is None and not signers and (home_dir() / KEY_FILE).exists():
        signers = [open_ledger_key().public_key_text]
    with _reading(site) as ledger:
        findings = ledger.verify(outside, signers)
        replay, units = Replay(), ledger.units()
        for unit in units:
            replay.take(ledger.rows(unit))
    return _told(findings + replay.finish(), len(units), replay.rows)


def _verified_file(file: Path, outside: list[SignedHead], signers: list[str]) -> dict[str, Any]:
    from orchestrator.budget_report import read_report, report_findings

    try:
        body = read_report(file, signers)
    except IntegrityError as error:
        return _told([str(error)], 0, 0)
    if not signers:
        talk(f"that {body['signer']} signed it is the report's own word: give --signer KEY where you know the key")
    findings = report_findings(body, outside, signers)
    return _told(findings, len(body["ledger"]["units"]), len(body["ledger"]["rows"]))


def _told(findings: list[str], units: int, rows: int) -> dict[str, Any]:
    return {"ok": not findings, "units": units, "rows": rows, "findings": findings}
