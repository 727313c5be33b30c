"""What a lane's thread does of one pass: decode, compute, encode, each session's part answered by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from contract.errors import CapacityError, TrunklineError
from server_trunk.lane import Lane
from server_trunk.seats import Job

logger = logging.getLogger("trunkline.server_trunk")


def work(lane: Lane, threads: int, jobs: Sequence[Job]) -> list[Any]:
    """The outcome of each job, in order: what its `finish` made, or the exception that it ended with."""
    lane.use_threads(threads)
    outcomes = [_tried(_prepared, job) for job in jobs]
    ready = [
        index for index, job in enumerate(jobs) if job.kind != "other" and not isinstance(outcomes[index], Exception)
    ]
    if ready:
        # What several were to share has room of its own, which is not for one that is left of them.
        keep = jobs[0].keep and (len(jobs) == 1 or len(ready) > 1)
        answers = _pass(lane, jobs[0].kind, keep, [outcomes[index] for index in ready])
        for index, answer in zip(ready, answers, strict=True):
            job = jobs[index]
            if job.kind == "forward" and not isinstance(answer, Exception):
                job.graph = answer[1]
            outcomes[index] = answer if isinstance(answer, Exception) else _tried(job.finish, answer)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            _let_go(outcome)
    return outcomes


def _prepared(job: Job) -> Any:
    job.adapter.restore()
    return job.prepare()


def _tried(do: Callable[[Any], Any], given: Any) -> Any:
    """What `do` answers, or the exception that it ended with."""
    try:
        return do(given)
    except Exception as error:  # noqa: BLE001 (told to who asked)
        return error


def _let_go(error: Exception) -> None:
    """Have `error` keep no frame: those hold what all sessions of the pass worked on, until garbage is collected."""
    if not isinstance(error, TrunklineError):
        logger.error("a session's part of a pass failed unforeseen", exc_info=error)
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__


def _pass(lane: Lane, kind: str, keep: bool, asked: Sequence[Any]) -> list[Any]:
    """What the lane answers to each request; where it fails for all together, to one after the other.

    Those keep no graph then: there is room for the one that all were to share.
    """
    try:
        if kind == "forward":
            return list(lane.forward(asked, keep=keep))
        return list(lane.backward(asked))
    except Exception as error:  # noqa: BLE001 (told to who asked, and to nobody else)
        if len(asked) == 1:
            return [error]
        why = "there is no memory for it" if isinstance(error, CapacityError) else f"it failed: {error}"
        logger.warning("a pass of %d sessions is done one by one: %s", len(asked), why)
    for one in asked:
        if kind == "backward" and one.graph.gang is not None:
            one.graph.gang.release()
    return [answer for one in asked for answer in _pass(lane, kind, False, [one])]
