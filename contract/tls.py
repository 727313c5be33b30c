"""TLS between the trunk and who calls it: the files that a party has, as gRPC's credentials, and whose call it is.

Both sides show a certificate. Files are read and checked when credentials are made, so that what is wrong is told by
its file's name, and not by a handshake that fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contract.errors import AccessError, ConfigError

if TYPE_CHECKING:
    import grpc
    from cryptography import x509

VARIABLES = ("TRUNKLINE_TRUNK_CA", "TRUNKLINE_TRUNK_CERTIFICATE", "TRUNKLINE_TRUNK_KEY")
"""Environment variables that name the files of who calls the trunk without a node config: orchestrator and commands."""

_PEER = "x509_pem_cert"  # gRPC's name for what the other side showed
_NOBODY_LISTENS = "Connection refused"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Files in PEM: who is believed to vouch for the other side (`ca`), and what this side shows of itself.

    `certificate` may be followed by those between it and its own authority; `key` is its owner's alone.
    """

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def named(cls, files: Sequence[str | Path | None], names: Sequence[str]) -> TlsFiles | None:
        """The three `files`, called `names` in errors; None where none is given.

        Raises ConfigError where some are: half of TLS would be none.
        """
        given = [name for name, file in zip(names, files, strict=True) if file]
        if not given:
            return None
        if missing := [name for name in names if name not in given]:
            raise ConfigError(
                f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} given without {' and '.join(missing)}; "
                "TLS to the trunk needs all three, and without them it would not be used at all"
            )
        return cls(*(Path(file) for file in files if file))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> TlsFiles | None:
        """What VARIABLES name; None where they name nothing. Raises ConfigError where some are missing."""
        return cls.named([environment.get(name) for name in VARIABLES], VARIABLES)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For who calls. Raises ConfigError, naming the file, for one that cannot be used."""
        import grpc  # who only names files needs no gRPC

        ca, chain, key = self._read()
        return grpc.ssl_channel_credentials(ca, key, chain)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For who is called: nobody without a certificate that `ca` vouches for gets through. Raises ConfigError."""
        import grpc

        ca, chain, key = self._read()
        return grpc.ssl_server_credentials([(key, chain)], root_certificates=ca, require_client_auth=True)

    def _read(self) -> tuple[bytes, bytes, bytes]:
        """(ca, certificate, key), all in PEM and each good at this moment."""
        from contract import certificates

        now = datetime.now(UTC)
        ca, chain = certificates.read_certificate_file(self.ca), certificates.read_certificate_file(self.certificate)
        authorities = certificates.parse_certificates(ca, str(self.ca))
        if not any(certificates.is_authority(authority) for authority in authorities):
            raise ConfigError(f"{self.ca} is not a certificate authority's certificate")
        if not any(now <= authority.not_valid_after_utc for authority in authorities):
            certificates.require_current(authorities[0], str(self.ca), now)
        own = certificates.parse_certificates(chain, str(self.certificate))[0]
        certificates.require_current(own, str(self.certificate), now)
        return ca, chain, certificates.read_tls_key(self.key, own, str(self.certificate))


def open_channel(address: str, tls: TlsFiles | None, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
    """A channel to `address`, by TLS where `tls` is given: never without it then. Raises ConfigError for its files."""
    import grpc

    if tls is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, tls.channel_credentials(), options)


def peer_certificate(shown: Mapping[str, Iterable[bytes]]) -> x509.Certificate | None:
    """The certificate of who calls, as gRPC's `auth_context` has it; None without TLS. It was verified by then.

    Raises AccessError for one that cannot be read.
    """
    from contract.certificates import parse_certificates

    pem = next(iter(shown.get(_PEER, ())), None)
    if pem is None:
        return None
    try:
        return parse_certificates(pem, "what the caller showed")[0]
    except ConfigError as error:
        raise AccessError(str(error)) from error


def told_failure(details: str | None, *, by_tls: bool) -> str:
    """What to add, in brackets, to an error that says that nothing answers; nothing where nobody listens at all."""
    words = " ".join((details or "").split())
    if not words or _NOBODY_LISTENS in words:
        return ""
    hung_up = "Socket closed" in words or "Connection reset" in words
    if not by_tls:
        return " (something hung up: if it serves by TLS, it must be asked by TLS)" if hung_up else ""
    if "WRONG_VERSION_NUMBER" in words:
        return " (what listens there does not speak TLS)"
    if hung_up:
        return " (by TLS it hung up: its client CA may not vouch for the certificate shown, or that is no client's)"
    return f" (by TLS: {words.rpartition('OPENSSL_internal:')[2][-300:].removesuffix(': OK')})"
