"""Kills an orchestrator at every place before and after what it makes durable and what it sends, and has it resumed.

`python -m tests.faults.matrix` (or `make faults`) plays the whole matrix; it exits 1 where a killed run did not come to
the adapters of one that never was, or left anything wrong. With --sample only so many places, drawn from --seed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, make_url, text

from tests.faults.life import SCENARIOS, Place, live

LIFE_LIMIT_S = 120.0
POSTGRES_VARIABLE = "TRUNKLINE_TEST_POSTGRES_URL"
ENGINES = ("sqlite", "postgresql")
UNTRACED = ("sql.renew_lease.before", "sql.renew_lease.uncommitted", "sql.renew_lease.after")
"""Come by whenever their time has come, and not in a run's order."""

_FORKING: Any = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["tests.faults.life"])


@dataclass(frozen=True)
class Surroundings:
    """What all cases share: a folder, a model, and a trunk that serves from `trunk_state`."""

    folder: Path
    model: Path
    trunk: str
    trunk_state: Path

    @contextmanager
    def place(self, scenario: str, engine: str) -> Iterator[Place]:
        """An empty home and an empty database, gone afterwards."""
        name = f"{scenario}-{secrets.token_hex(4)}"
        home = self.folder / name
        home.mkdir()
        with _database(engine, home) as url:
            yield Place(scenario, str(home), url, str(self.model), self.trunk, str(self.trunk_state))
        shutil.rmtree(home)


@dataclass(frozen=True)
class Case:
    """A scenario on an engine, and the place at which its first life ends."""

    scenario: str
    engine: str
    at: str

    def __str__(self) -> str:
        return f"{self.scenario} on {self.engine}, killed at {self.at}"


@dataclass(frozen=True)
class Whole:
    """A run that was never killed: where it came by, in order, and what came of it."""

    places: tuple[str, ...]
    told: dict[str, Any]


def play_whole(around: Surroundings, scenario: str, engine: str) -> Whole:
    with around.place(scenario, engine) as place:
        trace = Path(place.home) / "trace"
        code = _lived(place, f"trace:{trace}", 0)
        if code != 0:
            raise RuntimeError(f"{scenario} on {engine} ended with {code} without being killed")
        passed = [line for line in trace.read_text(encoding="utf-8").splitlines() if line.split("#")[0] not in UNTRACED]
        return Whole(tuple(passed), json.loads(place.answer.read_text(encoding="utf-8")))


def faults_of(around: Surroundings, case: Case, whole: Whole) -> list[str]:
    """What is wrong after a life that was killed and one that was not; nothing where all is as it must be."""
    with around.place(case.scenario, case.engine) as place:
        code = _lived(place, f"kill:{case.at}", 0)
        if code == 0:
            return ["the place was not come by a second time: nothing was killed"]
        if code != -signal.SIGKILL:
            return [f"the first life ended with {code}, and not by the kill"]
        code = _lived(place, "", 1)
        if code != 0:
            return [f"the second life ended with {code}"]
        told = json.loads(place.answer.read_text(encoding="utf-8"))
    wrong = list(told["wrong"])
    if told["status"] != "finished":
        wrong.append(f"the run is {told['status']}")
    if told["runs"] != 1:
        wrong.append(f"there are {told['runs']} runs")
    numbers = [number for number, *_ in told["versions"]]
    if numbers != [number for number, *_ in whole.told["versions"]]:
        wrong.append(f"the versions are {numbers}")
    if SCENARIOS[case.scenario].get("deterministic") and told["versions"] != whole.told["versions"]:
        wrong.append(f"its adapters are {told['versions']}, and {whole.told['versions']} where nothing was killed")
    return wrong


def play(
    around: Surroundings, engines: Sequence[str], scenarios: Sequence[str], sample: int, seed: int, jobs: int = 1
) -> list[str]:
    """Plays the matrix, or `sample` cases of it, and says how it went; the faults that were found, one line each."""
    wholes = {(scenario, engine): play_whole(around, scenario, engine) for scenario in scenarios for engine in engines}
    cases = [Case(*key, at) for key, whole in wholes.items() for at in whole.places]
    places = len({(case.scenario, case.at) for case in cases})
    _say(f"{places} failpoints over {len(scenarios)} scenarios, {len(cases)} kills in the matrix")
    if sample and sample < len(cases):
        cases = random.Random(seed).sample(cases, sample)
        _say(f"a sample of {sample} of them, seed {seed}")
    found, done, began_s = [], Counter[str](), time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        played = pool.map(lambda case: (case, faults_of(around, case, wholes[case.scenario, case.engine])), cases)
        for case, wrong in played:
            done[f"{case.scenario} on {case.engine}"] += 1
            found += [f"{case}: {fault}" for fault in wrong]
            _say(f"{'FAULT' if wrong else 'ok   '} {case}" + "".join(f"\n      {fault}" for fault in wrong))
    for name, count in sorted(done.items()):
        _say(f"{name}: {count} kills")
    _say(f"{sum(done.values())} kills in {time.monotonic() - began_s:.0f} s, {len(found)} faults")
    return found


def _lived(place: Place, order: str, generation: int) -> int:
    """The exit code of one life in a process of its own."""
    process = _FORKING.Process(target=live, args=(place, order, generation))
    process.start()
    process.join(LIFE_LIMIT_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise RuntimeError(f"a life did not end within {LIFE_LIMIT_S:g} s")
    return int(process.exitcode)


@contextmanager
def _database(engine: str, home: Path) -> Iterator[str]:
    if engine == "sqlite":
        yield f"sqlite:///{home / 'trunkline.db'}"
        return
    server, name = os.environ[POSTGRES_VARIABLE], f"faults_{secrets.token_hex(6)}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        admin.dispose()


def available_engines() -> tuple[str, ...]:
    return ENGINES if os.environ.get(POSTGRES_VARIABLE) else ENGINES[:1]


@contextmanager
def surroundings() -> Iterator[Surroundings]:
    """A tiny model and a trunk of its own for it, gone afterwards."""
    from contract.records import CutLayers
    from server_trunk.server import ServeOptions
    from tests.server_trunk.conftest import RunningTrunk, save_llama

    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        model = save_llama(folder / "model")
        options = ServeOptions(
            str(model), CutLayers(1, 1), "127.0.0.1:0", folder / "trunk", device="cpu", batch_tokens=512
        )
        trunk = RunningTrunk(options)
        try:
            yield Surroundings(folder, model, trunk.address, folder / "trunk")
        finally:
            trunk.stop()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.matrix", description=__doc__)
    parser.add_argument("--sample", type=int, default=0, help="how many kills, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of the sample; printed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many runs at the same time")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=available_engines())
    parser.add_argument("--scenario", nargs="+", choices=tuple(SCENARIOS), default=tuple(SCENARIOS))
    options = parser.parse_args(argv)
    with surroundings() as around:
        found = play(around, options.engine, options.scenario, options.sample, options.seed, options.jobs)
    for fault in found:
        _say(f"fault: {fault}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
