"""`trunkline pki`: certificates for development, what a certificate says, and the public key of the tickets' signer."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from contract.certificates import Party, Role, facts_of, read_certificates, require_current, require_signed_by
from contract.errors import ConfigError
from contract.output import OutputFormat, OutputOption, cli_errors, emit, plain_data, talk
from orchestrator import authority
from orchestrator.ticket_key import KEY_FILE, open_ticket_key, signer_text
from storage.home import home_dir

app = typer.Typer(
    help="Certificates for TLS to the trunk. `init` and `issue` make those of a development CA, one directory on one "
    "machine; whoever has its key can be anybody. An organisation's own CA takes its place: a certificate needs one "
    "subject alternative name URI:urn:trunkline:ROLE:NAME (ROLE trunk, client, orchestrator, operator or superlink), "
    "those of a trunk or superlink also DNS or IP names of where they are reached, and its extended key usage must be "
    "server authentication for these two, client authentication for the others.",
    no_args_is_help=True,
)

DirectoryOption = Annotated[
    Path, typer.Option("--dir", file_okay=False, help="The CA's directory, for its owner alone (mode 0700).")
]


@app.command("init")
@cli_errors
def init(
    directory: DirectoryOption,
    days: Annotated[int, typer.Option(min=1, help="How long the CA is good.")] = 3650,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Make a development CA: ca.pem, which everybody needs, and ca.key, which stays where it is."""
    made = authority.create_authority(directory.absolute(), datetime.now(UTC), days)
    facts = facts_of(made.certificate)
    path, key_path = made.directory / authority.CA_CERTIFICATE, made.directory / authority.CA_KEY
    told = {"certificate": path, "key": key_path, "valid_until": facts.valid_until, "key_sha256": facts.key_sha256}
    emit(told, output)
    talk(f"this is a development CA: whoever has {key_path} can be anybody, so it stays where it is")


@app.command("issue")
@cli_errors
def issue(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whom the certificate speaks for; names its files too.")],
    role: Annotated[Role, typer.Option(help="What its owner is, and so what the trunk lets it do.")],
    directory: DirectoryOption,
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="Of a trunk or superlink: a name or address it is reached by, besides 127.0.0.1."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="How long the certificate is good.")] = 365,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Make a certificate and its key: NAME.pem and NAME.key in the CA's directory, never over others.

    Give its owner both, and ca.pem; then remove the key here.
    """
    found = authority.open_authority(directory.absolute())
    facts = facts_of(authority.issue(found, Party(role, name), host or [], datetime.now(UTC), days))
    path, key_path = authority.pair_of(found.directory, name)
    told = {"certificate": path, "key": key_path, "role": facts.role, "name": facts.name, "hosts": facts.hosts}
    emit(told | {"valid_until": facts.valid_until, "key_sha256": facts.key_sha256}, output)


@app.command("show")
@cli_errors
def show(
    certificate: Annotated[Path, typer.Argument(metavar="FILE", help="A certificate in PEM.")],
    ca: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Check too that this certificate authority signed it.")
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """What a certificate says, and what is wrong with it; exits 1 where something is."""
    chain = read_certificates(certificate)
    authorities = None if ca is None else read_certificates(ca)
    problem = None
    try:
        require_current(chain[0], str(certificate), datetime.now(UTC))
        if authorities is not None:
            require_signed_by(chain, authorities, str(certificate))
    except ConfigError as error:
        problem = str(error)
    emit(plain_data(facts_of(chain[0])) | {"problem": problem}, output)
    if problem is not None:
        talk(f"error: {problem}")
        raise typer.Exit(1)


@app.command("ticket-key")
@cli_errors
def ticket_key(output: OutputOption = OutputFormat.TABLE) -> None:
    """The public line of TRUNKLINE_HOME/ticket.pem, the key that signs tickets: `trunk serve --ticket-signer` wants it.

    The key is made where there is none yet. Run it as who runs the SuperLink, with its TRUNKLINE_HOME.
    """
    line = signer_text(open_ticket_key())
    data = {"public_key": line, "private_key_file": home_dir() / KEY_FILE}
    emit(line if output is OutputFormat.TABLE else data, output)
