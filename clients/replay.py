"""A round's work again from its start, where the trunk's session was lost under way.

A trunk that starts anew has its stored adapters and what closed sessions contributed, but none of the open sessions.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import Protocol, TypeVar

from clients.site import Site
from clients.trunk_route import TrunkRoute, trunk_route
from clients.wire_log import WireLog
from contract.config import RunConfig
from contract.errors import ConnectionFailedError, SessionError, TrunklineError
from contract.trunk_pb2 import TrunkDescription

logger = logging.getLogger("trunkline.clients")

LOOK_S = 1.0

Done_co = TypeVar("Done_co", covariant=True)


class Attempt(Protocol[Done_co]):
    """The work with one trunk session, from before it is `opened`.

    Once something is `released` of the work, it must not be done again.
    """

    @property
    def opened(self) -> bool: ...

    @property
    def released(self) -> bool: ...

    def play(self, route: TrunkRoute) -> Done_co: ...


def played(attempt: Attempt[Done_co], site: Site, config: RunConfig, client_id: str, wire_log: WireLog) -> Done_co:
    """What `attempt` came to: played again where the trunk was lost, `trunk-retries` times at most.

    Raises what the last one ended with, what a trunk refused the first session for, and ConnectionFailedError where the
    trunk stays away for `trunk-wait-s`.
    """
    left = config.trunk_retries
    while True:
        try:
            with closing(trunk_route(site.trunk_address, client_id, wire_log, site.trunk_tls)) as route:
                return attempt.play(route)
        except (ConnectionFailedError, SessionError) as error:
            if not left or not may_begin_again(error, config, opened=attempt.opened, released=attempt.released):
                raise
            logger.warning("site=%s has lost its trunk, its round begins again: %s", site.name, error)
        left -= 1
        await_trunk(site, config, client_id, wire_log)


def may_begin_again(error: TrunklineError, config: RunConfig, *, opened: bool, released: bool) -> bool:
    """Whether an attempt that `error`, the trunk's loss, ended may be played once more."""
    if not opened:  # nothing of the text was sent yet; a trunk that lives and says no is not lost
        return isinstance(error, ConnectionFailedError)
    # A row that is sent again under other noise shows more of itself, and under `dp` it would have to be paid for.
    return not released and (config.dp, config.wire) == ("off", "off")


def await_trunk(site: Site, config: RunConfig, client_id: str, wire_log: WireLog) -> TrunkDescription:
    """What the trunk serves, once one answers. Raises ConnectionFailedError after `trunk-wait-s` without.

    By a channel of its own each time: gRPC tries a broken one ever more rarely.
    """
    until_s, told = time.monotonic() + config.trunk_wait_s, False
    while True:
        try:
            with closing(trunk_route(site.trunk_address, client_id, wire_log, site.trunk_tls)) as route:
                return route.describe()
        except ConnectionFailedError as error:
            if time.monotonic() > until_s:
                raise
            if not told:
                logger.warning("site=%s waits for its trunk, at most %g s: %s", site.name, config.trunk_wait_s, error)
            told = True
        time.sleep(LOOK_S)
