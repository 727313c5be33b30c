"""What a round costs beside training: rounds of one local step, by phase, in simulation and in deployment.

The demo's model and text, two clients. In clear a round's overhead is its seconds less the slowest client's own seconds
of training. Under secure sums no client tells its seconds: there the phases beside the training are the overhead. The
first round starts processes and is shown apart.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.report import Cell, Report, Spread, Target
from contract.config import RunConfig
from demo.settings import MODEL_DIR, RUN_CONFIG, SOURCES
from storage.records import MetricRow, RoundRow
from storage.store import open_reader
from trunkline.flower import simulation_config, start_superlink, start_supernode
from trunkline.run import require_row
from trunkline.watch import run_to_end
from trunkline.workplace import cores, open_workplace, start_trunk

CLIENTS = 2
EXCHANGES_LIMIT = {"off": 1.0, "on": 3.0}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.round_overhead", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--quick", action="store_true", help="few rounds, simulation only: a sanity check")
    parser.add_argument("--rounds", type=int, default=16, help="how many rounds of each kind (16)")
    options = parser.parse_args(argv)
    rounds = 4 if options.quick else options.rounds
    modes = ("simulation",) if options.quick else ("simulation", "deployment")
    found = Report("round_overhead", f"the demo's model, {CLIENTS} clients, {rounds} rounds of one local step")
    with tempfile.TemporaryDirectory() as home, _home(home):
        for secagg, limit in EXCHANGES_LIMIT.items():
            exchanges: list[float] = []
            for mode in modes:
                played, metrics = play(mode, secagg, rounds)
                found.results += phase_rows(mode, secagg, played, metrics)
                exchanges += [row.value for row in metrics if row.name == "exchanges" and row.number > 1]
            found.targets.append(Target.at_most(f"exchanges_per_round_secagg_{secagg}", max(exchanges), limit))
    return found.finish(options.json)


def play(mode: str, secagg: str, rounds: int) -> tuple[list[RoundRow], list[MetricRow]]:
    """Run `rounds` rounds in `mode` and answer what SQL then says of them."""
    config = RunConfig.from_flower(
        {**RUN_CONFIG, "model": str(MODEL_DIR), "num-rounds": rounds, "quorum": CLIENTS, "local-steps": 1}
        | {"eval-fraction": 0.0, "secagg": secagg}
    )
    simulated = mode == "simulation"
    with open_workplace(CLIENTS + 1) as workplace:
        supervisor = workplace.supervisor
        trunk = start_trunk(workplace, config, config.model)
        superlink = start_superlink(supervisor, simulation=simulated)
        trunk_address = trunk.address(supervisor)
        for number in range(0 if simulated else CLIENTS):
            node: dict[str, str | int] = {
                "model": config.model,
                "data": SOURCES[number],
                "secagg-min-members": CLIENTS,
                "allow-secagg-off": True,
                "trunk-address": trunk_address,
            }
            start_supernode(supervisor, superlink, f"client-{number}", node)
        needed = list(supervisor.daemons)
        config = config.model_copy(update={"trunk_address": trunk_address})
        federation = simulation_config(CLIENTS, cores()) if simulated else None
        row = require_row(run_to_end(workplace, config, superlink, needed, federation))
    reader = open_reader()
    try:
        return list(reader.rounds(row.run_id)), list(reader.metrics(row.run_id))
    finally:
        reader.close()


def phase_rows(mode: str, secagg: str, played: list[RoundRow], metrics: list[MetricRow]) -> list[dict[str, Cell]]:
    """One row for each phase, and for the whole round, over the rounds after the first."""
    total_s = {row.number: row.seconds for row in played if row.seconds is not None}
    readings = {phase: {row.number: row.phase_seconds[phase] for row in played} for phase in played[0].phase_seconds}
    readings["round"] = total_s
    if secagg == "off":
        local_s = {row.number: row.value for row in metrics if row.name == "seconds" and row.node_id is None}
        readings["of training a client's own"] = local_s
        readings["round less a client's own training"] = {one: total_s[one] - local_s[one] for one in total_s}
    else:
        readings["round less training"] = {one: total_s[one] - readings["training"][one] for one in total_s}
    rows: list[dict[str, Cell]] = []
    for name, of_round in readings.items():
        steady = Spread.of([seconds for number, seconds in of_round.items() if number > 1])
        row: dict[str, Cell] = {"mode": mode, "secagg": secagg, "phase": name, "first_round_s": of_round[1]}
        rows.append(row | {"median_s": steady.median, "min_s": steady.min, "max_s": steady.max})
    return rows


@contextmanager
def _home(directory: str) -> Iterator[None]:
    """A database and artifacts of the benchmark's own."""
    before = os.environ.get("TRUNKLINE_HOME")
    os.environ["TRUNKLINE_HOME"] = str(Path(directory))
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRUNKLINE_HOME"]
        else:
            os.environ["TRUNKLINE_HOME"] = before


if __name__ == "__main__":
    sys.exit(main())
