"""What a seed stands for: a run's settings, its sites, and everything that will go wrong until the weather clears."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from contract.config import ConfigValue

LARGEST_WEIGHT = 64
_TOWNS = ("aar", "bern", "cham", "davos", "elm", "flims")


@dataclass(frozen=True)
class Partition:
    """From `start_s` to `end_s` the sites in `cut_off` hear nothing from Flower (`way` grid) or from the trunk."""

    start_s: float
    end_s: float
    cut_off: frozenset[str]
    way: str


@dataclass(frozen=True)
class Weather:
    """Chances, each time that the place is come by, until `clears_s`; afterwards all is well.

    `killed`, `still`, `disk_full` and `commit_ack_lost` (SQL's) are by failpoint, the others by message or call.
    `late_s` is the mean of a late one's delay.
    """

    clears_s: float = 0.0
    refused: float = 0.0
    ack_lost: float = 0.0
    message_lost: float = 0.0
    reply_lost: float = 0.0
    duplicated: float = 0.0
    late: float = 0.0
    late_s: float = 1.0
    driver_killed: float = 0.0
    driver_still: float = 0.0
    site_killed: float = 0.0
    app_killed: float = 0.0
    trunk_killed: float = 0.0
    trunk_wiped: float = 0.0
    call_lost: float = 0.0
    call_ack_lost: float = 0.0
    disk_full: float = 0.0
    commit_ack_lost: float = 0.0
    partitions: tuple[Partition, ...] = ()
    meddles_s: tuple[float, ...] = ()
    stops_s: tuple[float, ...] = ()
    skew_s: float = 0.0


@dataclass(frozen=True)
class Plan:
    """`sites` gives each site's weight, its trained tokens in a round, by name."""

    seed: int
    sites: Mapping[str, int]
    settings: Mapping[str, ConfigValue]
    weather: Weather
    enrolled: bool = False


def plan_of(seed: int, *, calm: bool = False) -> Plan:
    """The plan of a seed; `calm` leaves its settings and takes its weather away."""
    rng = random.Random(f"trunkline simulation {seed}")
    names = _TOWNS[: rng.randint(3, 6)]
    sites = {name: rng.randint(1, LARGEST_WEIGHT) for name in names}
    settings = _settings(rng, len(names))
    enrolled = rng.random() < 0.3
    weather = _weather(rng, names, steady=bool(settings.get("deterministic")) and rng.random() < 0.7)
    return Plan(seed, sites, settings, Weather() if calm else weather, enrolled)


def _settings(rng: random.Random, sites: int) -> dict[str, ConfigValue]:
    settings: dict[str, ConfigValue] = {
        "num-rounds": rng.randint(2, 3),
        "quorum": rng.randint(2, sites),
        "aggregation": rng.choice(("ffa", "ffa", "rolora", "fedavg")),
        "seed": rng.randint(0, 3),
        "max-tokens": LARGEST_WEIGHT,
        "lora-r": 1,
        "target-modules": "q_proj",
        "local-steps": 2,
        "node-wait-s": 20.0,
        "round-timeout-s": 30.0,
        "secagg-stage-timeout-s": 10.0,
        "trunk-wait-s": 20.0,
    }
    kind = rng.choices(("plain", "secure", "private"), (2, 5, 3))[0]
    if kind == "plain":
        settings |= {"secagg": "off"}
    if kind == "private":
        epsilon, noise = rng.choice(((8.0, 4.0), (8.0, 4.0), (3.0, 4.0), (2.0, 4.0)))
        settings |= {"dp": "client", "trunk-adapter": "frozen", "dp-epsilon": epsilon, "dp-noise-multiplier": noise}
        settings |= {"metrics": rng.choice(("off", "sum"))}
    elif rng.random() < 0.4:
        settings |= {"deterministic": True}
    if "deterministic" not in settings and rng.random() < 0.3:
        settings |= {"cohort-size": rng.randint(max(2, int(str(settings["quorum"]))), sites)}
    return settings


def _weather(rng: random.Random, names: tuple[str, ...], *, steady: bool) -> Weather:
    """Each kind of fault is there in about half of all seeds, so that they meet in many ways; some seeds are calm.

    In `steady` weather sites lose nothing: whatever happens to the others, no client is left out.
    """
    if rng.random() < 0.05:
        return Weather()
    clears_s = rng.uniform(20.0, 240.0)

    def chance(low: float, high: float, of: float = 0.5) -> float:
        drawn, there = low * (high / low) ** rng.random(), rng.random() < of
        return drawn if there else 0.0

    def moments(most: int, of: float) -> tuple[float, ...]:
        drawn = [rng.uniform(0.0, clears_s) for _ in range(rng.randint(1, most))]
        return tuple(drawn) if rng.random() < of else ()

    always = {
        "clears_s": clears_s,
        "driver_killed": chance(0.0005, 0.02),
        "driver_still": chance(0.0005, 0.02),
        "trunk_killed": chance(0.002, 0.05, 0.3),
        "call_ack_lost": chance(0.005, 0.2, 0.3),
        "disk_full": chance(0.0005, 0.01, 0.2),
        "commit_ack_lost": chance(0.0005, 0.01, 0.2),
        "meddles_s": moments(4, 0.4),
        "stops_s": moments(2, 0.15),
        "skew_s": rng.uniform(0.0, 2.0),
    }
    sites = {
        "refused": chance(0.005, 0.2, 0.3),
        "ack_lost": chance(0.002, 0.02, 0.2),
        "message_lost": chance(0.005, 0.2),
        "reply_lost": chance(0.005, 0.2),
        "duplicated": chance(0.01, 0.4),
        "late": chance(0.01, 0.4),
        "late_s": rng.choice((2.0, 10.0, 40.0)),
        "site_killed": chance(0.002, 0.05, 0.4),
        "app_killed": chance(0.002, 0.05, 0.4),
        "trunk_wiped": chance(0.1, 0.5, 0.4),
        "call_lost": chance(0.005, 0.2, 0.3),
        "partitions": _partitions(rng, names, clears_s) if rng.random() < 0.4 else (),
    }
    return Weather(**always) if steady else Weather(**always, **sites)  # type: ignore[arg-type]


def _partitions(rng: random.Random, names: tuple[str, ...], clears_s: float) -> tuple[Partition, ...]:
    found = []
    for _ in range(rng.randint(1, 3)):
        start_s = rng.uniform(0.0, clears_s)
        end_s = min(clears_s, start_s + rng.choice((3.0, 15.0, 60.0)))
        cut_off = frozenset(rng.sample(names, rng.randint(1, len(names))))
        found.append(Partition(start_s, end_s, cut_off, rng.choice(("grid", "trunk", "driver-trunk"))))
    return tuple(found)
