"""Kills orchestrator, trunk or site at every place before and after what it makes durable and what it sends.

Then what a user would do is done: the run is resumed, the trunk or the site is there again. `python -m
tests.faults.matrix` (or `make faults`) plays the whole matrix; it exits 1 where a run did not come to the adapters of
one in which nothing was killed, or left anything wrong. With --sample only so many kills, drawn from --seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import TextIOBase
from pathlib import Path
from typing import Any, TextIO

from sqlalchemy import create_engine, make_url, text

from tests.faults.forking import begun, ended, was_killed
from tests.faults.kept_trunk import KeptTrunk, kept_trunk
from tests.faults.life import REFUSED, Place, live
from tests.faults.real_site import DEATHS
from tests.faults.scenarios import SCENARIOS, Scenario
from tests.faults.state import half_written
from trunkline.ports import reserve_port

POSTGRES_VARIABLE = "TRUNKLINE_TEST_POSTGRES_URL"
ENGINES = ("sqlite", "postgresql")
UNTRACED = (
    *("sql.renew_lease.before", "sql.renew_lease.uncommitted", "sql.renew_lease.after"),
    *("serve.progress", "serve.progress.reply"),
)
"""Come by whenever their time has come, and not in a run's order."""
BY_CHANCE = ("spill.write", "spill.written", "evict.write", "evict.written")
"""How often these are come by goes by which of two threads is first: a kill there may never come."""


@dataclass(frozen=True)
class Surroundings:
    """What all cases share: a folder, a model, and a trunk that serves from `trunk_state`."""

    folder: Path
    model: Path
    trunk: str
    trunk_state: Path
    wholes: dict[tuple[str, str], Whole] = field(default_factory=dict)

    def whole(self, scenario: str, engine: str) -> Whole:
        """The run in which nothing is killed, played at the first call."""
        key = (scenario, engine)
        if key not in self.wholes:
            self.wholes[key] = play_whole(self, scenario, engine)
        return self.wholes[key]

    @contextmanager
    def place(self, scenario: str, engine: str) -> Iterator[Place]:
        """An empty home and an empty database, gone afterwards; a trunk that is killed is one of its own."""
        home = self.folder / f"{scenario}-{secrets.token_hex(4)}"
        home.mkdir()
        trunk, state = self.trunk, self.trunk_state
        if SCENARIOS[scenario].party == "trunk":
            trunk, state = f"127.0.0.1:{reserve_port()}", home / "trunk"
        with _database(engine, home) as url:
            yield Place(
                *(scenario, str(home), url, str(self.model), trunk, str(state)),
                *(self.trunk, str(self.folder / "memory" / scenario)),
            )  # fmt: skip
        shutil.rmtree(home)


@dataclass(frozen=True)
class Case:
    """A scenario on an engine, and the place at which its party is killed for the first and only time."""

    scenario: str
    engine: str
    at: str

    def __str__(self) -> str:
        return f"{self.scenario} on {self.engine}, killed at {self.at}"


@dataclass(frozen=True)
class Whole:
    """A run in which nothing was killed: where its party came by, in order, and what came of it."""

    places: tuple[str, ...]
    told: dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """What came of a run: the exit codes of the orchestrator's lives, the other party's deaths, and `answer`."""

    codes: tuple[int, ...]
    deaths: int
    answer: dict[str, Any] | None
    wrong: list[str] = field(default_factory=list)


def play_whole(around: Surroundings, scenario: str, engine: str) -> Whole:
    with around.place(scenario, engine) as place:
        trace = Path(place.home) / "trace"
        done = _played(place, f"trace:{trace}")
        if done.codes != (0,) or done.answer is None or done.answer["wrong"]:
            raise RuntimeError(f"{scenario} on {engine} without a kill: {done}")
        passed = [line for line in trace.read_text(encoding="utf-8").splitlines() if _name(line) not in UNTRACED]
        kept = [line for line in passed if _name(line) not in BY_CHANCE or line.endswith("#1")]
        return Whole(tuple(kept), done.answer)


def _name(place: str) -> str:
    """Of "5/site.close.send#1", or without the message's number."""
    return place.split("#")[0].split("/")[-1]


def _played(place: Place, order: str) -> Ended:
    """A run to its end, with as many lives of the orchestrator as a user would give it; `order` is for the party."""
    scenario = SCENARIOS[place.scenario]
    with ExitStack() as held:
        trunk = held.enter_context(_trunk(place, scenario, order)) if scenario.party == "trunk" else None
        codes = [_lived(place, "" if trunk else order, 0)]
        if codes[0] == REFUSED or (scenario.party == "orchestrator" and was_killed(codes[0])):
            codes.append(_lived(place, "", 1))
        deaths = Path(place.home) / DEATHS
        died = len(deaths.read_text().splitlines()) if deaths.exists() else 0
        if trunk is not None:
            died = trunk.deaths
        elif scenario.party == "orchestrator":
            died = sum(was_killed(code) for code in codes)
    wrong = half_written(Path(place.trunk_state)) if trunk is not None else []
    answer = json.loads(place.answer.read_text(encoding="utf-8")) if codes[-1] == 0 else None
    return Ended(tuple(codes), died, answer, wrong)


@contextmanager
def _trunk(place: Place, scenario: Scenario, order: str) -> Iterator[KeptTrunk]:
    state = Path(place.trunk_state)
    with kept_trunk(Path(place.model), place.trunk, state, order, cramped=scenario.cramped) as trunk:
        yield trunk


