"""Whether the database can be looked at, and whether runs that are said to go on have an orchestrator that is heard."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from contract.errors import TrunklineError
from storage.view import View
from trunkline.pages.facts import silence
from trunkline.pages.scales import length_text

_MOST_GOING_ON = 100


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    ok: bool
    found: str


def examine(view: View, now: datetime) -> list[Finding]:
    """What SQL says of itself and of the runs that go on."""
    try:
        view.require_current()
        going_on = view.reader.list_runs(_MOST_GOING_ON, "running")
    except TrunklineError as error:
        return [Finding("database", False, str(error))]
    findings = [Finding("database", True, f"{view.place} answers, and its schema is this version's")]
    for run in going_on:
        silent_s = silence(run, now)
        found = "its orchestrator is heard"
        if silent_s is not None:
            how = f"if it is dead: `trunkline runs resume {run.run_id}`"
            found = f"its orchestrator was last heard {length_text(silent_s)} ago; {how}"
        findings.append(Finding(f"run {run.run_id}", silent_s is None, found))
    return findings
