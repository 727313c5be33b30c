"""The pictures of a run's page, from its facts; each has the numbers behind it as a table on the same page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from storage.records import RoundRow
from trunkline.pages.charts import Column, ColumnChart, LineChart, Span, Timeline, column_chart, line_chart, timeline
from trunkline.pages.facts import MOST_ATTEMPTS, RunFacts
from trunkline.pages.participation import Participation, headings, participation
from trunkline.pages.scales import BYTE_UNITS, SECOND_UNITS

PHASES = ("cohort", "training", "confirming", "unmasking", "averaging", "storing")


@dataclass(frozen=True, slots=True)
class Pictures:
    """None where there is nothing to draw yet. `phases` are those that the attempts shown went through, in order."""

    loss: LineChart | None
    traffic: ColumnChart | None
    times: ColumnChart | None
    timeline: Timeline | None
    participation: Participation
    phases: Sequence[str]
    headings: dict[tuple[int, int], str]
    left_out: int


def pictures(facts: RunFacts) -> Pictures:
    """All pictures of a run's page."""
    shown = facts.attempts[-MOST_ATTEMPTS:]
    called = headings(facts.attempts)
    phases = _phases(shown)
    trained = {row["round"]: row["train_loss"] for row in facts.rounds if row["train_loss"] is not None}
    return Pictures(
        loss=line_chart({"held-out": facts.held_out, "training": trained}),
        traffic=column_chart([_traffic(one, called) for one in shown], BYTE_UNITS),
        times=column_chart([_times(one, called, phases) for one in shown], SECOND_UNITS),
        timeline=_timeline(facts, shown),
        participation=participation(facts),
        phases=phases,
        headings=called,
        left_out=len(facts.attempts) - len(shown),
    )


def _phases(attempts: Sequence[RoundRow]) -> list[str]:
    told = {phase for one in attempts for phase in one.phase_seconds}
    return [phase for phase in PHASES if phase in told] + sorted(told - set(PHASES))


def _traffic(one: RoundRow, called: dict[tuple[int, int], str]) -> Column:
    parts = (("to-trunk", float(one.received_bytes)), ("from-trunk", float(one.sent_bytes)))
    return Column(called[one.number, one.attempt], parts, whole=one.status != "aborted")


def _times(one: RoundRow, called: dict[tuple[int, int], str], phases: Sequence[str]) -> Column:
    parts = [(phase, float(one.phase_seconds[phase])) for phase in phases if phase in one.phase_seconds]
    return Column(called[one.number, one.attempt], parts)


def _timeline(facts: RunFacts, attempts: Sequence[RoundRow]) -> Timeline | None:
    """The attempts shown as they lay in time, those committed with their phases, up to the run's end or to now."""
    if not attempts:
        return None
    whole_run = len(attempts) == len(facts.attempts)
    begin = facts.run.created_at if whole_run else attempts[0].opened_at
    end = max([facts.heard_at, *(one.ended_at or one.progress_at for one in attempts)])
    spans: list[Span] = []
    for one in attempts:
        spans += _spans(one, begin, facts.heard_at)
    resumed = [(event.at - begin).total_seconds() for event in facts.events if event.kind == "resumed"]
    return timeline(spans, (end - begin).total_seconds(), resumed)


def _spans(one: RoundRow, begin: datetime, heard_at: datetime) -> list[Span]:
    at_s = (one.opened_at - begin).total_seconds()
    if one.status != "committed":
        until = one.ended_at or max(heard_at, one.progress_at)
        return [Span(one.status, at_s, (until - begin).total_seconds())]
    spans = []
    for phase in _phases([one]):
        spans.append(Span(phase, at_s, at_s + one.phase_seconds[phase]))
        at_s += one.phase_seconds[phase]
    return spans
