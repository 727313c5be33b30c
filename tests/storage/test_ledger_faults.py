"""Eight processes reserve from the same few budgets, and are killed by SIGKILL at any moment and started again."""

import json
import multiprocessing
import os
import random
import secrets
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from contract.privacy_records import Unit
from storage.engine import make_engine
from storage.ledger import Ledger, open_ledger
from tests.storage.ledger_cases import cap, charge, unit

WORKERS, RESERVATIONS_EACH, MOST_KILLS = 8, 125, 16
UNIT_MOST, CLIENT_MOST = 170, 250
CLIENTS, DATASETS = ("a", "b", "c"), ("x", "y")
GIVES_BACK = "c"  # the only client whose charges are ever void, so that the others' must come to exactly their budget
DEADLINE_S = 120

FORKING: Any = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload([__name__])


def work(url: str, worker: int, life: int, seed: int, log: Path) -> None:
    """Make this worker's reservations from the first that was not acknowledged on; `life` counts its starts."""
    ledger = Ledger(make_engine(url))
    for number in range(len(acknowledged(log)), RESERVATIONS_EACH):
        draw = random.Random(f"{seed} {worker} {number}")
        client = draw.choice(CLIENTS)
        units = [unit(client, dataset) for dataset in draw.sample(DATASETS, draw.randint(1, 2))]
        charges = [charge(one, number, life, run=f"w{worker}") for one in units]
        refused = {refusal.unit for refusal in ledger.reserve(charges, cap(UNIT_MOST, CLIENT_MOST))}
        told = [[one.client, one.dataset, one not in refused] for one in units]
        acknowledge(log, {"number": number, "life": life, "units": told})
        charged = [one for one in units if one not in refused]
        if charged and draw.random() < 0.3:
            gives_back = client == GIVES_BACK and draw.random() < 0.5
            ledger.settle(f"w{worker}", number, life, "VOID" if gives_back else "COMMITTED", charged)
    ledger.close()


def acknowledge(log: Path, told: dict[str, Any]) -> None:
    with log.open("ab", buffering=0) as file:
        file.write(json.dumps(told).encode() + b"\n")
        os.fsync(file.fileno())


def acknowledged(log: Path) -> list[dict[str, Any]]:
    """The lines that were written whole."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_bytes().split(b"\n")[:-1]]


def play(url: str, logs: list[Path], seed: int) -> int:
    """Start the workers, kill and restart them at random, and wait for all; answers how many were killed."""
    draw = random.Random(seed)
    lives = [1] * WORKERS
    give_up = time.monotonic() + DEADLINE_S

    def start(worker: int) -> BaseProcess:
        started: BaseProcess = FORKING.Process(target=work, args=(url, worker, lives[worker], seed, logs[worker]))
        started.start()
        return started

    running = {worker: start(worker) for worker in range(WORKERS)}
    try:
        while running:
            assert time.monotonic() < give_up, "the workers do not come to an end"
            time.sleep(draw.uniform(0.02, 0.25))
            for worker, process in list(running.items()):
                if not process.is_alive():
                    assert process.exitcode == 0, f"worker {worker} failed by itself"
                    del running[worker]
            if running and sum(lives) - WORKERS < MOST_KILLS:
                worker = draw.choice(sorted(running))
                running[worker].kill()
                running[worker].join(10)
                lives[worker] += 1
                running[worker] = start(worker)
    finally:
        for process in running.values():
            process.kill()
            process.join(10)
    return sum(lives) - WORKERS


def test_nothing_is_overspent_nor_lost_when_processes_are_killed(database_url: str, tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # noqa: T201
    open_ledger(database_url).close()
    logs = [tmp_path / f"worker-{worker}" for worker in range(WORKERS)]
    kills = play(database_url, logs, seed)
    assert kills >= 8, "the workers were done before they could be killed"
    ledger = open_ledger(database_url)
    assert ledger.verify() == []
    check_acknowledgements(ledger, logs, kills)
    check_budgets(ledger)
    ledger.close()


def check_acknowledgements(ledger: Ledger, logs: list[Path], kills: int) -> None:
    """All that was acknowledged is there, nothing that was refused, and at most what a kill left unsaid besides."""
    reserved = {
        (row.run, row.round, row.attempt, of)
        for of in ledger.units()
        for row in ledger.rows(of)
        if row.state == "RESERVED"
    }
    charged, refused = set(), set()
    for worker, log in enumerate(logs):
        lines = acknowledged(log)
        assert [line["number"] for line in lines] == list(range(RESERVATIONS_EACH))
        for line in lines:
            for client, dataset, admitted in line["units"]:
                key = (f"w{worker}", line["number"], line["life"], unit(client, dataset))
                (charged if admitted else refused).add(key)
    assert len(charged) + len(refused) > WORKERS * RESERVATIONS_EACH
    assert charged <= reserved, "an acknowledged charge is not in the ledger"
    assert not refused & reserved, "a refused charge is in the ledger"
    assert len({key[:3] for key in reserved - charged}) <= kills


def check_budgets(ledger: Ledger) -> None:
    """No unit was ever over its budget, after no row of its chain, nor is a client over it, or under it for nothing."""
    by_client: Counter[str] = Counter()
    for of in ledger.units():
        by_client[of.client] += check_chain(ledger, of)
    assert set(by_client) == set(CLIENTS)
    for client, spent in by_client.items():
        assert spent <= CLIENT_MOST
        assert client == GIVES_BACK or spent == CLIENT_MOST


def check_chain(ledger: Ledger, of: Unit) -> int:
    spent = 0
    for row in ledger.rows(of):
        spent += {"RESERVED": 1, "COMMITTED": 0, "VOID": -1}[row.state]
        assert 0 <= spent <= UNIT_MOST
    return spent
