"""The roster: which public key speaks for which client, as a file that its signer vouches for.

The file is two lines of JSON: the body, written in one way only (sorted names, no spaces), and the signature over
exactly the body's bytes. Its version only ever grows, so that an old file cannot bring back a client that was revoked.

    {"format":"trunkline-roster-1","issued_at":...,"members":{CLIENT_ID:"ed25519:..."},"signer":"ed25519:...","version":7}
    {"signature":"..."}
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from contract.durable_file import replace_file
from contract.errors import ConfigError, IntegrityError, StorageError
from contract.identity import KEY_BYTES, check_client_id, decode_public_key, public_key_text
from contract.public_file import read_public_file

FORMAT = "trunkline-roster-1"
MAX_ROSTER_BYTES = 4_000_000
MAX_VERSION = 2**53  # what every JSON reader keeps exactly

_SIGNED_AS = b"trunkline roster\x00"  # so that no signature over anything else is one over a roster
_FIELDS = {"format", "issued_at", "members", "signer", "version"}


@dataclass(frozen=True, slots=True)
class Roster:
    """Client ids with their Ed25519 public keys, 32 bytes each, and who says so: `signer` is a public key too.

    Raises ConfigError, naming the field, where it is no roster; ids and keys MUST each be there once.
    """

    version: int
    issued_at: datetime
    signer: bytes
    members: Mapping[str, bytes]

    def __post_init__(self) -> None:
        if isinstance(self.version, bool) or not 1 <= self.version <= MAX_VERSION:
            raise ConfigError(f"version is {self.version}; it must be a whole number from 1 on")
        if self.issued_at.tzinfo is None or self.issued_at.microsecond:
            raise ConfigError(f"issued_at is {self.issued_at.isoformat()}; it must be whole seconds, with a time zone")
        if len(self.signer) != KEY_BYTES:
            raise ConfigError(f"signer is of {len(self.signer)} bytes; a public key has {KEY_BYTES}")
        owners: dict[bytes, str] = {}
        for client_id, key in self.members.items():
            check_client_id(client_id, "a client id in members")
            if len(key) != KEY_BYTES:
                raise ConfigError(f"members.{client_id} is of {len(key)} bytes; a public key has {KEY_BYTES}")
            if key in owners:
                raise ConfigError(f"members.{client_id} and members.{owners[key]} have the same key")
            owners[key] = client_id
        object.__setattr__(self, "members", MappingProxyType(dict(sorted(self.members.items()))))


def signed_roster(roster: Roster, signing_key: Ed25519PrivateKey) -> bytes:
    """The file of `roster`. Raises ConfigError where the key is not its signer's, or the file would be too long."""
    if signing_key.public_key().public_bytes_raw() != roster.signer:
        raise ConfigError("the signing key is not that of the roster's signer")
    body = _canonical(_body_of(roster))
    data = _file_of(body, signing_key.sign(_SIGNED_AS + body))
    if len(data) > MAX_ROSTER_BYTES:
        raise ConfigError(f"the roster of {len(roster.members)} members is over {MAX_ROSTER_BYTES} bytes")
    return data


def write_roster(path: Path, roster: Roster, signing_key: Ed25519PrivateKey) -> None:
    """Write the signed roster to `path`: who reads meanwhile sees the old file or the new one, whole.

    Raises ConfigError as signed_roster, StorageError where the file cannot be written.
    """
    data = signed_roster(roster, signing_key)
    try:
        replace_file(path, data, mode=0o666)  # a roster is public
    except OSError as error:
        raise StorageError(f"cannot write the roster {path}: {error.strerror}") from error


def read_roster(path: Path, signer: bytes, at_least: int = 0) -> Roster:
    """The roster in the file `path`, signed by the owner of the public key `signer`.

    Raises IntegrityError, naming file and field, unless it is a whole roster with that signature and of a version not
    below `at_least`, the newest one that the reader has seen; ConfigError where the file cannot be read.
    """
    data = read_public_file(path, MAX_ROSTER_BYTES, "the roster")
    return parse_roster(data, signer, at_least, f"the roster {path}")


