"""The doctor's check of TLS files: that they belong together, are for their owner alone, and last a while yet."""

from __future__ import annotations

import ipaddress
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from contract.tls import VARIABLES
from trunkline.finding import NotReadyError, SkippedError
from trunkline.tls_checks import CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE, check_tls

NOW = datetime.now(UTC)


class Authority:
    """Issues certificates into a directory."""

    def __init__(self, directory: Path, days: int = 400) -> None:
        self.directory = directory
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a CA")])
        self.certificate = self._signed(self.name, self.key.public_key(), NOW - timedelta(days=1), days, ca=True)
        self.path = self.write("ca.pem", self.certificate.public_bytes(Encoding.PEM))

    def issue(self, days: int = 100, begins: datetime = NOW - timedelta(days=1)) -> dict[str, Path | None]:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ward")])
        certificate = self._signed(name, key.public_key(), begins, days, ca=False)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return {
            CA_VARIABLE: self.path,
            CERTIFICATE_VARIABLE: self.write("ward.pem", certificate.public_bytes(Encoding.PEM)),
            KEY_VARIABLE: self.write("ward.key", pem),
        }

    def write(self, name: str, data: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(data)
        path.chmod(0o600)
        return path

    def _signed(self, name: x509.Name, key: Any, begins: datetime, days: int, *, ca: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(begins + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        )
        return builder.sign(self.key, hashes.SHA256())


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def not_ready(environment: dict[str, Path | None], told: str, result: str = "FAIL") -> str:
    with pytest.raises(NotReadyError, match=told) as found:
        check_tls(environment)
    assert found.value.result == result
    return found.value.fix


def test_files_that_belong_together_pass_with_the_days_left(authority: Authority) -> None:
    assert check_tls(authority.issue()) == "the certificate is valid for 98 days more, its CA for 398"


def test_without_any_named_there_is_nothing_to_check() -> None:
    with pytest.raises(SkippedError, match="none of TRUNKLINE_TRUNK_CA, .* is set"):
        check_tls({})


def test_one_that_is_not_named_is_told(authority: Authority) -> None:
    named = authority.issue()
    del named[KEY_VARIABLE]
    assert not_ready(named, "TRUNKLINE_TRUNK_KEY not set") == "set all three, or none of them"


def test_a_certificate_that_ends_soon_is_doubtful(authority: Authority) -> None:
    assert "have a new one issued" in not_ready(authority.issue(days=20), "valid for 18 days more", "WARN")


def test_an_authority_that_ends_soon_is_doubtful_too(tmp_path: Path) -> None:
    not_ready(Authority(tmp_path, days=10).issue(), "its CA for 8", "WARN")


def test_a_certificate_that_has_ended_or_not_begun_is_not_ready(authority: Authority) -> None:
    not_ready(authority.issue(days=5, begins=NOW - timedelta(days=9)), r"ward\.pem expired at .* UTC")
    assert "clock" in not_ready(
        authority.issue(begins=NOW + timedelta(days=2)), r"ward\.pem is not valid before .* UTC"
    )


def test_a_key_that_others_can_read_is_not_ready(authority: Authority) -> None:
    named = authority.issue()
    os.chmod(authority.directory / "ward.key", 0o640)
    fix = f"run `chmod 600 {named[KEY_VARIABLE]}`"
    not_ready(named, f"{KEY_VARIABLE}: others than its owner can use the key file .*: {re.escape(fix)}$")


def test_a_key_of_another_certificate_and_another_authority_are_told(authority: Authority, tmp_path: Path) -> None:
    first = authority.issue()
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    other = Authority(stranger).issue()
    not_ready(
        {**first, KEY_VARIABLE: other[KEY_VARIABLE]}, f"{KEY_VARIABLE}: .* is not that of the certificate .*ward.pem"
    )
    not_ready(
        {**first, CA_VARIABLE: other[CA_VARIABLE]},
        f"{CA_VARIABLE}: .*ward.pem is not signed by the certificate authority",
    )


@pytest.mark.parametrize("variable", [CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE])
def test_a_file_that_is_gone_or_holds_something_else_is_named(authority: Authority, variable: str) -> None:
    named = authority.issue()
    not_ready(
        {**named, variable: Path("/nowhere/x.pem")}, f"{variable}: cannot read the .* /nowhere/x.pem: No such file"
    )
    nonsense = authority.write("nonsense", b"nothing of the kind")
    not_ready({**named, variable: nonsense}, f"{variable}: .*nonsense holds no")


def test_a_chain_by_way_of_another_authority_leads_to_the_first(authority: Authority, tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    middle = Authority(below)
    crossed = authority._signed(middle.name, middle.key.public_key(), NOW - timedelta(days=1), 300, ca=True)
    authority.name = middle.name  # the cross-signed one must be issued under the first authority's own name
    middle.issue()
    certificate = below / "ward.pem"
    named = {**dict.fromkeys(VARIABLES), CA_VARIABLE: authority.path, CERTIFICATE_VARIABLE: certificate}
    named[KEY_VARIABLE] = below / "ward.key"
    not_ready(named, f"{CA_VARIABLE}: .*ward.pem is not signed by the certificate authority")
    certificate.write_bytes(certificate.read_bytes() + crossed.public_bytes(Encoding.PEM))
    assert "valid for 98 days more" in check_tls(named)
