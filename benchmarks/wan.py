"""Seconds of an optimiser step over slow links: the SDK's client, a naive blocking one, and a yardstick.

Each cell is a link (benchmarks.shaping) of so many Mbit/s each way and so long a round trip, between one client and a
trunk on the same machine, both with all cores. A step accumulates several microbatches. Per cell, medians of:

- `step_s`: the SDK's client, steps back to back after a warm-up, by the codec that the workload names;
- `naive_s`: the naive client and trunk (benchmarks.naive_trunk) over a link of the same kind;
- `compute_s`: the SDK's client on the same cores without a link;
- `up_bytes`, `down_bytes`: what the link counted of a step of the SDK's client, gRPC's framing included;
- `bound_s` = max(compute_s, link_s) + fill_s. `link_s` is the larger direction's bytes at the link's rate. `fill_s` is
  what one microbatch needs to go through and come back, which no pipeline hides: two round trips and the serialisation
  of its four crossings, (up_bytes + down_bytes) / microbatches at the link's rate. It holds no computing.

`bound_ratio_*` is step_s over bound_s. `speedup_*`, naive_s over step_s, has a target only where the link is at least
80 % of the naive step: `naive_link_share` is all of its bytes at the link's rate and a round trip for each of its
requests, over naive_s. Readings go compute, naive, ours, compute, naive, ours, ...; each of ours is held against the
reading of the others before and after it, which neighbours share, as a naive step takes a minute on the slowest link.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from benchmarks.processes import Order, Worker, naive_trunk_server, training_workers, trunk_server
from benchmarks.report import Cell, Ratio, Report, Spread, Target
from benchmarks.shaping import Link, LinkSpec, Passed, links

BOUND_RATIO_LIMIT = 1.25
SPEEDUP_LIMIT = 5.0
LEAST_LINK_SHARE = 0.8
WARM_UP_STEPS = 2
STEPS = 2
"""Of the SDK's client in a reading; the others take one."""


@dataclass(frozen=True, slots=True)
class Place:
    """One cell: where the client is, seen from the trunk."""

    mbit: int
    rtt_ms: int

    @property
    def name(self) -> str:
        return f"{self.mbit}mbit_{self.rtt_ms}ms"

    @property
    def link(self) -> LinkSpec:
        return LinkSpec(self.mbit * 1e6, self.rtt_ms / 1e3)

    @property
    def pairs(self) -> int:
        """A naive step takes a minute on the slowest links."""
        return 3 if self.mbit < 20 else 5


PLACES = {f"{mbit}x{rtt_ms}": Place(mbit, rtt_ms) for mbit in (5, 20, 100) for rtt_ms in (20, 80)}
QUICK = ("20x20",)


@dataclass(slots=True)
class Readings:
    """Of one cell. Of the yardsticks there is one more reading than of ours; bytes are a step's."""

    ours_s: list[float] = field(default_factory=list)
    naive_s: list[float] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    ours_bytes: list[Passed] = field(default_factory=list)
    naive_bytes: list[Passed] = field(default_factory=list)


def bound_s(compute_s: float, passed: Passed, place: Place, microbatches: int) -> float:
    """The module's docstring says what it is made of; `passed` is what a step of ours sends and gets."""
    rate = place.link.rate_bps / 8
    link_s = max(passed.up_bytes, passed.down_bytes) / rate
    fill_s = 2 * place.link.rtt_s + (passed.up_bytes + passed.down_bytes) / microbatches / rate
    return max(compute_s, link_s) + fill_s


def naive_link_s(passed: Passed, place: Place, microbatches: int) -> float:
    """What of a naive step is the link: each of its requests, two a microbatch and the step, is waited for."""
    rate = place.link.rate_bps / 8
    return (passed.up_bytes + passed.down_bytes) / rate + (2 * microbatches + 1) * place.link.rtt_s


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    microbatches = 2 if options.quick else 8
    places = [PLACES[name] for name in options.cell or (QUICK if options.quick else PLACES)]
    found = Report("wan", _described(options, microbatches))
    with tempfile.TemporaryDirectory() as name:
        from benchmarks.workload import Workload

        directory, model_dir = Path(name), Path(name) / "model"
        Workload().write_model(model_dir)
        with (
            trunk_server(model_dir, 0, directory) as (address, trunk),
            naive_trunk_server(model_dir, directory) as (naive_address, _),
        ):
            for place in places:
                with links({"ours": address, "naive": naive_address}, place.link) as made:
                    pairs = 1 if options.quick else place.pairs
                    readings = measure(model_dir, address, trunk, made, options.codec, microbatches, pairs)
                add(found, place, readings, microbatches)
    return found.finish(options.json)


