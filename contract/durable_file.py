"""A file that is there whole and durably, or not at all."""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

from contract.failpoint import failpoint

PARTIAL_PREFIX = ".partial-"
"""How a file is called before it is whole; a killed process may leave one behind."""


def replace_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write `data` to `path`: who reads meanwhile sees the old file or the new one, and a crash leaves one of them.

    A failure raises OSError and leaves the directory as it was. `mode` is that of a new file, less the umask.
    """
    failpoint("file.write")
    partial = _write_partial(path, data, mode)
    failpoint("file.rename")
    try:
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    _sync_directory(path.parent)
    failpoint("file.written")


def settle_file(partial: Path, path: Path) -> None:
    """Let `partial`, a whole file beside `path` that another program wrote, be what is at `path`, durably.

    Its name begins with PARTIAL_PREFIX. A failure raises OSError.
    """
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    failpoint("file.rename")
    os.replace(partial, path)
    _sync_directory(path.parent)
    failpoint("file.written")


def remove_partials(directory: Path, older_than_s: float) -> int:
    """Remove, below `directory`, what killed processes left half written; how many files that were.

    What is younger may be some other process's that is about to be whole. Raises OSError.
    """
    found = 0
    for path in directory.rglob(f"{PARTIAL_PREFIX}*"):
        with suppress(FileNotFoundError):  # whole by now, or removed by another one that looks, too
            if time.time() - path.stat().st_mtime > older_than_s:
                path.unlink()
                found += 1
    return found


def create_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write `data` to `path` where nothing is: a crash leaves it whole or not there, and never half of it.

    A failure raises OSError, FileExistsError where there is anything at `path`, and leaves the directory as it was.
    """
    failpoint("file.write")
    partial = _write_partial(path, data, mode)
    failpoint("file.rename")
    try:
        os.link(partial, path)  # unlike a rename it replaces nothing
    finally:
        partial.unlink(missing_ok=True)
    try:
        _sync_directory(path.parent)
    except BaseException:
        path.unlink()
        raise
    failpoint("file.written")


class GrowingFile:
    """A new file in a folder, written bit by bit: it is at its place once it is whole, and a crash leaves it nowhere.

    Everything raises OSError.
    """

    def __init__(self, folder: Path, mode: int = 0o600) -> None:
        self.path = folder / f"{PARTIAL_PREFIX}{secrets.token_hex(8)}"
        self._file = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb")

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)

    def flush(self) -> None:
        """Have it whole on the disk, so that it may be read, and kept."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def keep(self, path: Path) -> None:
        """Durably at `path`, where it replaces what is there, in the same folder."""
        failpoint("file.write")
        self.flush()
        self._file.close()
        failpoint("file.rename")
        os.replace(self.path, path)
        _sync_directory(path.parent)
        failpoint("file.written")

    def abandon(self) -> None:
        """Remove it, unless it was kept."""
        try:
            self._file.close()
        finally:
            self.path.unlink(missing_ok=True)


def _write_partial(path: Path, data: bytes, mode: int) -> Path:
    """A new file beside `path` that holds `data`, durably."""
    partial = path.parent / f"{PARTIAL_PREFIX}{secrets.token_hex(8)}"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(partial)
        raise
    return partial


def _sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable, which their files' own fsync does not."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
