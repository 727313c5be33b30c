"""Who somebody is: a client's id, its Ed25519 public key as one line of text, and its private key as a file.

The text of a public key is `ed25519:` and base64 of its 32 bytes. A private key is unencrypted PKCS #8 in PEM, in a
file that its owner alone can read.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from contract.durable_file import create_file
from contract.errors import ConfigError
from contract.private_file import read_private_file

KEY_BYTES = 32
KEY_PREFIX = "ed25519:"

_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PRIME = 2**255 - 19
_CURVE_D = -121665 * pow(121666, -1, _PRIME) % _PRIME


def check_client_id(client_id: str, field: str = "client id") -> str:
    """`client_id`, or ConfigError: 1 to 64 ASCII letters, digits, dots, dashes and underscores, no sign first."""
    if not _CLIENT_ID.fullmatch(client_id):
        raise ConfigError(
            f"{field} is {client_id[:80]!r}; it must be 1 to 64 letters, digits, dots, dashes or underscores, "
            "and begin with a letter or a digit"
        )
    return client_id


def public_key_text(public_key: bytes) -> str:
    """The one line that stands for a public key everywhere: `ed25519:` and base64."""
    return KEY_PREFIX + base64.b64encode(public_key).decode("ascii")


def decode_public_key(text: str, field: str) -> bytes:
    """The 32 bytes that `public_key_text` wrote. Raises ConfigError, naming `field`, for anything else."""
    wanted = f"it must be {KEY_PREFIX} and base64 of 32 bytes, as `trunkline clients keygen` prints it"
    if "PRIVATE KEY" in text:
        raise ConfigError(f"{field} holds a private key, which must not leave its file; {wanted}")
    if not text.startswith(KEY_PREFIX):
        raise ConfigError(f"{field} does not begin with {KEY_PREFIX}; {wanted}")
    try:
        decoded = base64.b64decode(text.removeprefix(KEY_PREFIX), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"{field} is not base64; {wanted}") from error
    if len(decoded) != KEY_BYTES:
        raise ConfigError(f"{field} is of {len(decoded)} bytes; {wanted}")
    if public_key_text(decoded) != text:  # base64 has several spellings of the same bytes
        raise ConfigError(f"{field} is not base64 as it is written; {wanted}")
    return decoded


def parse_public_key(text: str, field: str = "public key") -> bytes:
    """As decode_public_key, for a key that nobody has vouched for: it must also be one that can identify its owner.

    Refused besides: 32 bytes that are no point of the curve, and the few points of small order, under which anybody can
    sign anything. Both are placeholders or damage, never a generated key.
    """
    decoded = decode_public_key(text.strip(), field)
    y = int.from_bytes(decoded, "little") & (2**255 - 1)
    y2 = y * y % _PRIME
    on_curve = y < _PRIME and pow((y2 - 1) * (_CURVE_D * y2 + 1), (_PRIME - 1) // 2, _PRIME) in (0, 1)
    small_order = y in (0, 1, _PRIME - 1) or (_CURVE_D * y2 * y2 + 2 * y2 - 1) % _PRIME == 0
    if not on_curve or small_order:
        raise ConfigError(
            f"{field} is no Ed25519 key that can identify anybody; make one with `trunkline clients keygen`"
        )
    return decoded


def create_private_key(path: Path) -> bytes:
    """Make a new private key in the file `path`, which only its owner can read, and answer its public key.

    Raises ConfigError where there is something at `path` already, or where no file can be made there.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        create_file(path, pem, 0o600)  # half a key would stand in the way of a whole one
    except FileExistsError as error:
        raise ConfigError(f"there is a file {path} already; a key is never overwritten") from error
    except OSError as error:
        raise ConfigError(f"cannot make the key file {path}: {error.strerror}") from error
    return key.public_key().public_bytes_raw()


def private_key_of(pem: bytes, path: Path, remedy: str = "") -> PrivateKeyTypes:
    """The private key in what was read from `path`. Raises ConfigError for one that is encrypted, or where none is.

    The latter ends in `remedy`.
    """
    try:
        return load_pem_private_key(pem, password=None)
    except TypeError:
        raise ConfigError(f"the key in {path} is encrypted; it must be a PEM file without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} holds no private key in PEM{remedy}") from None


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """The private key in the file `path`. Raises ConfigError, naming the file and never what is in it.

    Refused: what is no Ed25519 key in PEM, and a file that its group or others can read or write.
    """
    remedy = "; make one with `trunkline clients keygen`"
    key = private_key_of(read_private_file(path), path, remedy)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"the key in {path} is no Ed25519 key{remedy}")
    return key
