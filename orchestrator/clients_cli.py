"""`trunkline clients`: who may take part in secure sums. Sites make keys; the operator enrolls, revokes, publishes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contract.errors import ConfigError, StorageError, TrunklineError
from contract.operators import OperatorOption, operator_name
from contract.options import DryRunOption, NewestOption, SinceOption, WatchOption, YesOption, in_utc
from contract.output import OutputFormat, OutputOption, cli_errors, emit, require_agreed, talk
from contract.public_file import read_public_file
from contract.watching import Look, watch
from storage.records import IdentityRow

if TYPE_CHECKING:
    from orchestrator.publication import Publication
    from storage.store import Store

MAX_PUBLIC_FILE_BYTES = 16_384
COLUMNS = ("client_id", "public_key", "tls_key", "enrolled_at", "enrolled_by")
ALL_COLUMNS = (*COLUMNS, "revoked_at", "revoke_reason")

app = typer.Typer(
    help="Who may take part in secure sums. A site makes a key with `keygen` and gives its public line to the "
    "operator, who enrolls it and publishes the signed roster that every site checks the others against.",
    no_args_is_help=True,
)

ClientArgument = Annotated[str, typer.Argument(metavar="CLIENT_ID", help="The client's id, as the roster names it.")]
RosterOption = Annotated[
    Path | None, typer.Option("--roster", help="Publish the new roster in this file too; needs --signing-key.")
]
RosterKeyOption = Annotated[
    Path | None, typer.Option("--signing-key", help="The roster signer's private key, made by `clients keygen`.")
]


CertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--certificate", dir_okay=False, help="Its TLS certificate: tickets are then good with that key alone."
    ),
]


@app.command("keygen")
@cli_errors
def keygen(
    out: Annotated[Path, typer.Option(help="File for the private key; it must not be there yet.")],
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Make an Ed25519 key: the private half in a file that you alone can read, the public half as a line on stdout.

    For a client's identity, or for the roster's signer. The private half never leaves the machine it was made on.
    """
    from contract.identity import create_private_key, public_key_text

    line = public_key_text(create_private_key(out))
    emit(line if output is OutputFormat.TABLE else {"public_key": line, "private_key_file": out.absolute()}, output)
    talk(f"the private key is in {out}; give the public line above to whoever needs it")


