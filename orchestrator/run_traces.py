"""A run's rounds and their phases as spans."""

from __future__ import annotations

from contract.records import RoundKey
from contract.traces import Span, Tracer
from orchestrator.audience import Listener
from storage.records import RoundCommit


class RunTraces(Listener):
    """One trace an attempt at a round, from the first thing that is done for it; and one for the last judgement."""

    what = "traces"

    def __init__(self, tracer: Tracer, run_id: str) -> None:
        self._tracer = tracer
        self._run_id = run_id
        self._round: Span | None = None
        self._phase: Span | None = None

    @property
    def traceparent(self) -> str:
        span = self._phase or self._round
        return "" if span is None else span.traceparent

    def phase_began(self, phase: str) -> None:
        begun = self._begun("judgement" if phase == "judging" else "round")
        self._phase = self._tracer.begin(f"phase {phase}", begun.traceparent, run=self._run_id)

    def phase_ended(self, phase: str, seconds: float) -> None:
        if self._phase is not None:
            self._phase.end()
            self._phase = None

    def opened(self, key: RoundKey, clients: int) -> None:
        self._begun("round").note(round=key.round, attempt=key.attempt, clients=clients)

    def committed(self, commit: RoundCommit) -> None:
        self._end("")

    def aborted(self, key: RoundKey) -> None:
        self._end("aborted")

    def ended(self, well: bool) -> None:
        self._end("" if well else "unfinished")
        self._tracer.close()

    def _begun(self, name: str) -> Span:
        if self._round is None:
            self._round = self._tracer.begin(name, run=self._run_id)
        return self._round

    def _end(self, error: str) -> None:
        self.phase_ended("", 0.0)
        if self._round is not None:
            self._round.end(error)
            self._round = None