def faults_of(around: Surroundings, case: Case, whole: Whole) -> list[str]:
    """What is wrong after a kill and all that comes after it; nothing where all is as it must be."""
    with around.place(case.scenario, case.engine) as place:
        done = _played(place, f"kill:{case.at}")
    told = done.answer
    if done.deaths != 1:
        if done.deaths == 0 and _name(case.at) in BY_CHANCE:
            return []
        return [f"it was killed {done.deaths} times: the place was not come by a second time"]
    if told is None:
        return [f"the orchestrator's lives ended with {done.codes}"]
    wrong = [*done.wrong, *told["wrong"]]
    if told["status"] != "finished":
        wrong.append(f"the run is {told['status']}")
    if told["runs"] != 1:
        wrong.append(f"there are {told['runs']} runs")
    numbers = [number for number, *_ in told["versions"]]
    if numbers != [number for number, *_ in whole.told["versions"]]:
        wrong.append(f"the versions are {numbers}")
    repeats = SCENARIOS[case.scenario].settings.get("deterministic") and told["whole"]
    if repeats and told["versions"] != whole.told["versions"]:
        wrong.append(f"its adapters are {told['versions']}, and {whole.told['versions']} where nothing was killed")
    return wrong


def play(
    around: Surroundings, engines: Sequence[str], scenarios: Sequence[str], sample: int, seed: int, jobs: int = 1
) -> list[str]:
    """Plays the matrix, or `sample` kills of it, and says how it went; the faults that were found, one line each."""
    draw = random.Random(seed)
    groups = [(scenario, engine) for scenario in scenarios for engine in engines]
    if sample:  # as evenly over the scenarios as can be, each on an engine by chance
        groups = [(scenarios[index % len(scenarios)], draw.choice(engines)) for index in range(sample)]
        _say(f"a sample of {sample} kills, seed {seed}")
    wholes = {key: around.whole(*key) for key in dict.fromkeys(groups)}
    cases = [Case(*key, at) for key, whole in wholes.items() for at in whole.places]
    _say_size(cases)
    if sample:
        cases = [Case(*key, draw.choice(wholes[key].places)) for key in groups]
    found, done, began_s = [], Counter[str](), time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        played = pool.map(lambda case: (case, faults_of(around, case, wholes[case.scenario, case.engine])), cases)
        for case, wrong in played:
            done[case.scenario] += 1
            found += [f"{case}: {fault}" for fault in wrong]
            _say(f"{'FAULT' if wrong else 'ok   '} {case}" + "".join(f"\n      {fault}" for fault in wrong))
    for party in dict.fromkeys(SCENARIOS[name].party for name in scenarios):
        kills = {name: done[name] for name in scenarios if SCENARIOS[name].party == party}
        _say(f"{party}: {sum(kills.values())} kills ({', '.join(f'{name} {count}' for name, count in kills.items())})")
    _say(f"{sum(done.values())} kills in {time.monotonic() - began_s:.0f} s, {len(found)} faults")
    return found


def _say_size(cases: Sequence[Case]) -> None:
    """How many places there are to be killed at, by who is killed."""
    for party in dict.fromkeys(SCENARIOS[case.scenario].party for case in cases):
        of = [case for case in cases if SCENARIOS[case.scenario].party == party]
        places = len({(case.scenario, case.at) for case in of})
        named = len({_name(case.at) for case in of})
        engines = ", ".join(sorted({case.engine for case in of}))
        _say(f"{party}: {named} failpoints, come by at {places} places; {len(of)} kills in the matrix ({engines})")


def _lived(place: Place, order: str, generation: int) -> int:
    """The exit code of one life in a process of its own."""
    return ended(begun(live, place, order, generation))


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
    from tests.clients.sites import save_site_model
    from tests.server_trunk.conftest import RunningTrunk

    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        model = save_site_model(folder / "model")
        options = ServeOptions(
            str(model), CutLayers(1, 1), "127.0.0.1:0", folder / "trunk", device="cpu", threads=1, batch_tokens=512
        )
        trunk = RunningTrunk(options)
        try:
            yield Surroundings(folder, model, trunk.address, folder / "trunk")
        finally:
            trunk.stop()


class _Both(TextIOBase):
    """What is written goes to each of two files; what the killed processes print themselves goes to neither."""

    def __init__(self, one: TextIO, other: TextIO) -> None:
        self._files = (one, other)

    def write(self, text: str) -> int:
        for file in self._files:
            file.write(text)
        return len(text)

    def flush(self) -> None:
        for file in self._files:
            file.flush()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.matrix", description=__doc__)
    parser.add_argument("--sample", type=int, default=0, help="how many kills, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of the sample; printed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many runs at the same time")
    parser.add_argument("--log", type=Path, help="a new file that gets all lines, too, as a release keeps them")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=available_engines())
    parser.add_argument("--scenario", nargs="+", choices=tuple(SCENARIOS), default=tuple(SCENARIOS))
    options = parser.parse_args(argv)
    if options.log is not None and options.log.exists():
        parser.error(f"--log {options.log}: it is there already, and a log that was kept is not written over")
    with ExitStack() as stack:
        if options.log is not None:
            kept = stack.enter_context(options.log.open("x", encoding="utf-8"))
            stack.enter_context(redirect_stdout(_Both(sys.stdout, kept)))
        around = stack.enter_context(surroundings())
        found = play(around, options.engine, options.scenario, options.sample, options.seed, options.jobs)
        for fault in found:
            _say(f"fault: {fault}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
