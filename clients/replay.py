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
from contract.errors import ConnectionFailedError, SessionError

logger = logging.getLogger("trunkline.clients")

LOOK_S = 1.0

Done_co = TypeVar("Done_co", covariant=True)


class Attempt(Protocol[Done_co]):
    """The work with one trunk session, which may be lost once it is `opened`.

    Once something is `released` of the work, it must not be done again.
    """

    @property
    def opened(self) -> bool: ...

    @property
    def released(self) -> bool: ...

    def play(self, route: TrunkRoute) -> Done_co: ...


def played(attempt: Attempt[Done_co], site: Site, config: RunConfig, client_id: str, wire_log: WireLog) -> Done_co:
    """What `attempt` came to: played again after a lost session, `trunk-retries` times at most.

    Raises what the last one ended with, what kept the first session from opening, and ConnectionFailedError where the
    trunk stays away for `trunk-wait-s`.
    """
    left = config.trunk_retries if config.dp == "off" else 0
    while True:
        try:
            with closing(trunk_route(site.trunk_address, client_id, wire_log)) as route:
                return attempt.play(route)
        except (ConnectionFailedError, SessionError) as error:
            if not attempt.opened or attempt.released or not left:
                raise
            logger.warning("the trunk session of site=%s is lost, its round begins again: %s", site.name, error)
        left -= 1
        _wait_for_trunk(site, config, client_id, wire_log)


def _wait_for_trunk(site: Site, config: RunConfig, client_id: str, wire_log: WireLog) -> None:
    """Return once a trunk answers. By a channel of its own each time: gRPC tries a broken one ever more rarely."""
    until_s = time.monotonic() + config.trunk_wait_s
    while True:
        try:
            with closing(trunk_route(site.trunk_address, client_id, wire_log)) as route:
                route.describe()
            return
        except ConnectionFailedError:
            if time.monotonic() > until_s:
                raise
        time.sleep(LOOK_S)
