"""Which trunk a client's session goes to, where several serve the same layers: the one with the most room.

A session stays with its trunk to its end. What the clients of several trunks trained is averaged over all of them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from clients.connection import TrunkConnection
from clients.wire_log import WireLog
from contract import wire
from contract.addresses import trunk_addresses
from contract.errors import AgreementError, CapacityError, ConnectionFailedError, SessionError, TrunklineError
from contract.tls import TlsFiles
from contract.trunk_pb2 import TrunkDescription

logger = logging.getLogger("trunkline.clients")

T = TypeVar("T")

Elsewhere = (CapacityError, ConnectionFailedError, SessionError)
"""What a trunk may say to a hello that another one need not say: full, gone, or without the round's adapter."""


class TrunkRoute(Protocol):
    """A client's way to the trunk; `TrunkConnection` is the one where there is a single trunk."""

    def describe(self) -> TrunkDescription: ...

    def opened(self, opening: Callable[[TrunkConnection], T]) -> T: ...

    def close(self) -> None: ...


class ReplicaRoute:
    """The way to one of several trunks, which all serve the same layers of the same model."""

    def __init__(self, connections: tuple[TrunkConnection, ...], client_id: str) -> None:
        """`client_id` decides between trunks with equal room, so that clients which start together spread."""
        self._connections = connections
        self._first = int.from_bytes(hashlib.sha256(client_id.encode()).digest()[:8], "big") % len(connections)

    def describe(self) -> TrunkDescription:
        """What the trunk with the most room serves. Raises what `opened` does before it opens anything."""
        return self._by_room()[0][1]

    def opened(self, opening: Callable[[TrunkConnection], T]) -> T:
        """What `opening` makes of the trunk with the most room that takes it.

        Raises ConnectionFailedError where none answers, AgreementError where those that answer differ, and the last
        trunk's error, naming all, where each refuses.
        """
        refused: list[TrunklineError] = []
        for connection, _ in self._by_room():
            try:
                return opening(connection)
            except Elsewhere as error:
                logger.warning("trunk %s takes no session: %s", connection.address, error)
                refused.append(error)
        raise type(refused[-1])(f"no trunk takes a session: {'; '.join(map(str, refused))}")

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _by_room(self) -> list[tuple[TrunkConnection, TrunkDescription]]:
        """Those that answer, the smallest share of open sessions first; between equals the client's own order."""
        with ThreadPoolExecutor(len(self._connections)) as pool:  # one that is silent holds up none of the others
            told = list(zip(self._own_order(), pool.map(_described, self._own_order()), strict=True))
        answered = [(connection, description) for connection, description in told if description is not None]
        if not answered:
            raise ConnectionFailedError(
                f"no trunk answers at {', '.join(one.address for one in self._connections)}: start one with "
                "`trunkline trunk serve`, or set trunk-address to where they listen"
            )
        _require_one_model(answered)
        return sorted(answered, key=lambda pair: pair[1].open_sessions / max(pair[1].max_sessions, 1))

    def _own_order(self) -> tuple[TrunkConnection, ...]:
        return self._connections[self._first :] + self._connections[: self._first]


def trunk_route(addresses: str, client_id: str, wire_log: WireLog, tls: TlsFiles | None = None) -> TrunkRoute:
    """The way to the trunk at `addresses`, or to one of them where commas part several; by `tls` alone where given.

    Raises ConfigError for an address that is none, and for files that TLS cannot use.
    """
    connections = tuple(TrunkConnection(address, wire_log=wire_log, tls=tls) for address in trunk_addresses(addresses))
    return connections[0] if len(connections) == 1 else ReplicaRoute(connections, client_id)


def _described(connection: TrunkConnection) -> TrunkDescription | None:
    try:
        return connection.describe()
    except ConnectionFailedError as error:
        logger.warning("trunk %s is passed over: %s", connection.address, error)
        return None


def _require_one_model(answered: list[tuple[TrunkConnection, TrunkDescription]]) -> None:
    (first, served), *others = answered
    for other, description in others:
        differing = wire.differences(served.model, first.address, description.model, other.address)
        if differing:
            raise AgreementError(f"the trunks of trunk-address do not serve the same: {'; '.join(differing)}")
