"""A certificate authority with one certificate a role, and others that a trunk must not take."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc

from contract.certificates import Party, Role, key_sha256, read_certificates
from contract.tls import TlsFiles
from orchestrator import authority


@dataclass(frozen=True)
class Pki:
    """`folder` holds a CA, and for each NAME that was issued NAME.pem and NAME.key."""

    folder: Path

    @classmethod
    def made(cls, folder: Path, now: datetime | None = None, days: int = 7) -> Pki:
        """With a trunk, two clients, an orchestrator and an operator, each called as its role or by a site's name."""
        now = now or datetime.now(UTC)
        found = authority.create_authority(folder, now, days)
        for name, role in (("trunk", Role.TRUNK), ("north", Role.CLIENT), ("south", Role.CLIENT)):
            authority.issue(found, Party(role, name), [], now, days)
        for role in (Role.ORCHESTRATOR, Role.OPERATOR):
            authority.issue(found, Party(role, role.value), [], now, days)
        return cls(folder)

    @classmethod
    def expired(cls, folder: Path) -> Pki:
        return cls.made(folder, datetime.now(UTC) - timedelta(days=2), days=1)

    @property
    def ca(self) -> Path:
        return self.folder / authority.CA_CERTIFICATE

    def files(self, name: str, ca: Path | None = None) -> TlsFiles:
        return TlsFiles(ca or self.ca, *authority.pair_of(self.folder, name))

    def key_sha256(self, name: str) -> str:
        return key_sha256(read_certificates(authority.pair_of(self.folder, name)[0])[0])

    def unchecked(self, name: str, ca: Path | None = None) -> grpc.ChannelCredentials:
        """Credentials as they are, good or not: whoever attacks does not check its own files."""
        path, key_path = authority.pair_of(self.folder, name)
        return grpc.ssl_channel_credentials((ca or self.ca).read_bytes(), key_path.read_bytes(), path.read_bytes())

    def refused(self, folder: Path) -> dict[str, grpc.ChannelCredentials | None]:
        """What callers may show, by its name, that a trunk of this authority must not take; None is no TLS at all.

        `folder` is where other authorities are made.
        """
        others, expired = Pki.made(folder / "others"), Pki.expired(folder / "expired")
        return {
            "no TLS": None,
            "no certificate": grpc.ssl_channel_credentials(self.ca.read_bytes()),
            "another CA's": others.unchecked("north", ca=self.ca),
            "an expired one": expired.unchecked("north", ca=self.ca),
            "a server's": self.unchecked("trunk"),
        }
