"""What a lane's thread does of one pass: decode, compute, encode, each session's part answered by itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from contract.errors import CapacityError
from server_trunk.lane import Lane
from server_trunk.seats import Job

logger = logging.getLogger("trunkline.server_trunk")


def work(lane: Lane, threads: int, jobs: Sequence[Job]) -> list[Any]:
    """The outcome of each job, in order: what its `finish` made, or the exception that it ended with."""
    lane.use_threads(threads)
    outcomes: list[Any] = [None] * len(jobs)
    ready: list[int] = []
    asked: list[Any] = []
    for index, job in enumerate(jobs):
        try:
            job.adapter.restore()
            prepared = job.prepare()
        except Exception as error:  # noqa: BLE001 (told to who asked)
            outcomes[index] = error
            continue
        if job.kind == "other":
            outcomes[index] = prepared
        else:
            ready.append(index)
            asked.append(prepared)
    answers = _pass(lane, jobs[0].kind, jobs[0].keep, asked) if asked else []
    for index, answer in zip(ready, answers, strict=True):
        job = jobs[index]
        if job.kind == "forward" and not isinstance(answer, Exception):
            job.graph = answer[1]
        try:
            outcomes[index] = answer if isinstance(answer, Exception) else job.finish(answer)
        except Exception as error:  # noqa: BLE001 (told to who asked)
            outcomes[index] = error
    return outcomes


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
