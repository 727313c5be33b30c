"""The files that TLS to a trunk needs, where options or the environment name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from contract import certificates
from contract.errors import ConfigError
from contract.tls import VARIABLES
from trunkline.finding import DoubtfulError, NotReadyError, SkippedError

CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE = VARIABLES
EARLY_DAYS = 30
"""How many days before its end a certificate is warned of."""


def check_tls(files: Mapping[str, Path | None]) -> str:
    """CA, certificate and private key, by VARIABLES, are there, belong together, and are valid for a while yet."""
    named = {name: file for name in VARIABLES if (file := files.get(name)) is not None}
    if not named:
        raise SkippedError(f"none of {', '.join(VARIABLES)} is set")
    if missing := [name for name in VARIABLES if name not in named]:
        raise NotReadyError(f"{', '.join(missing)} not set", "set all three, or none of them")
    ca, certificate, key = (named[name] for name in VARIABLES)
    with _told(CA_VARIABLE, "name a PEM file of the CA's certificate"):
        authorities = certificates.read_certificates(ca)
    with _told(CERTIFICATE_VARIABLE, "name a PEM file of your certificate"):
        chain = certificates.read_certificates(certificate)
    with _told(KEY_VARIABLE, "name a PEM file of that certificate's key, which its owner alone can read"):
        certificates.read_tls_key(key, chain[0], str(certificate))
    with _told(CA_VARIABLE, "name the CA that issued the certificate"):
        certificates.require_signed_by(chain, authorities, str(certificate))
    now = datetime.now(UTC)
    with _told("TLS", "have a new one issued, or set this machine's clock"):
        certificates.require_current(chain[0], str(certificate), now)
        for authority in authorities:
            certificates.require_current(authority, str(ca), now)
    left, *of_ca = ((one.not_valid_after_utc - now).days for one in (chain[0], *authorities))
    told = f"the certificate is valid for {left} days more, its CA for {min(of_ca)}"
    if min(left, *of_ca) < EARLY_DAYS:
        raise DoubtfulError(told, "have a new one issued before this one ends")
    return told


@contextmanager
def _told(variable: str, fix: str) -> Iterator[None]:
    """What `contract.certificates` refuses, as a finding."""
    try:
        yield
    except ConfigError as error:
        raise NotReadyError(f"{variable}: {error}", fix) from None
