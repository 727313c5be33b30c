"""Pages as HTML: the dashboard's, which name their style and script, and a report, which holds all that it needs.

Whatever stands in SQL is written through Jinja's escaping; no page has a style or a script of its own beside its text,
so that its content policy allows none.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from contract.privacy_records import ADVERSARIES, Adversary
from orchestrator.spending_view import SpendingRow
from privacy.coverage import IN_WORDS
from trunkline import __version__
from trunkline.pages.charts import LINE_WIDTH, PLOT_HEIGHT
from trunkline.pages.facts import MOST_ATTEMPTS, MOST_RUNS, RunFacts, Standing
from trunkline.pages.filters import FILTERS
from trunkline.pages.health import Finding
from trunkline.pages.pictures import pictures

HERE = Path(__file__).parent
STATIC = HERE / "static"
LIVE_S, QUIET_S = 2, 15
"""How often a page asks again while something moves, and while nothing does."""
MOST_SPENDING = 400

STATUSES = (
    ("trained", "✓", "trained: its update is in the sum"),
    ("late", "L", "late: no answer in time"),
    ("failed", "F", "failed at the client"),
    ("refused", "R", "refused: its answer could not be used"),
    ("invited", "?", "asked, and no answer yet or none kept"),
)
_TIMELINE_KINDS = (("aborted", "attempt aborted"), ("open", "attempt under way"))


@dataclass(frozen=True, slots=True)
class _Report:
    """What a page needs to stand alone: its style, and a policy that lets nothing else in."""

    style: Markup
    policy: str
    icon: str
    made_at: datetime


def run_page(facts: RunFacts, *, report: bool = False) -> str:
    """The page of one run; as a `report` one file that asks nobody for anything."""
    drawn = pictures(facts)
    refresh_s = 0 if report else LIVE_S if facts.goes_on else QUIET_S
    trained = {row["round"]: row["train_loss"] for row in facts.rounds if row["train_loss"] is not None}
    numbers = sorted({*facts.held_out, *trained})
    there = {one.status for one in facts.attempts}
    context = {
        "facts": facts,
        "pictures": drawn,
        "report": _report(facts.at) if report else None,
        "refresh_s": refresh_s,
        "losses": [(number, facts.held_out.get(number), trained.get(number)) for number in numbers],
        "shown": facts.attempts[-MOST_ATTEMPTS:],
        "rounds": facts.rounds[-MOST_ATTEMPTS:],
        "aborted": [one for one in facts.attempts[-MOST_ATTEMPTS:] if one.status == "aborted"],
        "versions": facts.versions[-MOST_ATTEMPTS:],
        "left_out_versions": max(0, len(facts.versions) - MOST_ATTEMPTS),
        "spending": _spending(facts),
        "timeline_kinds": [(kind, text) for kind, text in _TIMELINE_KINDS if kind in there],
        "attempt_axis": "round, or round.attempt where there were several" if facts.played_again else "round",
        "resumed": any(event.kind == "resumed" for event in facts.events),
        "judged": max(facts.held_out, default=None),
        "here": "run",
    }
    return _write("run.html", context)


def runs_page(runs: Sequence[Standing]) -> str:
    """The list of runs."""
    moves = any(one.row["status"] == "running" for one in runs)
    context = {"runs": runs, "most_runs": MOST_RUNS, "here": "runs", "refresh_s": LIVE_S if moves else QUIET_S}
    return _write("runs.html", context)


def health_page(findings: Sequence[Finding]) -> str:
    sound = all(one.ok for one in findings)
    return _write("health.html", {"findings": findings, "sound": sound, "here": "health", "refresh_s": QUIET_S})


def problem_page(title: str, reason: str, hint: str, *, refresh_s: int) -> str:
    """A page that says why there is no other; it asks again every `refresh_s` seconds, 0 never."""
    context = {"title": title, "reason": reason, "hint": hint, "here": "", "refresh_s": refresh_s}
    return _write("problem.html", context)


def _write(template: str, context: dict[str, Any]) -> str:
    return _environment().get_template(template).render({"report": None, **context})


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    environment.globals |= {
        "version": __version__,
        "plot_height": PLOT_HEIGHT,
        "line_width": LINE_WIDTH,
        "statuses": STATUSES,
        "signs": {status: sign for status, sign, _ in STATUSES},
        "in_words": IN_WORDS,
    }
    return environment


def _report(made_at: datetime) -> _Report:
    style = (STATIC / "page.css").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{allowed}'; img-src data:; base-uri 'none'; form-action 'none'"
    icon = base64.b64encode((STATIC / "icon.svg").read_bytes()).decode()
    return _Report(Markup(style), policy, icon, made_at)


@dataclass(frozen=True, slots=True)
class _SpentLine:
    """One unit: what was spent of it against each of the table's adversaries; None where nothing is priced there."""

    client: str
    dataset: str
    level: str
    rows: Sequence[SpendingRow | None]

    @property
    def budget(self) -> float | None:
        return next((row.budget for row in self.rows if row is not None), None)

    @property
    def delta(self) -> float | None:
        return next((row.delta for row in self.rows if row is not None), None)

    @property
    def left(self) -> float | None:
        return min((row.left for row in self.rows if row is not None and row.left is not None), default=None)

    @property
    def used(self) -> float | None:
        return max((row.used for row in self.rows if row is not None and row.used is not None), default=None)


@dataclass(frozen=True, slots=True)
class _SpentTable:
    name: str
    title: str
    adversaries: Sequence[Adversary]
    lines: Sequence[_SpentLine]
    more: int


def _spending(facts: RunFacts) -> list[_SpentTable]:
    tables = []
    for name, title, rows in (
        ("spent-in-run", "In this run, against its own dp-epsilon", facts.privacy.in_run),
        ("spent-in-all", "Over all runs, against each client's budget", facts.privacy.in_all),
    ):
        lines = [_spent_line(list(of_unit)) for _, of_unit in groupby(rows, key=_unit_of)]
        if lines:
            more = max(0, len(lines) - MOST_SPENDING)
            tables.append(_SpentTable(name, title, ADVERSARIES, lines[:MOST_SPENDING], more))
    return tables


def _unit_of(row: SpendingRow) -> tuple[str, str, str]:
    return row.client, row.dataset, row.level


def _spent_line(rows: Sequence[SpendingRow]) -> _SpentLine:
    """Of each adversary the row over all channels, which comes last, or that of the only one."""
    totals = {row.adversary: row for row in rows}
    return _SpentLine(*_unit_of(rows[0]), [totals.get(adversary) for adversary in ADVERSARIES])
