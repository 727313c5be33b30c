"""What a site keeps between two messages: durable, its owner's alone, and never played again once it has ended."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients import vault as vaults
from clients.vault import Vault
from contract.errors import SecureSumError, StorageError

SESSION, OTHER = bytes(range(32)), bytes(range(1, 33))
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(tmp_path / "of one site")


@pytest.fixture
def no_umask() -> Iterator[None]:
    """So that a mode is the program's own doing."""
    before = os.umask(0)
    yield
    os.umask(before)


def file_of(tmp_path: Path, session_id: bytes = SESSION) -> Path:
    return tmp_path / "of one site" / "sessions" / session_id.hex()


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


def open_ids(vault: Vault) -> list[bytes]:
    return [session_id for session_id, _, _ in vault.open_sessions()]


def test_what_was_kept_last_is_read_by_the_next_process(vault: Vault, tmp_path: Path) -> None:
    for state in (b"joined", b"shared"):
        vault.keep(SESSION, state)
        assert Vault(tmp_path / "of one site").read(SESSION) == state
    vault.keep(OTHER, b"another")
    assert vault.read(SESSION) == b"shared"


def test_a_session_that_was_never_joined_is_refused_by_its_id(vault: Vault) -> None:
    for _ in range(2):
        assert not vault.knows(SESSION)
        with pytest.raises(SecureSumError, match=f"session {SESSION.hex()[:12]}: this client has not joined it"):
            vault.read(SESSION)
        vault.keep(OTHER, b"another")


def test_a_finished_session_is_known_and_never_played_again(vault: Vault, tmp_path: Path) -> None:
    vault.keep(SESSION, b"a secret")
    vault.forget(SESSION)
    assert file_of(tmp_path).read_bytes() == b""
    for looked_at in (vault, Vault(tmp_path / "of one site")):
        assert looked_at.knows(SESSION)
        with pytest.raises(SecureSumError, match=f"session {SESSION.hex()[:12]} has ended .* not played again"):
            looked_at.read(SESSION)


def test_only_sessions_that_go_on_are_open(vault: Vault, tmp_path: Path) -> None:
    assert open_ids(vault) == []
    vault.keep(OTHER, b"another")
    vault.keep(SESSION, b"joined")
    (tmp_path / "of one site" / "sessions" / ".partial-0123456789abcdef").write_bytes(b"half of a state")
    os.utime(file_of(tmp_path), (0, 1))
    found = {session_id: (state, age_s) for session_id, state, age_s in vault.open_sessions()}
    assert {session_id: state for session_id, (state, _) in found.items()} == {SESSION: b"joined", OTHER: b"another"}
    assert found[SESSION][1] > 1e9
    assert -60 < found[OTHER][1] < 3600
    vault.forget(SESSION)
    assert open_ids(vault) == [OTHER]


@pytest.mark.usefixtures("no_umask")
def test_nobody_but_the_owner_can_read_what_is_kept(vault: Vault, tmp_path: Path) -> None:
    vault.keep(SESSION, b"a secret")
    vault.forget(OTHER)
    vault.note_roster(3)
    for path in (file_of(tmp_path), file_of(tmp_path, OTHER), tmp_path / "of one site" / "roster-version"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file_of(tmp_path).parent.stat().st_mode) == 0o700


def test_a_file_that_is_too_large_for_a_state_is_refused_by_name(vault: Vault, tmp_path: Path) -> None:
    vault.keep(SESSION, b"a state")
    os.truncate(file_of(tmp_path), (64 << 20) + 1)
    with pytest.raises(StorageError, match="has more than 67108864 bytes: it is no session's state") as refused:
        vault.read(SESSION)
    assert str(file_of(tmp_path)) in str(refused.value)


def test_a_full_disk_is_told_by_name_and_leaves_the_earlier_state(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault.keep(SESSION, b"joined")
    vault.note_roster(3)
    with monkeypatch.context() as patch:
        fill_the_disk(patch)
        for state in (b"shared", b""):
            with pytest.raises(StorageError, match="cannot be written: No space left on device") as refused:
                vault.keep(SESSION, state)
            assert str(file_of(tmp_path)) in str(refused.value)
        with pytest.raises(StorageError, match="roster-version: cannot be written: No space left on device"):
            vault.note_roster(4)
    assert (vault.read(SESSION), vault.roster_version()) == (b"joined", 3)
    assert [path.name for path in file_of(tmp_path).parent.iterdir()] == [SESSION.hex()]


def test_a_place_where_nothing_can_be_written_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "in the way").write_bytes(b"a file")
    vault = Vault(tmp_path / "in the way")
    with pytest.raises(StorageError, match="in the way/sessions/.*: cannot be"):
        vault.keep(SESSION, b"joined")
    with pytest.raises(StorageError, match="in the way/sessions/.*: cannot be read: Not a directory"):
        vault.read(SESSION)
    with pytest.raises(StorageError, match="in the way/roster-version: holds no version of a roster"):
        vault.note_roster(3)
    assert (tmp_path / "in the way").read_bytes() == b"a file"


