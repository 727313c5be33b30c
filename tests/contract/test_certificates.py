"""Certificates: whom one speaks for, and what is wrong with it, told by the file's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from contract import certificates
from contract.certificates import Party, Role
from contract.errors import ConfigError

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
MakeCertificate = Callable[..., x509.Certificate]


def made(
    key: ec.EllipticCurvePrivateKey,
    uris: Sequence[str] = (),
    signer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None = None,
    *,
    authority: bool = False,
    name: str = "somebody",
) -> x509.Certificate:
    """As an organisation's own CA might write it: nothing in it is required but the names."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, signing = (subject, key) if signer is None else (signer[0].subject, signer[1])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(NOON).not_valid_after(NOON + timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(authority, None), critical=True)
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signing, hashes.SHA256())


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize("role", list(Role))
def test_a_certificate_speaks_for_the_one_party_that_it_names(key: ec.EllipticCurvePrivateKey, role: Role) -> None:
    party = Party(role, "north-2.site_A")
    assert certificates.party_of(made(key, [certificates.urn_of(party), "https://elsewhere.example/x"])) == party


@pytest.mark.parametrize(
    ("uris", "told"),
    [
        ([], "names no role"),
        (["https://elsewhere.example/client:north"], "names no role"),
        (["urn:trunkline:client:north", "urn:trunkline:operator:north"], "names 2 roles"),
        (["urn:trunkline:client:north", "urn:trunkline:client:north"], "names 2 roles"),
        (["urn:trunkline:CLIENT:north"], "names the role 'CLIENT'"),
        (["urn:trunkline:admin:north"], "names the role 'admin'"),
        (["urn:trunkline::north"], "names the role ''"),
        (["urn:trunkline:client"], "the name in the file is ''"),
        (["urn:trunkline:client:a/b"], "the name in the file is 'a/b'"),
        (["urn:trunkline:client:north:operator"], "the name in the file is 'north:operator'"),
    ],
)
def test_a_role_that_is_not_named_in_the_one_way_is_refused(
    key: ec.EllipticCurvePrivateKey, uris: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        certificates.party_of(made(key, uris), "the file")


def test_a_certificate_is_good_from_its_first_to_its_last_second(key: ec.EllipticCurvePrivateKey) -> None:
    found = made(key)
    for moment in (NOON, NOON + timedelta(days=1)):
        certificates.require_current(found, "north.pem", moment)
    with pytest.raises(ConfigError, match=r"north.pem is not valid before 2026-06-01 12:00:00 UTC, and it is 2026-"):
        certificates.require_current(found, "north.pem", NOON - timedelta(seconds=1))
    with pytest.raises(ConfigError, match=r"north.pem expired at 2026-06-02 12:00:00 UTC"):
        certificates.require_current(found, "north.pem", NOON + timedelta(days=1, seconds=1))


def test_a_chain_leads_to_the_authority_or_is_refused(key: ec.EllipticCurvePrivateKey) -> None:
    root_key, between_key, other_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    root = made(root_key, authority=True, name="root")
    between = made(between_key, signer=(root, root_key), authority=True, name="between")
    leaf = made(key, signer=(between, between_key))
    certificates.require_signed_by([leaf, between], [root], "north.pem")
    certificates.require_signed_by([leaf], [between], "north.pem")
    with pytest.raises(ConfigError, match="north.pem is not signed by the certificate authority, but by CN=between"):
        certificates.require_signed_by([leaf], [root], "north.pem")
    namesake = made(other_key, authority=True, name="root")  # a name alone signs nothing
    with pytest.raises(ConfigError, match="but by CN=root"):
        certificates.require_signed_by([leaf, between], [namesake], "north.pem")
    not_authority = made(between_key, signer=(root, root_key), name="between")
    with pytest.raises(ConfigError, match="but by CN=between"):
        certificates.require_signed_by([leaf, not_authority], [root], "north.pem")


def test_a_key_of_another_certificate_and_one_that_others_read_are_refused(
    key: ec.EllipticCurvePrivateKey, tmp_path: Path
) -> None:
    found, path = made(key), tmp_path / "north.key"
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(pem)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"north.key \(mode 0640\): run `chmod 600 "):
        certificates.read_tls_key(path, found, "north.pem")
    path.chmod(0o600)
    assert certificates.read_tls_key(path, found, "north.pem") == pem
    other = made(ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ConfigError, match="north.key is not that of the certificate south.pem"):
        certificates.read_tls_key(path, other, "south.pem")
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")))
    with pytest.raises(ConfigError, match="north.key is encrypted"):
        certificates.read_tls_key(path, found, "north.pem")
    path.write_bytes(b"s3cret")
    with pytest.raises(ConfigError, match="north.key holds no private key in PEM") as caught:
        certificates.read_tls_key(path, found, "north.pem")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (None, "cannot read the certificate .*north.pem: No such file"),
        (b"", "north.pem holds no certificate in PEM"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "north.pem holds no certificate in PEM"),
        (b"x" * (certificates.MAX_CERTIFICATE_BYTES + 1), "north.pem is over 1048576 bytes"),
    ],
)
def test_what_is_no_certificate_is_told_by_its_file(tmp_path: Path, data: bytes | None, told: str) -> None:
    if data is not None:
        (tmp_path / "north.pem").write_bytes(data)
    with pytest.raises(ConfigError, match=told):
        certificates.read_certificates(tmp_path / "north.pem")