def measure(
    model_dir: Path,
    address: str,
    trunk: psutil.Process,
    made: dict[str, Link],
    codec: str,
    microbatches: int,
    pairs: int,
) -> Readings:
    """`address` is the trunk's own; over `made` are the links to it and to the naive trunk."""
    readings = Readings()
    plain = Order("split", 1, os.cpu_count() or 1, microbatches=microbatches, codec=codec)
    compute = replace(plain, address=address)
    ours = replace(plain, address=made["ours"].address, steps=STEPS)
    naive = replace(plain, side="naive", address=made["naive"].address, codec="identity")
    with training_workers(1, model_dir, waits=True, trunk=trunk) as (client,):

        def yardsticks() -> None:
            readings.compute_s.append(client.read(compute).seconds)
            seconds, _, passed = _over(made["naive"], client, naive)
            readings.naive_s.append(seconds)
            readings.naive_bytes.append(passed)

        client.read(replace(compute, steps=WARM_UP_STEPS))
        client.read(replace(ours, steps=WARM_UP_STEPS))
        client.read(replace(naive, microbatches=1))
        yardsticks()
        for _ in range(pairs):
            seconds, cpu_s, passed = _over(made["ours"], client, ours)
            readings.ours_s.append(seconds)
            readings.cpu_s.append(cpu_s)
            readings.ours_bytes.append(passed)
            yardsticks()
    return readings


def _over(link: Link, client: Worker, order: Order) -> tuple[float, float, Passed]:
    """(wall seconds, CPU seconds, bytes) of one of the order's steps."""
    before = link.passed
    reading = client.read(order)
    passed = link.passed - before
    each = Passed(passed.up_bytes // order.steps, passed.down_bytes // order.steps)
    return reading.seconds / order.steps, reading.cpu_seconds / order.steps, each


def add(found: Report, place: Place, readings: Readings, microbatches: int) -> None:
    """The cell's row, ratios and targets to `found`."""
    ours, naive = Spread.of(readings.ours_s), Spread.of(readings.naive_s)
    compute_s = Spread.of(readings.compute_s).median
    passed, naive_passed = _median(readings.ours_bytes), _median(readings.naive_bytes)
    share = naive_link_s(naive_passed, place, microbatches) / naive.median
    row: dict[str, Cell] = {"mbit": place.mbit, "rtt_ms": place.rtt_ms}
    row |= {"step_s": ours.median, "min": ours.min, "max": ours.max}
    row |= {"bound_s": bound_s(compute_s, passed, place, microbatches), "compute_s": compute_s}
    row |= {"naive_s": naive.median, "naive_min": naive.min, "naive_max": naive.max}
    row |= {"up_bytes": passed.up_bytes, "down_bytes": passed.down_bytes}
    row |= {"naive_up_bytes": naive_passed.up_bytes, "naive_down_bytes": naive_passed.down_bytes}
    row |= {"naive_link_share": share, "cpu_s": Spread.of(readings.cpu_s).median, "pairs": len(readings.ours_s)}
    found.results.append(row)
    before, after = (
        [bound_s(one_s, sent, place, microbatches) for one_s, sent in zip(which, readings.ours_bytes, strict=True)]
        for which in (readings.compute_s[:-1], readings.compute_s[1:])
    )
    bound = Ratio.of_pairs(readings.ours_s, before, after)
    speedup = Ratio.of_pairs(readings.ours_s, readings.naive_s[:-1], readings.naive_s[1:]).inverse()
    found.ratios |= {f"bound_ratio_{place.name}": bound, f"speedup_{place.name}": speedup}
    found.targets.append(Target.of_ratio(f"bound_ratio_{place.name}", bound, BOUND_RATIO_LIMIT))
    if share >= LEAST_LINK_SHARE:
        found.targets.append(Target.of_speedup(f"speedup_{place.name}", speedup, SPEEDUP_LIMIT))


def _median(passed: Sequence[Passed]) -> Passed:
    return Passed(
        int(Spread.of([one.up_bytes for one in passed]).median),
        int(Spread.of([one.down_bytes for one in passed]).median),
    )


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--quick", action="store_true", help="one cell, few microbatches: a sanity check, not a figure")
    parser.add_argument("--cell", choices=tuple(PLACES), nargs="+", help="Mbit/s x ms, in place of all cells")
    parser.add_argument("--codec", default="auto", help="of the SDK's client (auto)")
    options = parser.parse_args(argv)
    from clients.link import WireCodecs
    from contract.codec import CODECS
    from contract.errors import ConfigError

    try:
        WireCodecs.named(options.codec, "same", CODECS)
    except ConfigError as error:
        parser.error(str(error))
    return options


def _described(options: argparse.Namespace, microbatches: int) -> str:
    from benchmarks.workload import Workload

    pairs = "1 pair" if options.quick else "3 pairs at 5 Mbit/s, 5 elsewhere"
    return (
        f"{Workload()}, {microbatches} microbatches a step; codec {options.codec}; cut (1, 1); threads: "
        f"{os.cpu_count()} of the client, the trunk's own choice; "
        f"readings of {STEPS} steps of ours and 1 of the others; {pairs}"
    )


if __name__ == "__main__":
    sys.exit(main())
