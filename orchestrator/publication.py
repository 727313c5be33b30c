"""Publishing the roster: SQL's list of identities as a signed file, never an older one over a newer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contract.errors import ConfigError, IntegrityError, StorageError
from contract.file_lock import take_lock
from contract.identity import decode_public_key, read_private_key
from contract.roster import Roster, read_roster, write_roster
from orchestrator.deeds import note_done
from storage.records import Deed, RosterRow
from storage.store import Store

LOCK_WAIT_S = 30.0
"""How long who publishes waits for others who do, of whom each takes a moment."""


@dataclass(frozen=True, slots=True)
class Publication:
    """Where the roster is published, and the key that signs it."""

    path: Path
    signing_key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def at(cls, path: Path, key_file: Path) -> Publication:
        """Raises ConfigError where there is no usable key, or no directory for the roster."""
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"there is no directory {path.absolute().parent} for the roster")
        return cls(path.absolute(), read_private_key(key_file))

    @property
    def signer(self) -> bytes:
        return self.signing_key.public_key().public_bytes_raw()

    def check(self, row: RosterRow) -> Roster | None:
        """What is published at the path now. Raises unless it is an earlier roster of this database and key, or none.

        ConfigError for a file that this key did not sign, StorageError for a roster that is ahead of the database.
        """
        if not self.path.exists():
            return None
        try:
            published = read_roster(self.path, self.signer)
        except IntegrityError as error:
            raise ConfigError(f"{error}; remove it, or publish under another name") from error
        same = published.version == row.version and dict(published.members) == _members(row)
        if published.version > row.version or (published.version == row.version and not same):
            raise StorageError(
                f"the roster {self.path} is version {published.version} of another list than the database's version "
                f"{row.version}: the database is an older copy, or another one; use the one that published it"
            )
        return published

    def publish(self, store: Store, now: datetime, operator: str) -> Roster:
        """Write the database's roster as it stands, unless it is published already; raises as `check` and write_roster.

        Operators who publish at the same time take turns, so that none puts an older list over a newer one.
        StorageError where this one's turn does not come within LOCK_WAIT_S seconds.
        """
        with _alone_at(self.path):
            row = store.roster()
            if row.version == 0:
                raise ConfigError("nobody was ever enrolled, so there is no roster yet: `trunkline clients enroll`")
            published = self.check(row)
            if published is not None and published.version == row.version:
                return published
            roster = Roster(row.version, now.replace(microsecond=0), self.signer, _members(row))
            write_roster(self.path, roster, self.signing_key)
            how = {"version": roster.version, "members": len(roster.members)}
            note_done(store, Deed(operator, "roster-published", str(self.path), how), "the roster is published")
            return roster


def _members(row: RosterRow) -> dict[str, bytes]:
    return {
        member.client_id: decode_public_key(member.public_key, f"the key of {member.client_id}")
        for member in row.members
    }


@contextmanager
def _alone_at(path: Path) -> Iterator[None]:
    """Hold the lock of the roster's directory; it ends with the process, whatever becomes of it."""
    try:
        descriptor = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise StorageError(f"cannot open {path.parent} for the roster: {error.strerror}") from error
    try:
        _take_lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _take_lock(descriptor: int, path: Path) -> None:
    try:
        had = take_lock(descriptor, LOCK_WAIT_S)
    except OSError as error:
        raise StorageError(f"cannot lock {path.parent} for the roster: {error.strerror}") from error
    if not had:
        raise StorageError(
            f"the roster {path} is not published: another process has held the lock of {path.parent} for "
            f"{LOCK_WAIT_S:g} s; stop it, or let it end, and publish again"
        )
