"""X.509 certificates of the parties of a run: whom one speaks for, and whether it is good.

A certificate says what its owner is by one URI among its subject alternative names, `urn:trunkline:ROLE:NAME`, whoever
signed it: `trunkline pki` for development, an organisation's own certificate authority otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import sha256
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from contract.errors import ConfigError
from contract.identity import check_client_id, private_key_of
from contract.private_file import read_private_file
from contract.public_file import read_public_file

URN = "urn:trunkline:"
MAX_CERTIFICATE_BYTES = 1 << 20
LONGEST_CHAIN = 8


class Role(StrEnum):
    """What a certificate's owner is. `superlink` is Flower's server, for the sites' TLS to it."""

    TRUNK = "trunk"
    CLIENT = "client"
    ORCHESTRATOR = "orchestrator"
    OPERATOR = "operator"
    SUPERLINK = "superlink"


SERVERS = frozenset({Role.TRUNK, Role.SUPERLINK})


@dataclass(frozen=True, slots=True)
class Party:
    """Whom a certificate speaks for."""

    role: Role
    name: str


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What a certificate says; `role` and `name` are empty where it names none, or not in the one way.

    `key_sha256` is of its public key (SubjectPublicKeyInfo), in hex.
    """

    role: str
    name: str
    hosts: tuple[str, ...]
    valid_from: datetime
    valid_until: datetime
    subject: str
    issuer: str
    authority: bool
    key_sha256: str


def urn_of(party: Party) -> str:
    """The name by which a certificate says whom it speaks for."""
    return f"{URN}{party.role.value}:{party.name}"


def party_of(certificate: x509.Certificate, name: str = "the certificate") -> Party:
    """Whom it speaks for. Raises ConfigError, in which `name` stands for it, unless one role is named, in one way."""
    named = [uri for uri in _alternative_names(certificate, x509.UniformResourceIdentifier) if uri.startswith(URN)]
    wanted = f"it must have one subject alternative name {URN}ROLE:NAME, ROLE one of {', '.join(Role)}"
    if len(named) != 1:
        raise ConfigError(f"{name} names {'no role' if not named else f'{len(named)} roles'}; {wanted}")
    role, _, owner = named[0].removeprefix(URN).partition(":")
    if role not in set(Role):
        raise ConfigError(f"{name} names the role {role[:80]!r}; {wanted}")
    return Party(Role(role), check_client_id(owner, f"the name in {name}"))


def facts_of(certificate: x509.Certificate) -> CertificateFacts:
    """What a person wants to know of it."""
    role = name = ""
    try:
        party = party_of(certificate)
        role, name = party.role.value, party.name
    except ConfigError:  # an organisation's CA, or a certificate for something else
        pass
    return CertificateFacts(
        role=role,
        name=name,
        hosts=(*_alternative_names(certificate, x509.DNSName), *_alternative_names(certificate, x509.IPAddress)),
        valid_from=certificate.not_valid_before_utc,
        valid_until=certificate.not_valid_after_utc,
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        authority=is_authority(certificate),
        key_sha256=key_sha256(certificate),
    )


def key_sha256(certificate: x509.Certificate) -> str:
    """The SHA-256 of the public key that it is about, in hex: a new certificate for the same key has it too."""
    public = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return sha256(public).hexdigest()


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether it may sign others."""
    try:
        return bool(certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
    except (x509.ExtensionNotFound, ValueError):
        return False


def read_certificates(path: Path) -> list[x509.Certificate]:
    """The certificates in the PEM file `path`, one at least. Raises ConfigError, naming the file."""
    return parse_certificates(read_certificate_file(path), str(path))


def read_certificate_file(path: Path) -> bytes:
    """What is in a file of certificates. Raises ConfigError, naming it, where it cannot be read or is too long."""
    data = read_public_file(path, MAX_CERTIFICATE_BYTES, "the certificate")
    if len(data) > MAX_CERTIFICATE_BYTES:
        raise ConfigError(f"{path} is over {MAX_CERTIFICATE_BYTES} bytes; no certificate is that long")
    return data


def parse_certificates(pem: bytes, name: str) -> list[x509.Certificate]:
    """The certificates in `pem`, one at least. Raises ConfigError, in which `name` stands for it."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{name} holds no certificate in PEM") from None


def require_current(certificate: x509.Certificate, name: str, now: datetime) -> None:
    """Raise ConfigError, in which `name` stands for it, for a certificate that is not good at the moment `now`."""
    starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < starts:
        raise ConfigError(f"{name} is not valid before {told_moment(starts)}, and it is {told_moment(now)} here")
    if now > ends:
        raise ConfigError(f"{name} expired at {told_moment(ends)}: get a new one")


def require_signed_by(chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate], name: str) -> None:
    """Raise ConfigError unless one of `authorities` signed the first of `chain`, by way of the others perhaps."""
    found, left = chain[0], list(chain[1:])
    for _ in range(LONGEST_CHAIN):
        if any(_signed(found, authority) for authority in authorities):
            return
        between = next((one for one in left if is_authority(one) and _signed(found, one)), None)
        if between is None:
            break
        left.remove(between)
        found = between
    signer = found.issuer.rfc4514_string() or "somebody without a name"
    raise ConfigError(f"{name} is not signed by the certificate authority, but by {signer}")


def read_tls_key(path: Path, certificate: x509.Certificate, certificate_name: str) -> bytes:
    """The private key in the PEM file `path`, as it stands there.

    Raises ConfigError, naming the file and never what is in it, for a key that is not that of `certificate`, that is
    encrypted, or that others than its owner can read.
    """
    pem = read_private_file(path)
    public = private_key_of(pem, path).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if sha256(public).hexdigest() != key_sha256(certificate):
        raise ConfigError(f"the key in {path} is not that of the certificate {certificate_name}")
    return pem


def told_moment(moment: datetime) -> str:
    """A moment as errors tell it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _alternative_names(
    certificate: x509.Certificate, kind: type[x509.DNSName | x509.IPAddress | x509.UniformResourceIdentifier]
) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [str(value) for value in names.get_values_for_type(kind)]


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