@app.command("enroll")
@cli_errors
def enroll(
    client_id: ClientArgument,
    public_key: Annotated[
        str, typer.Option(metavar="KEY", help="The line `ed25519:...` that keygen printed at the site, or @FILE of it.")
    ],
    certificate: CertificateOption = None,
    operator: OperatorOption = None,
    roster: RosterOption = None,
    signing_key: RosterKeyOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Let a client take part. An id and a key are enrolled once and for ever, also after they were revoked.

    Get the line on a way that the server's operator cannot change: who is enrolled is who others trust.
    """
    line, who = _public_line(public_key), operator_name(operator)
    tls_key = None if certificate is None else _tls_key(certificate)
    with _change(roster, signing_key) as (store, publication):
        version = store.enroll_client(client_id, line, who, tls_key)
        _finish(f"client {client_id} is enrolled", client_id, version, store, publication, who, output)


@app.command("certificate")
@cli_errors
def set_certificate(
    client_id: ClientArgument,
    certificate: Annotated[Path, typer.Option(dir_okay=False, help="The client's TLS certificate, PEM.")],
    operator: OperatorOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Bind an enrolled client to the key of its TLS certificate; tickets that are issued from then on name it.

    A new certificate for the same key needs none of this.
    """
    from storage.store import open_store

    tls_key, who = _tls_key(certificate), operator_name(operator)
    with closing(open_store()) as store:
        store.set_client_certificate(client_id, tls_key, who)
    emit({"client_id": client_id, "certificate_key_sha256": tls_key}, output)


@app.command("list")
@cli_errors
def list_clients(
    everybody: Annotated[bool, typer.Option("--all", help="Also those that were revoked.")] = False,
    since: SinceOption = None,
    limit: NewestOption = None,
    watching: WatchOption = False,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Enrolled clients and their keys. --since and --limit go by when a client was enrolled or revoked last."""
    from storage.store import open_reader

    changed, columns = in_utc(since), ALL_COLUMNS if everybody else COLUMNS
    with closing(open_reader()) as reader:

        def look() -> Look:
            version, rows = reader.roster_version(), reader.list_identities(include_revoked=everybody)
            rows = [row for row in rows if changed is None or (row.revoked_at or row.enrolled_at) >= changed]
            if limit is not None:
                kept = sorted(row.roster_version for row in rows)[-limit:]
                rows = [row for row in rows if row.roster_version in kept]
            return Look([_row_data(row) for row in rows], f"roster version {version}")

        if watching:
            watch(look, output, columns)
            return
        found = look()
    emit(found.data, output, columns=columns, title=found.title)


@app.command("show")
@cli_errors
def show_client(
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="An enrolled client's id, or a Flower node's.")],
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """All that is known of one client: its identity and who changed it, the nodes that spoke for it, what it took part
    in, and its privacy budgets.

    `last_seen_at` is its newest first contact in a run, or answer in a round.
    """
    from orchestrator.client_view import read_client, tables
    from storage.ledger import open_ledger_to_read
    from storage.store import open_reader

    with closing(open_reader()) as reader, closing(open_ledger_to_read()) as ledger:
        found = read_client(reader, ledger, client)
    if output is not OutputFormat.TABLE:
        emit(found, output)
        return
    for title, columns, data in tables(found):
        emit(data, output, columns, title)


@app.command("revoke")
@cli_errors
def revoke(
    client_id: ClientArgument,
    reason: Annotated[str, typer.Option(help="Why, for the record.")],
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    operator: OperatorOption = None,
    roster: RosterOption = None,
    signing_key: RosterKeyOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Shut a client out, for ever: neither its id nor its key can be enrolled again.

    Sites learn of it by the next roster that is published: give --roster and --signing-key, or run `clients roster`.
    """
    who = operator_name(operator)
    if not reason.strip():
        raise ConfigError("--reason is empty; say why, for the record")
    if dry_run:
        _tell_revocation(client_id, output)
        return
    with _change(roster, signing_key) as (store, publication):
        require_agreed("revoking cannot be taken back", f"Revoke client {client_id} for ever?", yes=yes)
        version = store.revoke_client(client_id, who, reason)
        _finish(f"client {client_id} is revoked", client_id, version, store, publication, who, output)


@app.command("roster")
@cli_errors
def publish_roster(
    out: Annotated[Path, typer.Option(help="File to publish; an earlier roster there is replaced.")],
    signing_key: Annotated[Path, typer.Option(help="The roster signer's private key, made by `clients keygen`.")],
    operator: OperatorOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Publish who is enrolled as a signed file. Each site keeps a copy and pins the signer's public key.

    A file is only ever replaced by a later version of the same list under the same key.
    """
    from contract.identity import public_key_text
    from orchestrator.publication import Publication
    from storage.store import open_present_store

    who, publication = operator_name(operator), Publication.at(out, signing_key)
    with closing(open_present_store()) as store:
        published = publication.publish(store, datetime.now(UTC), who)
    data = {"roster": publication.path, "version": published.version, "members": len(published.members)}
    emit(data | {"issued_at": published.issued_at, "signer": public_key_text(published.signer)}, output)


@contextmanager
def _change(roster: Path | None, signing_key: Path | None) -> Iterator[tuple[Store, Publication | None]]:
    """The store to change, and where to publish the change, with all that can be refused beforehand refused."""
    from orchestrator.publication import Publication
    from storage.store import open_store

    publication = None
    if roster is not None and signing_key is not None:
        publication = Publication.at(roster, signing_key)
    elif roster is not None or signing_key is not None:
        raise ConfigError("--roster and --signing-key go together; give both or neither")
    store = open_store()
    try:
        if publication is not None:
            publication.check(store.roster())
        yield store, publication
    finally:
        store.close()


def _finish(
    done: str,
    client_id: str,
    version: int,
    store: Store,
    publication: Publication | None,
    operator: str,
    output: OutputFormat,
) -> None:
    """Publish what was changed, where that was asked for, and tell of both."""
    if publication is None:
        talk(f"{done}; sites learn of it once you publish: trunkline clients roster --out FILE --signing-key FILE")
    else:
        try:
            version = publication.publish(store, datetime.now(UTC), operator).version
        except TrunklineError:
            talk(f"{done}, but the roster was not published; do it with `trunkline clients roster`")
            raise
    path = None if publication is None else publication.path
    emit({"client_id": client_id, "roster_version": version, "published": path}, output)


def _tell_revocation(client_id: str, output: OutputFormat) -> None:
    """Say whom `revoke` would shut out. Raises StorageError unless it is enrolled."""
    from storage.store import open_reader

    with closing(open_reader()) as reader:
        row = next((one for one in reader.list_identities() if one.client_id == client_id), None)
    if row is None:
        raise StorageError(
            f"client {client_id} is not enrolled, or was revoked already: `trunkline clients list --all`"
        )
    emit(_row_data(row), output)
    talk(f"client {client_id} would be revoked, for ever")


def _public_line(given: str) -> str:
    """The line itself, or that of the file which @FILE names."""
    if not given.startswith("@"):
        return given
    path = Path(given[1:])
    data = read_public_file(path, MAX_PUBLIC_FILE_BYTES, "the file of --public-key,")
    if len(data) > MAX_PUBLIC_FILE_BYTES:
        raise ConfigError(f"--public-key: {path} is too long; it must hold the one line that keygen printed")
    return data.decode("utf-8", "replace").strip()


def _tls_key(path: Path) -> str:
    """The hash of the public key in a client's certificate. Raises ConfigError unless it is one, and good now."""
    from contract.certificates import Role, key_sha256, party_of, read_certificates, require_current

    certificate = read_certificates(path)[0]
    require_current(certificate, str(path), datetime.now(UTC))
    party = party_of(certificate, str(path))
    if party.role is not Role.CLIENT:
        raise ConfigError(f"{path} is of role {party.role.value}; a client's must be of role {Role.CLIENT.value}")
    return key_sha256(certificate)


def _row_data(row: IdentityRow) -> dict[str, Any]:
    return {
        "client_id": row.client_id,
        "public_key": row.public_key,
        "enrolled_at": row.enrolled_at.replace(microsecond=0),
        "enrolled_by": row.enrolled_by,
        "tls_key": None if row.certificate_key_sha256 is None else row.certificate_key_sha256[:12],
        "certificate_key_sha256": row.certificate_key_sha256,
        "revoked_at": None if row.revoked_at is None else row.revoked_at.replace(microsecond=0),
        "revoke_reason": row.revoke_reason,
        "roster_version": row.roster_version,
    }