def test_a_failure_between_write_and_rename_leaves_the_old_state_and_nothing_else(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault.keep(SESSION, b"joined")

    def interrupted(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vault.keep(SESSION, b"shared")
    assert vault.read(SESSION) == b"joined"
    assert [path.name for path in file_of(tmp_path).parent.iterdir()] == [SESSION.hex()]


def test_a_process_that_dies_between_write_and_rename_leaves_the_old_state(vault: Vault, tmp_path: Path) -> None:
    vault.keep(SESSION, b"joined")
    code = (
        "import os, sys, pathlib, clients.vault\n"
        "os.replace = lambda *_: os._exit(9)\n"
        "clients.vault.Vault(pathlib.Path(sys.argv[1])).keep(bytes(range(32)), b'shared')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "of one site")]
    assert subprocess.run(command, cwd=REPOSITORY, timeout=60, check=False).returncode == 9
    assert vault.read(SESSION) == b"joined"
    assert open_ids(vault) == [SESSION]
    vault.keep(SESSION, b"shared")
    assert vault.read(SESSION) == b"shared"


def test_the_roster_version_only_grows(vault: Vault, tmp_path: Path) -> None:
    assert vault.roster_version() == 0
    for noted, held in ((5, 5), (3, 5), (5, 5), (2**53, 2**53), (1, 2**53)):
        vault.note_roster(noted)
        assert Vault(tmp_path / "of one site").roster_version() == held


@pytest.mark.parametrize("damaged", [b"", b"-5", b"seven", b"7.5", b"\xff\xfe", b"7\x00"])
def test_a_damaged_roster_version_is_told_by_name_and_never_taken_for_none(
    vault: Vault, tmp_path: Path, damaged: bytes
) -> None:
    vault.note_roster(7)
    path = tmp_path / "of one site" / "roster-version"
    path.write_bytes(damaged)
    for act in (vault.roster_version, lambda: vault.note_roster(8)):
        with pytest.raises(StorageError, match="holds no version of a roster") as refused:
            act()
        assert str(path) in str(refused.value)
    assert path.read_bytes() == damaged


HOLDER = """
import pathlib, sys
from clients.vault import Vault

with Vault(pathlib.Path(sys.argv[1])).alone():
    print("held", flush=True)
    sys.stdin.read()
"""


def refused(vault: Vault, directory: Path) -> None:
    with pytest.raises(SecureSumError, match="two SuperNodes must not share one") as caught, vault.alone():
        pass
    assert f"the state-dir {directory}:" in str(caught.value)


def test_only_one_process_works_in_a_directory_and_a_killed_one_gives_it_up(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vaults, "LOCK_WAIT_S", 0.2)
    directory = tmp_path / "of one site"
    command = [sys.executable, "-c", HOLDER, str(directory)]
    holder = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        refused(vault, directory)
        with Vault(tmp_path / "of another site").alone():
            pass
    finally:
        holder.kill()
        holder.communicate()
    with vault.alone():
        refused(Vault(directory), directory)


def test_a_process_waits_for_the_one_before_it_to_end(vault: Vault, tmp_path: Path) -> None:
    entered, left = threading.Event(), threading.Event()

    def first() -> None:
        with vault.alone():
            entered.set()
            left.wait(0.3)

    worker = threading.Thread(target=first)
    worker.start()
    assert entered.wait(10)
    with Vault(tmp_path / "of one site").alone():
        worker.join()
    with pytest.raises(KeyError), vault.alone():
        raise KeyError
    with vault.alone():
        pass


@pytest.mark.usefixtures("no_umask")
def test_the_lock_is_its_owners_alone_and_keeps_out_nobody_who_is_in(vault: Vault, tmp_path: Path) -> None:
    with vault.alone():
        vault.keep(SESSION, b"joined")
        assert vault.read(SESSION) == b"joined"
    assert stat.S_IMODE((tmp_path / "of one site" / "lock").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "of one site").stat().st_mode) == 0o700
    (tmp_path / "in the way").write_bytes(b"a file")
    with (
        pytest.raises(StorageError, match="in the way/lock: cannot be opened: File exists"),
        Vault(tmp_path / "in the way").alone(),
    ):
        pass
