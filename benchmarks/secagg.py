"""What hiding each member's vector costs: one session of the secure sum, Flower's own SecAgg+ beside it.

A fraction of the members is gone once they have shared their secrets. Each surviving member's whole work is read, the
server's whole work too, and what they send and hold; the sum is checked against the plain one. A pair is read as
Flower, ours, Flower, on CPU seconds, which other work on the machine disturbs less than wall. Flower's server is read
in part and scaled where the whole takes minutes: the note of its row says from what.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from aggregation.graph import GraphPlan, full_threshold, is_safe, plan_graph
from benchmarks.meters import Stopwatch, traced
from benchmarks.report import Cell, Ratio, Report, Spread, Target
from benchmarks.secagg_session import CORRUPT, RING_BITS, Cohort, Load, Voices, serve
from contract.errors import ConfigError, SecureSumError

if TYPE_CHECKING:
    from benchmarks.flower_secagg import FlowerSum

CLIENT_SPEEDUP_LIMIT = 10.0
SERVER_SPEEDUP_LIMIT = 50.0
BYTES_RATIO_LIMIT = 0.55
PEAK_VECTORS_LIMIT = 3.0
FEWEST_FOR_FLOWER = 4


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    graph, size, drop = options.graph, options.d, options.drop
    client_pairs, server_pairs = (5, 3) if options.quick else (15, 7)
    try:
        load = Load(graph, size, drop)
        cohort, live = play(load)
    except SecureSumError as error:
        sys.exit(f"this session cannot be played to its end: {error}")
    flower = flower_beside(load, graph)
    beside = flower if isinstance(flower, str) else "Flower's SecAgg+ beside it"
    found = Report(
        "secagg",
        f"{graph.members} members, {len(load.gone)} gone after sharing, {size} coordinates and a weight of {RING_BITS} "
        f"bits, {graph.degree or 'all'} neighbours, threshold {graph.threshold}; {beside}",
    )
    sample = load.survivors[:: max(1, len(load.survivors) // client_pairs)][:client_pairs]
    client, server = read_ours(found, load, cohort, live, sample)
    found.results += client.rows()
    if isinstance(flower, str):
        found.results += server.rows()
        return found.finish(options.json)
    between, theirs = read_clients(found, load, cohort, flower, sample)
    found.results += [between.rows()[-1], *theirs.rows()]
    found.targets.append(Target.at_most("bytes_ratio", client.whole_up / theirs.whole_up, BYTES_RATIO_LIMIT))
    servers = read_servers(found, load, cohort, flower, server, server_pairs)
    found.results += [*server.rows(), servers.rows(f"unmask stage, {flower.part}")[-1]]
    return found.finish(options.json)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.secagg", description=__doc__)
    parser.add_argument("--n", type=int, help="members (100; quick: 20)")
    parser.add_argument("--d", type=int, help="coordinates of a vector (1000000; quick: 100000)")
    parser.add_argument("--drop", type=float, default=0.1, help="fraction gone after sharing (0.1)")
    parser.add_argument("--degree", default="auto", help="neighbours of a member; 0 is all others; auto plans them")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--quick", action="store_true", help="few, small vectors: a sanity check, not a figure")
    options = parser.parse_args(argv)
    options.n = options.n or (20 if options.quick else 100)
    options.d = options.d or (100_000 if options.quick else 1_000_000)
    try:
        options.graph = graph_of(options.n, options.degree, options.drop)
    except (ConfigError, ValueError) as error:
        parser.error(str(error))
    if options.graph is None:
        parser.error(f"no threshold is safe with --degree {options.degree}")
    if options.n - round(options.drop * options.n) < options.graph.threshold:
        parser.error(f"--drop {options.drop} leaves fewer than the threshold of {options.graph.threshold}")
    return options


def graph_of(members: int, degree: str, drop: float) -> GraphPlan | None:
    """The planned graph, or one of `degree` neighbours with the smallest safe threshold; None if there is none."""
    if degree == "auto":
        return plan_graph(members, CORRUPT, drop)
    if degree == "0":
        return GraphPlan(members, 0, full_threshold(members))
    most, traitors = int(degree), math.ceil(CORRUPT * members)
    heard = members - math.floor(drop * members)
    for threshold in range(most // 2 + 1, most + 1):
        if all(is_safe(GraphPlan(present, most, threshold), traitors) for present in (members, heard)):
            return GraphPlan(members, most, threshold)
    return None


def play(load: Load) -> tuple[Cohort, Stopwatch]:
    """The session, live, and the server's stopwatch."""
    cohort = Cohort(load)
    return cohort, serve_rightly(load, cohort, cohort)


def serve_rightly(load: Load, voices: Voices, cohort: Cohort) -> Stopwatch:
    """The server's seconds. Ends the process where its sum is not the plain one of the survivors' vectors."""
    watch = Stopwatch()
    if not np.array_equal(serve(load.terms, voices, watch), cohort.plain):
        sys.exit("the secure sum is not the plain sum of the survivors' vectors")
    return watch


def flower_beside(load: Load, graph: GraphPlan) -> FlowerSum | str:
    """Flower's side with the same graph and threshold, or why there is none."""
    if graph.members < FEWEST_FOR_FLOWER:
        return f"no Flower beside it: fewer than {FEWEST_FOR_FLOWER} members"
    try:
        from benchmarks.flower_secagg import FlowerSum
    except ImportError as error:
        return f"no Flower beside it: {error}"
    return FlowerSum(graph, load.size, len(load.gone))


