"""Client-level privacy on Flower's own simulation engine: budgets that run out, a second run, and tampering found."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from contract.config import RunConfig
from contract.privacy_records import Budget, Unit
from privacy.plan import expected_spend, register_budget
from storage.ledger import open_ledger
from storage.records import RunRow
from storage.store import open_reader
from tests.clients.sites import save_site_model, write_texts
from tests.orchestrator.test_simulation import LIMIT_S, REPOSITORY, played
from trunkline.flower import SuperLinkAddress, start_superlink
from trunkline.workplace import Workplace, open_workplace, start_trunk

CLIENTS, POOR = 10, (8, 9)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("private simulation") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUNKLINE_HOME", str(home))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.delenv("TRUNKLINE_DATABASE_URL", raising=False)
        yield home


@pytest.fixture(scope="module")
def workplace(home: Path) -> Iterator[Workplace]:
    with open_workplace(2) as opened:
        yield opened


@pytest.fixture(scope="module")
def superlink(workplace: Workplace) -> SuperLinkAddress:
    return start_superlink(workplace.supervisor, simulation=True)


@pytest.fixture(scope="module")
def config(home: Path, workplace: Workplace) -> RunConfig:
    model = save_site_model(home.parent / "model")
    for number in range(CLIENTS):
        write_texts(home.parent / f"{number}.jsonl", 12, number)
    config = RunConfig.from_flower(
        {
            "model": str(model),
            "data": str(home.parent / "{partition}.jsonl"),
            "dp": "client",
            "dp-noise-multiplier": 4.0,
            "trunk-adapter": "frozen",
            "metrics": "off",
            "num-rounds": 3,
            "cohort-size": CLIENTS,
            "quorum": CLIENTS - len(POOR),
            "local-steps": 1,
            "max-length": 16,
            "lora-r": 2,
            "target-modules": "q_proj",
        }
    )
    trunk = start_trunk(workplace, config, config.model)
    return config.model_copy(update={"trunk_address": trunk.address(workplace.supervisor)})


def unit(config: RunConfig, number: int) -> Unit:
    """Whose budget simulated client `number` spends; a dataset without a name is known by a hash of where it lies."""
    source = config.data.replace("{partition}", str(number))
    return Unit(f"client-{number}", f"data-{hashlib.sha256(source.encode()).hexdigest()[:12]}", "client")


def rounds_of(config: RunConfig, number: int, row: RunRow) -> list[int]:
    with closing(open_ledger()) as ledger:
        rows = list(ledger.rows(unit(config, number)))
    return [one.round for one in rows if one.run == row.run_id and one.state == "COMMITTED"]


def verify(home: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "trunkline", "budget", "verify"]
    environment = {**os.environ, "TRUNKLINE_HOME": str(home)}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def tampered(home: Path, place: Path, statement: str) -> Path:
    """A copy of a home, after somebody who can write to its database, and knows of its triggers, ran `statement`."""
    place.mkdir()
    shutil.copy(home / "ledger-key.pem", place)
    with closing(sqlite3.connect(home / "trunkline.db")) as connection:
        connection.execute("VACUUM INTO ?", (str(place / "trunkline.db"),))
    with closing(sqlite3.connect(place / "trunkline.db")) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        assert connection.execute(statement).rowcount == 1
        for _, sql in triggers:
            connection.execute(sql)
        connection.commit()
    return place


@pytest.mark.simulation
@pytest.mark.timeout(3 * LIMIT_S)
def test_budgets_run_out_a_second_run_goes_on_with_them_and_tampering_is_found(
    workplace: Workplace, superlink: SuperLinkAddress, config: RunConfig, home: Path, tmp_path: Path
) -> None:
    own = register_budget(config)
    one, two = (
        expected_spend(config.model_copy(update={"num_rounds": rounds}), scale=2.0**20, size=64)["orchestrator"]
        for rounds in (1, 2)
    )  # what scale and size add to a price is less than half the way to the next round's
    with closing(open_ledger()) as ledger:
        for number in POOR:
            budget = Budget((one + two) / 2, own.delta, own.order, own.gaussian_share)
            ledger.set_budget(unit(config, number), budget, "an operator", "a small one")

    first, log, told = played(workplace, superlink, config, "first", clients=CLIENTS)
    assert (first.status, first.committed_rounds) == ("finished", 3), log[-3000:]
    assert told.startswith("finished:completed")
    assert rounds_of(config, 0, first) == [1, 2, 3]
    assert [rounds_of(config, number, first) for number in POOR] == [[1], [1]]
    trained = [{part.node_id for part in open_reader().participations(first.run_id, number)} for number in (1, 2, 3)]
    assert [len(nodes) for nodes in trained] == [10, 8, 8]
    assert "over the budget of" in log
    assert "privacy: the trunk: no epsilon: the server can read the text" in log

    again = config.model_copy(update={"num_rounds": 1})
    second, log, _ = played(workplace, superlink, again, "second", clients=CLIENTS)
    assert (second.status, second.committed_rounds) == ("finished", 1), log[-3000:]
    assert [rounds_of(config, number, second) for number in (0, *POOR)] == [[1], [], []]
    with closing(open_ledger()) as ledger:
        standing = ledger.standing(unit(config, 0))
        assert {run: sum(counts.values()) for run, counts in standing.spent.items()} == {
            first.run_id: 3,
            second.run_id: 1,
        }
    sites = list((home / "simulated-ledgers").glob("*/ledger.db"))
    assert len(sites) == CLIENTS
    for path in sites:
        with closing(open_ledger(f"sqlite:///{path}")) as ledger:
            assert ledger.verify() == []
            assert ledger.peer_heads()

    assert verify(home)[0] == 0
    last = "SELECT max(rowid) FROM privacy_rows"
    first_charge = "SELECT min(rowid) FROM privacy_rows WHERE kind = 'charge'"
    for number, statement in enumerate(
        (
            f"DELETE FROM privacy_rows WHERE rowid = ({last})",
            f"UPDATE privacy_rows SET state = 'VOID' WHERE rowid = ({last})",
            f"UPDATE privacy_rows SET round = 7 WHERE rowid = ({first_charge})",
            f"DELETE FROM privacy_rows WHERE rowid = ({first_charge})",
        )
    ):
        code, said = verify(tampered(home, tmp_path / str(number), statement))
        assert code == 1, said
        assert "client-" in said
