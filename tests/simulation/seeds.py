"""Many seeds, in this process or in several, and how a seed that went wrong is told."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from tests.simulation.world import OFTEN, Outcome, Surroundings, judged, surroundings

SHOWN_LINES = 40
CHUNK = 5
_SPAWNING: Any = multiprocessing.get_context("forkserver")
_SPAWNING.set_forkserver_preload(["tests.simulation.world"])
_around: list[Surroundings] = []
_until_exit = ExitStack()


@dataclass
class Tally:
    """What many seeds came to."""

    seeds: int = 0
    commits: int = 0
    lives: int = 0
    virtual_s: float = 0.0
    met: Counter[str] = field(default_factory=Counter)
    failed: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        self.commits += outcome.commits
        self.lives += outcome.lives
        self.virtual_s += outcome.virtual_s
        self.met.update(outcome.met)
        if outcome.wrong:
            self.failed.append(outcome)

    @property
    def missing(self) -> list[str]:
        """What comes up often, and no seed brought."""
        return sorted(name for name in OFTEN if not self.met[name])


def outcomes(seeds: Sequence[int], jobs: int) -> Iterator[Outcome]:
    """Each seed's outcome, in their order; the trace is kept of what went wrong alone."""
    if jobs == 1:
        with surroundings() as around:
            yield from _played(around, seeds)
        return
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    with ProcessPoolExecutor(jobs, mp_context=_SPAWNING) as pool:
        for done in pool.map(_play_elsewhere, chunks):
            yield from done


def told(outcome: Outcome) -> str:
    """What went wrong in a seed, and how to see it again."""
    lines = [f"seed {outcome.seed} is wrong (trace {outcome.trace_sha256}):"]
    lines += [f"    {wrong}" for wrong in outcome.wrong]
    lines += ["the last that happened:", *outcome.trace[-SHOWN_LINES:]]
    again = f'make simulate SIMULATE_ARGS="--first {outcome.seed} --seeds 1 --trace"'
    return "\n".join([*lines, f"again, to the same trace: {again}"])


def _played(around: Surroundings, seeds: Iterable[int]) -> Iterator[Outcome]:
    for seed in seeds:
        outcome = judged(around, seed)
        yield outcome if outcome.wrong else replace(outcome, trace=())


def _play_elsewhere(seeds: Sequence[int]) -> list[Outcome]:
    if not _around:
        _around.append(_until_exit.enter_context(surroundings()))
    return list(_played(_around[0], seeds))
