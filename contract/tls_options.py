"""The options of commands that call a trunk by TLS; environment variables stand in for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from contract.tls import VARIABLES, TlsFiles

_CA, _CERTIFICATE, _KEY = VARIABLES

TrunkCaOption = Annotated[
    Path | None,
    typer.Option(
        "--ca", envvar=_CA, show_envvar=False, help=f"TLS to the trunk: the CA that vouches for it.  [env: {_CA}]"
    ),
]
TrunkCertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--certificate",
        envvar=_CERTIFICATE,
        show_envvar=False,
        help=f"What you show of yourself.  [env: {_CERTIFICATE}]",
    ),
]
TrunkKeyOption = Annotated[
    Path | None,
    typer.Option("--key", envvar=_KEY, show_envvar=False, help=f"The certificate's key, a file.  [env: {_KEY}]"),
]


def trunk_tls(ca: Path | None, certificate: Path | None, key: Path | None) -> TlsFiles | None:
    """The files that the three options name; None without TLS. Raises ConfigError where some are missing."""
    return TlsFiles.named((ca, certificate, key), ("--ca", "--certificate", "--key"))
