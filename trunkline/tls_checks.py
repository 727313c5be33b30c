"""The files that TLS to a trunk needs, where options or the environment name them."""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from contract.tls import VARIABLES
from trunkline.finding import DoubtfulError, NotReadyError, SkippedError

CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE = VARIABLES
LONGEST_FILE_BYTES = 1 << 20
LONGEST_CHAIN = 8
EARLY_DAYS = 30
"""How many days before its end a certificate is warned of."""


def check_tls(files: Mapping[str, Path | None]) -> str:
    """CA, certificate and private key, by VARIABLES, are there, belong together, and are valid for a while yet."""
    named = {name: file for name in VARIABLES if (file := files.get(name)) is not None}
    if not named:
        raise SkippedError(f"none of {', '.join(VARIABLES)} is set")
    if missing := [name for name in VARIABLES if name not in named]:
        raise NotReadyError(f"{', '.join(missing)} not set", "set all three, or none of them")
    authorities = _certificates(CA_VARIABLE, named[CA_VARIABLE])
    chain = _certificates(CERTIFICATE_VARIABLE, named[CERTIFICATE_VARIABLE])
    _require_key(named[KEY_VARIABLE], chain[0])
    if not _leads_to(chain, authorities):
        detail = f"{named[CERTIFICATE_VARIABLE]} is not signed by the CA in {named[CA_VARIABLE]}"
        raise NotReadyError(detail, f"have {CA_VARIABLE} name the CA that issued it")
    now = datetime.now(UTC)
    left = [_days_left(named[CERTIFICATE_VARIABLE], chain[0], now)]
    left += [_days_left(named[CA_VARIABLE], authority, now) for authority in authorities]
    told = f"the certificate is valid for {left[0]} days more, its CA for {min(left[1:])}"
    if min(left) < EARLY_DAYS:
        raise DoubtfulError(told, "have a new one issued before this one ends")
    return told


def _certificates(variable: str, path: Path) -> list[x509.Certificate]:
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST_FILE_BYTES)
        return x509.load_pem_x509_certificates(data)
    except OSError as error:
        raise NotReadyError(
            f"{variable}: cannot read {path}: {error.strerror}", f"have {variable} name a file"
        ) from None
    except ValueError:
        raise NotReadyError(f"{variable}: {path} holds no certificate", f"have {variable} name a PEM file") from None


def _require_key(path: Path, certificate: x509.Certificate) -> None:
    """Raise NotReadyError unless the file holds the certificate's private key, for its owner alone."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        with path.open("rb") as file:
            data = file.read(LONGEST_FILE_BYTES)
    except OSError as error:
        detail = f"{KEY_VARIABLE}: cannot read {path}: {error.strerror}"
        raise NotReadyError(detail, f"have {KEY_VARIABLE} name a file") from None
    if mode & 0o077:
        raise NotReadyError(f"{path} can be read or written by others (mode {mode:o})", f"run `chmod 600 {path}`")
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        detail = f"{KEY_VARIABLE}: {path} holds no private key without a password"
        raise NotReadyError(detail, f"have {KEY_VARIABLE} name a PEM file of the certificate's key") from None
    ours, its = (
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        for public in (key.public_key(), certificate.public_key())
    )
    if ours != its:
        raise NotReadyError(f"{path} is the key of another certificate", f"have {KEY_VARIABLE} name the right one")


def _leads_to(chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]) -> bool:
    """Whether the first certificate was issued by an authority, or by others of the chain that lead to one."""
    current, others = chain[0], list(chain[1:])
    for _ in range(LONGEST_CHAIN):
        if any(_issued(current, authority) for authority in authorities):
            return True
        above = next((other for other in others if _issued(current, other)), None)
        if above is None:
            return False
        others.remove(above)
        current = above
    return False


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _days_left(path: Path, certificate: x509.Certificate, now: datetime) -> int:
    """Whole days that it is valid yet. Raises NotReadyError where it is not valid now."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        raise NotReadyError(f"{path} is valid from {begins:%Y-%m-%d %H:%M} UTC on only", "see this machine's clock")
    if now >= ends:
        raise NotReadyError(f"{path} expired on {ends:%Y-%m-%d %H:%M} UTC", "have a new one issued")
    return (ends - now).days