@dataclass
class Side:
    """One party's readings: seconds, bytes up and down of a member, and the vectors held above each stage's start."""

    name: str
    watches: list[Stopwatch]
    up: list[dict[str, int]] = field(default_factory=list)
    down: list[dict[str, int]] = field(default_factory=list)
    vectors: dict[str, float] = field(default_factory=dict)

    def rows(self, whole: str = "whole") -> list[dict[str, Cell]]:
        """A row for each stage that was read, and one for all of them."""
        rows = [
            self._row(
                stage, [watch.cpu[stage] for watch in self.watches], [watch.wall[stage] for watch in self.watches]
            )
            | {"up": _median_of(self.up, stage), "down": _median_of(self.down, stage)}
            | {"vectors": self.vectors.get(stage)}
            for stage in self.watches[0].cpu
        ]
        cpu, wall = [watch.cpu_seconds for watch in self.watches], [watch.wall_seconds for watch in self.watches]
        total: dict[str, Cell] = {"up": _whole(self.up), "down": _whole(self.down), "vectors": None}
        return [*rows, self._row(whole, cpu, wall) | total]

    @property
    def whole_up(self) -> int:
        return _whole(self.up) or 0

    def _row(self, stage: str, cpu: list[float], wall: list[float]) -> dict[str, Cell]:
        spread = Spread.of(cpu)
        row: dict[str, Cell] = {"what": f"{self.name}, {stage}", "read": len(cpu), "cpu_s": spread.median}
        return row | {"min": spread.min, "max": spread.max, "wall_s": Spread.of(wall).median}


def _median_of(of_each: Sequence[dict[str, int]], stage: str) -> int | None:
    listed = [of_one[stage] for of_one in of_each if stage in of_one]
    return round(Spread.of(listed).median) if listed else None


def _whole(of_each: Sequence[dict[str, int]]) -> int | None:
    return round(Spread.of([sum(of_one.values()) for of_one in of_each]).median) if of_each else None


def read_ours(found: Report, load: Load, cohort: Cohort, live: Stopwatch, sample: Sequence[str]) -> tuple[Side, Side]:
    """A member and the server: the live session's seconds, the bytes of `sample`, and what each half holds."""
    vector = cohort.plain.nbytes
    with traced() as server:
        serve(load.terms, cohort.said, server)
    with traced() as member:
        cohort.said.replay(load, load.survivors[0], member)
    # The message in hand counts too, and the member's own vector. Encoding comes before the secure sum.
    held = server.kept["setup"] + max(server.peak["upload"] + vector, server.peak["finish"])
    found.targets.append(Target.at_most("server_peak_vectors", held / vector, PEAK_VECTORS_LIMIT))
    held = vector + member.peak["upload"]
    found.targets.append(Target.at_most("client_peak_vectors", held / vector, PEAK_VECTORS_LIMIT))
    client = Side("client", [cohort.watches[client_id] for client_id in load.survivors])
    for client_id in sample:
        up, down = cohort.said.bytes_of(load, client_id)
        client.up.append(up)
        client.down.append(down)
    client.vectors = {stage: peak / vector for stage, peak in member.peak.items()}
    return client, Side("server", [live], vectors={stage: peak / vector for stage, peak in server.peak.items()})


@dataclass
class Pairs:
    """Readings in the order they were taken: Flower's, ours, Flower's again."""

    flower: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    flower_again: list[float] = field(default_factory=list)

    def add(self, before: Stopwatch, ours: Stopwatch, again: Stopwatch) -> None:
        self.flower.append(before.cpu_seconds)
        self.ours.append(ours.cpu_seconds)
        self.flower_again.append(again.cpu_seconds)

    def judge(self, found: Report, name: str, limit: float) -> None:
        ratio = Ratio.of_pairs(self.ours, self.flower, self.flower_again).inverse()
        found.ratios[name] = ratio
        found.targets.append(Target.of_speedup(name, ratio, limit))


def read_clients(
    found: Report, load: Load, cohort: Cohort, flower: FlowerSum, sample: Sequence[str]
) -> tuple[Side, Side]:
    """One member's whole work, ours and Flower's, on the same update."""
    pairs, ours, theirs = Pairs(), Side("client between Flower's", []), Side("Flower's client", [])
    for client_id in sample:
        update, watch = load.update(client_id), Stopwatch()
        before = flower.client(update)
        cohort.said.replay(load, client_id, watch)
        again = flower.client(update)
        pairs.add(before.watch, watch, again.watch)
        ours.watches.append(watch)
        theirs.watches += [before.watch, again.watch]
        theirs.up += [before.up, again.up]
    pairs.judge(found, "client_speedup", CLIENT_SPEEDUP_LIMIT)
    return ours, theirs


def read_servers(found: Report, load: Load, cohort: Cohort, flower: FlowerSum, server: Side, count: int) -> Side:
    """The server's whole work on what was said, added to `server`, and Flower's unmask stage."""
    pairs, theirs = Pairs(), Side("Flower's server", [])
    for _ in range(count):
        before, watch = flower.server(), serve_rightly(load, cohort.said, cohort)
        again = flower.server()
        pairs.add(before, watch, again)
        server.watches.append(watch)
        theirs.watches += [before, again]
    pairs.judge(found, "server_speedup", SERVER_SPEEDUP_LIMIT)
    return theirs


if __name__ == "__main__":
    sys.exit(main())
