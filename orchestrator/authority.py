"""A certificate authority for development: a few files in a directory, made by `trunkline pki`.

Whoever has its key can be any party of a run, so that it belongs on the machine of one person who tries things out. An
organisation's own certificate authority takes its place by writing the same names (contract.certificates).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from contract.certificates import (
    SERVERS,
    Party,
    is_authority,
    read_certificates,
    read_tls_key,
    require_current,
    told_moment,
    urn_of,
)
from contract.durable_file import create_file
from contract.errors import ConfigError
from contract.identity import check_client_id, private_key_of

CA_CERTIFICATE, CA_KEY = "ca.pem", "ca.key"
MAX_DAYS = 36_500

_CLOCKS_APART = timedelta(minutes=5)
"""How long before it was made a certificate is good: the clocks of those that check it may be behind."""
_ALWAYS = ("localhost", "127.0.0.1")
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority that lies in two files of `directory`."""

    directory: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def create_authority(directory: Path, now: datetime, days: int) -> Authority:
    """Make a certificate authority in `directory`, which is made if need be, for its owner alone.

    Raises ConfigError where there is one already, or the directory cannot be used.
    """
    _check_days(days)
    _make_private(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("trunkline development CA")
    builder = _builder(name, name, key.public_key(), now, now + timedelta(days=days))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    _write_pair(directory / CA_CERTIFICATE, directory / CA_KEY, certificate, key)
    return Authority(directory, certificate, key)


def open_authority(directory: Path) -> Authority:
    """The certificate authority that create_authority made in `directory`. Raises ConfigError, naming the file."""
    path = directory / CA_CERTIFICATE
    if not path.exists():
        raise ConfigError(f"there is no certificate authority in {directory}: make one with `trunkline pki init`")
    certificate = read_certificates(path)[0]
    pem = read_tls_key(directory / CA_KEY, certificate, str(path))
    key = private_key_of(pem, directory / CA_KEY)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not is_authority(certificate):
        raise ConfigError(f"{path} is no certificate authority that `trunkline pki init` made")
    return Authority(directory, certificate, key)


def issue(authority: Authority, party: Party, hosts: Sequence[str], now: datetime, days: int) -> x509.Certificate:
    """Make NAME.pem and NAME.key beside the authority's files: a certificate for `party`, good for `days` from `now`.

    A server's names `hosts`, and this machine itself in any case. Raises ConfigError for a host that is none, for hosts
    of who is no server, where the authority ends sooner, and where there is such a file already.
    """
    _check_days(days)
    check_client_id(party.name, "NAME")
    if f"{party.name}.pem" == CA_CERTIFICATE:
        raise ConfigError("NAME is ca, which is what the authority's own files are called; choose another")
    if hosts and party.role not in SERVERS:
        servers = " and ".join(sorted(role.value for role in SERVERS))
        raise ConfigError(f"--host is given, but a certificate of role {party.role.value} has none; {servers} have")
    require_current(authority.certificate, str(authority.directory / CA_CERTIFICATE), now)
    last = authority.certificate.not_valid_after_utc
    ends = now + timedelta(days=days)
    if ends > last + timedelta(days=1):  # what is shorter is the time since the authority was made for as many days
        raise ConfigError(f"days is {days}, but the certificate authority itself ends at {told_moment(last)}")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(party.name), authority.certificate.subject, key.public_key(), now, min(ends, last))
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(urn_of(party))]
    if party.role in SERVERS:
        names += [_host(host) for host in dict.fromkeys((*hosts, *_ALWAYS))]
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if party.role in SERVERS else ExtendedKeyUsageOID.CLIENT_AUTH
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    builder = builder.add_extension(signer, critical=False)
    certificate = builder.sign(authority.key, hashes.SHA256())
    _write_pair(*pair_of(authority.directory, party.name), certificate, key)
    return certificate


def pair_of(directory: Path, name: str) -> tuple[Path, Path]:
    """Where `issue` writes the certificate and the key of `name`."""
    return directory / f"{name}.pem", directory / f"{name}.key"


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before((now - _CLOCKS_APART).replace(microsecond=0))
        .not_valid_after(ends.replace(microsecond=0))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_pair(path: Path, key_path: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    """Both files or none. A certificate is public, its key the owner's alone."""
    for place in (path, key_path):
        if place.exists():
            raise ConfigError(f"there is a file {place} already; a certificate or key is never overwritten")
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        create_file(key_path, pem, 0o600)
        try:
            create_file(path, certificate.public_bytes(Encoding.PEM), 0o644)
        except BaseException:
            key_path.unlink()
            raise
    except OSError as error:
        raise ConfigError(f"cannot write {path} and {key_path}: {error.strerror}") from error


def _make_private(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = directory.stat().st_mode & 0o777
    except OSError as error:
        raise ConfigError(f"cannot make the directory {directory}: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(
            f"others than its owner can use the directory {directory} (mode {mode:04o}): name one that is not there "
            "yet, or run `chmod 700` on it"
        )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if len(host) > 253 or not _HOST.fullmatch(host) or host.replace(".", "").isdecimal():
            raise ConfigError(f"--host is {host[:80]!r}; it must be a host's name or IP address, no port") from None
        return x509.DNSName(host)


def _check_days(days: int) -> None:
    if not 1 <= days <= MAX_DAYS:
        raise ConfigError(f"days is {days}; it must be 1 to {MAX_DAYS}")


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
