"""scripts/with-postgres gives a command a cluster of its own and takes it away however the command ends."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "with-postgres"

pytestmark = pytest.mark.skipif(
    not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")) and shutil.which("pg_ctl") is None,
    reason="no PostgreSQL server here; on Debian: apt-get install postgresql",
)


def directory_in(url: str) -> Path:
    return Path(url.strip().partition("host=")[2])


def test_the_commands_exit_code_is_kept_and_the_cluster_is_gone() -> None:
    command = (
        'echo "$TRUNKLINE_TEST_POSTGRES_URL"; test -S "${TRUNKLINE_TEST_POSTGRES_URL##*host=}/.s.PGSQL.5432"; exit 7'
    )
    done = subprocess.run([SCRIPT, "bash", "-ec", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 7, done.stderr
    assert directory_in(done.stdout).name.startswith("trunkline-pg.")
    assert not directory_in(done.stdout).exists()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_whole_and_the_cluster(sent: signal.Signals, code: int) -> None:
    command = 'echo "$TRUNKLINE_TEST_POSTGRES_URL"; echo $$; exec sleep 300'
    running = subprocess.Popen(
        [SCRIPT, "bash", "-c", command],
        stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_hear_interrupts,
    )  # fmt: skip
    try:
        assert running.stdout is not None
        directory, sleeper = directory_in(running.stdout.readline()), int(running.stdout.readline())
        assert directory.is_dir()
        running.send_signal(sent)
        assert running.wait(60) == code
    finally:
        running.terminate()
        running.communicate(timeout=60)
    assert not directory.exists()
    assert not Path(f"/proc/{sleeper}").exists() or "Z" in Path(f"/proc/{sleeper}/stat").read_text().split()[2]


def _hear_interrupts() -> None:
    """A test run that was started in the background ignores SIGINT, and so would everything below it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
