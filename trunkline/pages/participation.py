"""Who took part in which attempt, and what became of it: the picture, which is a table, and what it says in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from storage.records import ParticipationRow, ParticipationStatus, RoundRow
from trunkline.pages.facts import MOST_ATTEMPTS, RunFacts

MOST_CELLS = 16_000
MOST_CLIENTS = 400
MOST_FAILURES = 200
WIDE_COLUMNS = 32


@dataclass(frozen=True, slots=True)
class ClientLine:
    """One client: its cells by attempt, None where it was not asked, and how often each outcome came, of all attempts.

    `client` is the enrolled id where the node showed one, else the node's own name or id.
    """

    client: str
    node_id: str
    cells: Sequence[ParticipationRow | None]
    counts: Mapping[ParticipationStatus, int]

    @property
    def asked(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class Participation:
    """`headings` are the attempts shown, the newest; `left_out` says how many older ones, and clients, are not.

    `failures` are the newest participations that brought nothing, newest first.
    """

    headings: Sequence[str]
    clients: Sequence[ClientLine]
    left_out_attempts: int
    left_out_clients: int
    failures: Sequence[tuple[str, ParticipationRow]]
    left_out_failures: int

    @property
    def dense(self) -> bool:
        """Whether there is no room for a sign in each cell."""
        return len(self.headings) > WIDE_COLUMNS


def headings(attempts: Sequence[RoundRow]) -> dict[tuple[int, int], str]:
    """What each attempt is called in pictures: its round, and which attempt it was where there were several."""
    times = Counter(one.number for one in attempts)
    return {
        (one.number, one.attempt): str(one.number) if times[one.number] == 1 else f"{one.number}.{one.attempt}"
        for one in attempts
    }


def participation(facts: RunFacts) -> Participation:
    """The table of who took part, bounded to what a page can hold."""
    by_node: dict[str, dict[tuple[int, int], ParticipationRow]] = {}
    for row in facts.participations:
        by_node.setdefault(row.node_id, {})[row.number, row.attempt] = row
    called = {node_id: _called(facts, node_id, rows) for node_id, rows in by_node.items()}
    nodes = sorted(by_node, key=lambda node_id: (called[node_id], node_id))
    shown_nodes = nodes[:MOST_CLIENTS]
    most = min(MOST_ATTEMPTS, MOST_CELLS // max(1, len(shown_nodes)))
    shown = facts.attempts[-most:]
    names = headings(facts.attempts)
    lines = [
        ClientLine(
            called[node_id], node_id,
            [by_node[node_id].get((one.number, one.attempt)) for one in shown],
            Counter(row.status for row in by_node[node_id].values()),
        )
        for node_id in shown_nodes
    ]  # fmt: skip
    failures = [(called[row.node_id], row) for row in facts.participations if row.status not in ("trained", "invited")]
    failures.sort(key=lambda one: (one[1].number, one[1].attempt), reverse=True)
    return Participation(
        [names[one.number, one.attempt] for one in shown],
        lines,
        len(facts.attempts) - len(shown),
        len(nodes) - len(shown_nodes),
        failures[:MOST_FAILURES],
        max(0, len(failures) - MOST_FAILURES),
    )


def _called(facts: RunFacts, node_id: str, rows: Mapping[tuple[int, int], ParticipationRow]) -> str:
    named = next(iter(rows.values()), None)
    return facts.client_ids.get(node_id) or (named.name if named else None) or node_id
