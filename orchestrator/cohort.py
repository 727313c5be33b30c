"""Who takes part: waiting for clients to connect, and drawing a round's cohort from them."""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Sequence

from contract.config import RunConfig
from contract.errors import QuorumError
from orchestrator.exchange import Clock, Exchange

log = logging.getLogger("trunkline.orchestrator")

LOOK_S = 0.25
SETTLE_S = 1.0
"""For the start of a run: sites that are started together connect within about this time of each other."""


def wait_for_clients(exchange: Exchange, config: RunConfig, clock: Clock, *, first: bool) -> list[str]:
    """The connected nodes, once a quorum is there; for the `first` round, a full cohort or the end of node-wait-s.

    With no cohort size set the first round also waits until for SETTLE_S seconds nobody new came. A site that is gone
    for good delays no later round. Raises QuorumError saying how many there were and how many were wanted.
    """
    wanted = max(config.quorum, config.cohort_size if first else 0)
    settle_s = SETTLE_S if first else 0.0
    until = clock.monotonic() + config.node_wait_s
    connected = exchange.connected()
    if len(connected) < wanted:
        log.info("waiting for clients: %d of %d connected", len(connected), wanted)
    changed = clock.monotonic()
    while clock.monotonic() < until:
        settled = config.cohort_size or clock.monotonic() - changed >= settle_s
        if len(connected) >= wanted and settled:
            return connected
        clock.sleep(LOOK_S)
        seen = exchange.connected()
        if seen != connected:
            connected, changed = seen, clock.monotonic()
    if len(connected) >= config.quorum:
        return connected
    raise QuorumError(
        f"{len(connected)} of {config.quorum} clients (quorum) connected within {config.node_wait_s:g} s: "
        "start more SuperNodes, or lower quorum, or raise node-wait-s"
    )


def wait_until_free(exchange: Exchange, clock: Clock, limit_s: float) -> None:
    """Wait until no connected node owes an answer, at most `limit_s` seconds.

    A node that works through what an aborted attempt asked of it would be late again in the next one.
    """
    until = clock.monotonic() + limit_s
    while exchange.busy() & set(exchange.connected()) and clock.monotonic() < until:
        clock.sleep(LOOK_S)


def draw_cohort(connected: Sequence[str], busy: Collection[str], config: RunConfig, number: int) -> tuple[str, ...]:
    """Round `number`'s cohort: cohort-size of the connected nodes, drawn from the seed, or all of them; sorted.

    A node that still works on an earlier round would only be late again, so it is left out while a quorum is left.
    """
    free = [node_id for node_id in connected if node_id not in busy]
    pool = sorted(free if len(free) >= config.quorum else connected)
    if not config.cohort_size or config.cohort_size >= len(pool):
        return tuple(pool)
    drawn = random.Random(f"trunkline cohort {config.seed} {number}").sample(pool, config.cohort_size)
    return tuple(sorted(drawn))
