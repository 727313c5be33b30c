"""A disk that fills up, for real: SQL and artifacts stay as they were, and go on once there is room.

The disk is a tmpfs of one megabyte in a mount namespace of its own. Where the system forbids that, a limit on the size
of files stands in: the same writes fail, with another error number.
"""

import subprocess
import sys
from pathlib import Path

import pytest

# Runs in a process of its own; `fill` and `free` come from one of the two disks below.
SCENARIO = """
from pathlib import Path
from contract.errors import StorageError
from storage.artifacts import ArtifactStore
from storage.records import RoundCommit
from storage.store import open_store

def refused(action):
    try:
        action()
    except StorageError as error:
        assert "\\n" not in str(error), error
        return str(error)
    raise AssertionError("the full disk was not noticed")

store = open_store(f"sqlite:///{disk / 'trunkline.db'}")
artifacts = ArtifactStore(disk / "artifacts")
store.create_run("r1", "7", {}, "simulation", "f")
first = artifacts.put(b"v0" * 100)
store.add_adapter_version("r1", 0, first, first)
store.open_round("r1", 1, ["1", "2"])
reads = lambda: [store.get_run("r1"), store.rounds("r1"), store.participations("r1"),
                 store.adapter_versions("r1"), store.metrics("r1"), store.events()]
files = lambda: sorted((path.name, path.read_bytes()) for path in (disk / "artifacts").iterdir())
before, files_before = reads(), files()
big = {f"metric {index}": float(index) for index in range(300)}
commit = RoundCommit("r1", 1, 1, first, first, 10, ["1"], 0.1, metrics=big)

fill()
print(refused(lambda: artifacts.put(b"v1" * 200_000)))
assert files() == files_before, "the artifacts changed"
print(refused(lambda: store.commit_round(commit)))
assert reads() == before, "SQL changed"

free()
assert artifacts.get(artifacts.put(b"v1" * 100)) == b"v1" * 100
store.commit_round(commit)
assert store.get_run("r1").committed_rounds == 1 and len(store.metrics("r1")) == 300
"""

SMALL_DISK = """
import sys
from pathlib import Path
disk = Path(sys.argv[1])
def fill():
    with open(disk / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)): pass
        except OSError as error:
            assert error.errno == 28, error
def free():
    (disk / "filler").unlink()
"""

LIMITED_FILES = """
import resource, signal, sys
from pathlib import Path
disk = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def fill():
    resource.setrlimit(resource.RLIMIT_FSIZE, ((disk / "trunkline.db-wal").stat().st_size, resource.RLIM_INFINITY))
def free():
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def run(command: list[str], code: str, disk: Path) -> subprocess.CompletedProcess[str]:
    argv = [*command, sys.executable, "-c", code, str(disk)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_a_full_disk_leaves_sql_and_artifacts_as_they_were(tmp_path: Path) -> None:
    size = "size=1m"
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount += [f'mount -t tmpfs -o {size} none "$0" && exec "$@"', str(tmp_path)]
    try:
        allowed = subprocess.run([*mount, "true"], capture_output=True, timeout=20, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this system lets no user mount a small disk; the test by a limit on file sizes stands in")
    done = run(mount, SMALL_DISK + SCENARIO, tmp_path)
    assert done.returncode == 0, done.stderr
    artifact, commit = done.stdout.splitlines()
    assert "No space left on device" in artifact
    assert "database or disk is full" in commit


def test_writes_that_fail_half_way_leave_sql_and_artifacts_as_they_were(tmp_path: Path) -> None:
    done = run([], LIMITED_FILES + SCENARIO, tmp_path)
    assert done.returncode == 0, done.stderr
    artifact, commit = done.stdout.splitlines()
    assert "File too large" in artifact
    assert "disk" in commit
