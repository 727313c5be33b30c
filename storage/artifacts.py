"""Adapters and other artifacts as files named by their SHA-256, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from contract.durable_file import GrowingFile, replace_file
from contract.errors import IntegrityError, StorageError

_SHA256 = re.compile(r"[0-9a-f]{64}")


class ArtifactStore:
    """A directory of content-addressed safetensors files. Safe for several processes: equal names hold equal bytes."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, data: bytes) -> str:
        """Store `data` durably and answer its SHA-256 in hex.

        Raises StorageError when it cannot be written, a full disk included; the directory is then as it was.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        final = self.path(sha256)
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._holds(final, data):
                os.utime(final)  # what is about to be committed is young, however old its bytes are: see orphans
            else:
                replace_file(final, data)
        except OSError as error:
            raise StorageError(f"cannot write artifact {final}: {error.strerror}") from error
        return sha256

    def begin(self) -> Receiving:
        """An artifact that comes bit by bit. Raises StorageError."""
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            return Receiving(self, GrowingFile(self._root))
        except OSError as error:
            raise StorageError(f"cannot write to {self._root}: {error.strerror}") from error

    def get(self, sha256: str) -> bytes:
        """The bytes with this hash. Raises StorageError when they are not here, IntegrityError when they changed."""
        path = self.path(sha256)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise StorageError(f"there is no artifact {sha256} in {self._root}") from error
        except OSError as error:
            raise StorageError(f"cannot read artifact {path}: {error.strerror}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise IntegrityError(f"artifact {path} hashes to {found}: it was changed or cut short after it was written")
        return data

    def use(self, sha256: str) -> None:
        """Note that it is used now. Raises StorageError when it is not here."""
        path = self.path(sha256)
        try:
            os.utime(path)
        except OSError as error:
            raise StorageError(f"cannot note the use of artifact {path}: {error.strerror}") from error

    def unused(self, since_s: float) -> list[str]:
        """The hashes of those that were neither put nor used since `since_s`, by the clock. Raises StorageError."""
        try:
            found = sorted(self._root.glob("*.safetensors"))
            return [path.stem for path in found if _SHA256.fullmatch(path.stem) and path.stat().st_mtime < since_s]
        except OSError as error:
            raise StorageError(f"{self._root} cannot be read: {error.strerror}") from error

    def remove(self, sha256: str) -> None:
        """Have it here no more; it need not have been. Raises StorageError."""
        path = self.path(sha256)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{path} cannot be removed: {error.strerror}") from error

    def has(self, sha256: str) -> bool:
        """Whether a file of this name is here; `get` alone says whether it is whole."""
        return self.path(sha256).is_file()

    def path(self, sha256: str) -> Path:
        """Where the artifact lies or would lie. Raises StorageError on what is no SHA-256 in hex."""
        if not _SHA256.fullmatch(sha256):
            raise StorageError(f"{sha256[:80]!r} is no artifact: it must be 64 lower-case hexadecimal digits")
        return self._root / f"{sha256}.safetensors"

    @staticmethod
    def _holds(final: Path, data: bytes) -> bool:
        try:
            return final.read_bytes() == data
        except FileNotFoundError:
            return False


class Receiving:
    """An artifact on its way to the disk, hashed as it comes. It must be kept or abandoned. Raises StorageError."""

    def __init__(self, store: ArtifactStore, file: GrowingFile) -> None:
        self._store = store
        self._file = file
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of what has come."""
        return self._digest.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise StorageError(f"cannot write {self._file.path}: {error.strerror}") from error

    def flushed(self) -> Path:
        """Where what has come can be read."""
        try:
            self._file.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self._file.path}: {error.strerror}") from error
        return self._file.path

    def keep(self) -> str:
        """Store it under its hash, durably, and answer that."""
        final = self._store.path(self.sha256)
        try:
            self._file.keep(final)
        except OSError as error:
            raise StorageError(f"cannot write artifact {final}: {error.strerror}") from error
        return self.sha256

    def abandon(self) -> None:
        self._file.abandon()
