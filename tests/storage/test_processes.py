"""Several processes on one database: each drives its own run, and the commands read meanwhile."""

import subprocess
import sys

from storage.store import open_reader, open_store

ROUNDS = 5

# One ServerApp's life as the Store sees it; waits for the others at a line of standard input.
DRIVE = f"""
import sys
from storage.records import RoundCommit
from storage.store import open_store
url, run_id = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
store = open_store(url)
store.create_run(run_id, run_id, {{}}, "simulation", "f")
store.add_adapter_version(run_id, 0, "a" * 64, "b" * 64)
for number in range(1, {ROUNDS} + 1):
    attempt = store.open_round(run_id, number, ["1", "2", run_id])
    for steps in range(1, 9):
        store.record_progress(run_id, number, attempt, phase="train", replies=0, steps=steps, tokens=steps,
                              received_bytes=0, sent_bytes=0)
    for node_id in ("1", run_id):
        store.record_participation(run_id, number, attempt, node_id, "trained", metrics={{"train_loss": 1.0 / number}})
    store.add_event(run_id, "note", "a round is about to commit")
    store.commit_round(RoundCommit(run_id, number, attempt, "c" * 64, "d" * 64, 10, ["1", run_id], 0.1))
store.finish_run(run_id, "finished")
"""


def drive(url: str, run_id: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVE, url, run_id],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def start_together(drivers: list[subprocess.Popen[str]]) -> None:
    for driver in drivers:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
    for driver in drivers:
        assert driver.stdin is not None
        driver.stdin.write("\n")
        driver.stdin.flush()


def test_two_serverapps_create_and_share_one_database_while_a_command_reads_it(database_url: str) -> None:
    drivers = [drive(database_url, run_id) for run_id in ("r1", "r2")]
    try:
        start_together(drivers)
        open_store(database_url).close()
        reader = open_reader(database_url)
        reads = 0
        while any(driver.poll() is None for driver in drivers):
            for run in reader.list_runs():
                rounds = reader.rounds(run.run_id)
                committed = [row.number for row in rounds if row.status == "committed"]
                assert committed == list(range(1, len(committed) + 1))
                assert run.committed_rounds <= len(committed)
                reads += 1
        errors = [driver.communicate(timeout=60)[1] for driver in drivers]
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait(10)
    assert [driver.returncode for driver in drivers] == [0, 0], "\n".join(errors)
    assert reads > 0
    for run_id in ("r1", "r2"):
        run = reader.get_run(run_id)
        assert (run.status, run.committed_rounds) == ("finished", ROUNDS)
        assert len(reader.metrics(run_id)) == 2 * ROUNDS
    reader.close()


def test_a_writer_killed_in_the_middle_of_a_commit_leaves_the_round_open(database_url: str) -> None:
    """The process dies by SIGKILL inside the commit's transaction, after rows were written to it."""
    code = """
import os, signal, sys
from sqlalchemy import event
from storage.records import RoundCommit
from storage.store import open_store
store = open_store(sys.argv[1])
store.create_run("r1", "7", {}, "simulation", "f")
store.add_adapter_version("r1", 0, "a" * 64, "b" * 64)
store.open_round("r1", 1, ["1"])
@event.listens_for(store._engine, "commit")
def die(connection):
    os.kill(os.getpid(), signal.SIGKILL)
store.commit_round(RoundCommit("r1", 1, 1, "c" * 64, "d" * 64, 10, ["1"], 0.1))
"""
    done = subprocess.run([sys.executable, "-c", code, database_url], timeout=60, check=False)
    assert done.returncode == -9
    store = open_store(database_url)
    assert [row.status for row in store.rounds("r1")] == ["open"]
    assert [row.number for row in store.adapter_versions("r1")] == [0]
    assert store.open_round("r1", 1, ["1"]) == 2
    store.close()
