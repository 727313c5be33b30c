"""Which clients have a name of their own in metrics: so many, for whoever comes may call itself anything."""

from __future__ import annotations

MOST = 1024


class NamedClients:
    """The first MOST clients by their ids."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def name(self, client_id: str) -> str:
        """`client_id`, or nothing for one that came after those who have a name."""
        if client_id not in self._known and len(self._known) >= MOST:
            return ""
        self._known.add(client_id)
        return client_id