def parse_roster(data: bytes, signer: bytes, at_least: int = 0, name: str = "the roster") -> Roster:
    """As read_roster, from the file's bytes; `name` stands for the file in errors."""
    if len(data) > MAX_ROSTER_BYTES:
        raise IntegrityError(f"{name} is over {MAX_ROSTER_BYTES} bytes; no roster is that long")
    body, signature = _parts(data, name)
    try:
        Ed25519PublicKey.from_public_bytes(signer).verify(signature, _SIGNED_AS + body)
    except (InvalidSignature, ValueError) as error:
        raise IntegrityError(
            f"{name} is not signed by {public_key_text(signer)}: it was changed, or another key signed it"
        ) from error
    roster = _parsed_body(body, name)
    if roster.signer != signer:
        raise IntegrityError(f"{name}: signer is {public_key_text(roster.signer)}, not the one that signed it")
    if roster.version < at_least:
        raise IntegrityError(
            f"{name}: version is {roster.version}, but version {at_least} was seen before: it is an old one"
        )
    return roster


def _body_of(roster: Roster) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "issued_at": roster.issued_at.astimezone(UTC).isoformat(),
        "members": {client_id: public_key_text(key) for client_id, key in roster.members.items()},
        "signer": public_key_text(roster.signer),
        "version": roster.version,
    }


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def _file_of(body: bytes, signature: bytes) -> bytes:
    return body + b"\n" + _canonical({"signature": base64.b64encode(signature).decode("ascii")}) + b"\n"


def _parts(data: bytes, name: str) -> tuple[bytes, bytes]:
    """Body and signature of a file that is spelt as `_file_of` spells it."""
    body, _, rest = data.partition(b"\n")
    try:
        found = json.loads(rest)
        signature = base64.b64decode(found["signature"], validate=True)
    except (ValueError, RecursionError, TypeError, KeyError, binascii.Error) as error:
        raise IntegrityError(f"{name} is not signed: its second line is no signature") from error
    if _file_of(body, signature) != data:
        raise IntegrityError(f"{name} is not as it was written: its second line is no signature alone")
    return body, signature


def _parsed_body(body: bytes, name: str) -> Roster:
    try:
        found = json.loads(body, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{name} is no JSON: {error}") from error
    try:
        roster = _roster_of(found)
    except ConfigError as error:
        raise IntegrityError(f"{name}: {error}") from error
    if _canonical(_body_of(roster)) != body:
        raise IntegrityError(f"{name} is not spelt as a roster is: sorted names, no spaces, moments in UTC")
    return roster


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field, value in pairs:
        if field in found:
            raise ValueError(f"{field} is there twice")
        found[field] = value
    return found


def _roster_of(found: object) -> Roster:
    """Raises ConfigError, naming the field."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(f"format is not {FORMAT}")
    if found.keys() != _FIELDS:
        odd = ", ".join(sorted(found.keys() ^ _FIELDS))
        raise ConfigError(f"these fields are missing, or have no place in it: {odd}")
    version, members = found["version"], found["members"]
    if not isinstance(version, int):
        raise ConfigError(f"version is {version!r}; it must be a whole number from 1 on")
    if not isinstance(members, dict):
        raise ConfigError("members is no object of client ids and keys")
    try:
        issued_at = datetime.fromisoformat(_text(found["issued_at"], "issued_at"))
    except ValueError as error:
        raise ConfigError(f"issued_at is no moment: {error}") from error
    signer = decode_public_key(_text(found["signer"], "signer"), "signer")
    keys = {
        client_id: decode_public_key(_text(key, f"members.{client_id}"), f"members.{client_id}")
        for client_id, key in members.items()
    }
    return Roster(version, issued_at, signer, keys)


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{field} is no text")
    return value
