"""What a site keeps between two messages of a secure sum: each open session's secrets, and how new a roster it saw.

A deployment starts a new process for every message. The files are the owner's alone (mode 0600) and durable before what
they answer for is sent. A finished session leaves an empty file behind, so that it is never played again. What a file
system or a disk keeps of a file that was replaced is beyond this.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from contract.durable_file import PARTIAL_PREFIX, replace_file
from contract.errors import SecureSumError, StorageError
from contract.file_lock import take_lock

_LARGEST_BYTES = 64 << 20
_ID_BYTES = 32
LOCK_WAIT_S = 5.0
"""How long a process waits for the one before it, which may still be about to end."""


class Vault:
    """One site's files under `directory`; made when something is kept. Raises StorageError where the disk refuses."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the directory against every other process; the lock ends with the process.

        Two that raced through a session's last stages, each from the state before, could together give away both a seed
        and a masking key. Raises SecureSumError where another process holds the directory.
        """
        descriptor = self._open_lock()
        try:
            self._take_lock(descriptor)
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child process that was forked may hold the file open
            os.close(descriptor)

    def keep(self, session_id: bytes, state: bytes) -> None:
        """Make `state` durable, in place of what was kept of the session before.

        Raises SecureSumError for a session that has ended here.
        """
        path = self._path(session_id)
        if self.knows(session_id) and not self._status(path).st_size:
            raise _ended(session_id)
        self._write(path, state)

    def read(self, session_id: bytes) -> bytes:
        """The session's state. Raises SecureSumError where this site has not joined it, or has ended it."""
        path = self._path(session_id)
        if not self.knows(session_id):
            raise SecureSumError(f"session {_short(session_id)}: this client has not joined it")
        state = self._read(path)
        if not state:
            raise _ended(session_id)
        return state

    def knows(self, session_id: bytes) -> bool:
        """Whether the session was ever joined here."""
        path = self._path(session_id)
        try:
            path.stat()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _unreadable(path, error) from error
        return True

    def forget(self, session_id: bytes) -> None:
        """Leave nothing of the session but that it was."""
        self._write(self._path(session_id), b"")

    def sweep(self) -> None:
        """Remove what a killed process left half written. To be called by the process that is `alone`."""
        for directory in (self._directory, self._directory / "sessions"):
            for path in directory.glob(f"{PARTIAL_PREFIX}*"):
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise StorageError(f"{path}: cannot be removed: {error.strerror}") from error

    def open_sessions(self) -> Iterator[tuple[bytes, bytes, float]]:
        """Each session that has not ended: its id, its state, and the seconds since it was kept."""
        for path in sorted((self._directory / "sessions").glob("[0-9a-f]" * 64)):
            found = self._status(path)
            if found.st_size:
                yield bytes.fromhex(path.name), self._read(path), time.time() - found.st_mtime

    def roster_version(self) -> int:
        """The newest roster that this site has seen, 0 before the first."""
        try:
            told = self._roster_path.read_text(encoding="ascii")
        except FileNotFoundError:
            return 0
        except (OSError, UnicodeError) as error:
            raise StorageError(f"{self._roster_path}: holds no version of a roster: {error}") from error
        if not told.isdigit():
            raise StorageError(f"{self._roster_path}: holds no version of a roster: {told[:20]!r}")
        return int(told)

    def note_roster(self, version: int) -> None:
        """Remember, durably, that a roster of this version was seen: no older one will do from now on."""
        if version > self.roster_version():
            self._write(self._roster_path, str(version).encode())

    @property
    def _roster_path(self) -> Path:
        return self._directory / "roster-version"

    def _open_lock(self) -> int:
        path = self._directory / "lock"
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StorageError(f"{path}: cannot be opened: {error.strerror}") from error

    def _take_lock(self, descriptor: int) -> None:
        try:
            had = take_lock(descriptor, LOCK_WAIT_S)
        except OSError as error:
            raise StorageError(f"the state-dir {self._directory} cannot be locked: {error.strerror}") from error
        if not had:
            raise SecureSumError(
                f"another process works in the state-dir {self._directory}: two SuperNodes must not share one, "
                "nor one identity-key; stop the other, or let it end"
            )

    def _path(self, session_id: bytes) -> Path:
        if len(session_id) != _ID_BYTES:
            raise SecureSumError(f"a session's id has {_ID_BYTES} bytes, not {len(session_id)}")
        return self._directory / "sessions" / session_id.hex()

    def _status(self, path: Path) -> os.stat_result:
        try:
            return path.stat()
        except OSError as error:
            raise _unreadable(path, error) from error

    def _read(self, path: Path) -> bytes:
        if self._status(path).st_size > _LARGEST_BYTES:
            raise StorageError(f"{path} has more than {_LARGEST_BYTES} bytes: it is no session's state")
        try:
            return path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from error

    def _write(self, path: Path, data: bytes) -> None:
        try:
            for directory in (self._directory, path.parent):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(path, data)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error


def _short(session_id: bytes) -> str:
    return session_id.hex()[:12]


def _ended(session_id: bytes) -> SecureSumError:
    return SecureSumError(f"session {_short(session_id)} has ended for this client: it is not played again")


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: cannot be read: {error.strerror}")
