"""Ed25519 keys of this installation's own: each is made in the home on first use, and stays there."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contract.errors import ConfigError, StorageError
from contract.identity import create_private_key, read_private_key


def open_home_key(place: Path, whose: str) -> Ed25519PrivateKey:
    """The key in the file `place`, made there where there is none yet; `whose` it is, in errors.

    Raises ConfigError where there is no usable key, StorageError where there can be no directory for it.
    """
    if not place.exists():
        try:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {place.parent} for {whose} key: {error.strerror}") from error
        try:
            create_private_key(place)
        except ConfigError:
            if not place.exists():  # another process made it meanwhile: then it is as good as ours
                raise
    return read_private_key(place)
