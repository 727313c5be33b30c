"""`trunkline trunk sessions|drain`: who works with a trunk, and its end."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from math import inf
from typing import TYPE_CHECKING, Annotated

import typer

from contract.errors import ConfigError
from contract.operators import OperatorOption, operator_name
from contract.options import DryRunOption, NewestOption, SinceOption, WatchOption, YesOption, in_utc
from contract.output import OutputFormat, OutputOption, cli_errors, emit, require_agreed, talk
from contract.tls_options import TrunkCaOption, TrunkCertificateOption, TrunkKeyOption, trunk_tls
from contract.watching import Look, watch

if TYPE_CHECKING:
    from server_trunk.admin_calls import SessionLine

AddressArgument = Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the trunk listens.")]
COLUMNS = (
    *("client", "run", "round", "attempt", "open_s", "idle_s", "steps", "tokens", "received_bytes", "sent_bytes"),
    "pending",
)


@cli_errors
def show_sessions(
    address: AddressArgument = "127.0.0.1:50051",
    client: Annotated[str | None, typer.Option(help="Only this client's.")] = None,
    run: Annotated[str | None, typer.Option(help="Only of this run.")] = None,
    since: SinceOption = None,
    limit: NewestOption = None,
    watching: WatchOption = False,
    ca: TrunkCaOption = None,
    certificate: TrunkCertificateOption = None,
    key: TrunkKeyOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """A trunk's open sessions, the oldest first: whose they are, of which round, and what they have done.

    `idle_s` is since the client was last heard or answered, `pending` counts forwards that wait for their backward.
    Under dp no counts are told: they follow from the client's text.
    """
    from server_trunk.admin_calls import connected

    opened = in_utc(since)
    with connected(address, trunk_tls(ca, certificate, key)) as trunk:

        def look() -> Look:
            rows = [row for row in trunk.sessions() if client in (None, row.client) and run in (None, row.run)]
            open_s = inf if opened is None else (datetime.now(UTC) - opened).total_seconds()
            rows = [row for row in rows if row.open_s <= open_s]
            return Look(rows if limit is None else rows[-limit:], f"trunk {address}: {len(rows)} sessions")

        if watching:
            watch(look, output, COLUMNS)
            return
        found = look()
    emit(found.data, output, COLUMNS, found.title)


@cli_errors
def drain(
    address: AddressArgument = "127.0.0.1:50051",
    grace_s: Annotated[
        float, typer.Option(help="Seconds that open sessions get before they are cut off; at most a day.")
    ] = 30.0,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    operator: OperatorOption = None,
    ca: TrunkCaOption = None,
    certificate: TrunkCertificateOption = None,
    key: TrunkKeyOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Have a trunk take no more sessions and end, once the open ones have or --grace-s later, as on SIGTERM.

    Asked again, the new --grace-s counts from then on. A session that is cut off is lost: its client replays the round
    where another trunk, or this one once it is back, takes it in time. Who asked is in the trunk's log, and in the
    audit log where this machine has a database.
    """
    from contract.wire import LONGEST_GRACE_S
    from server_trunk.admin_calls import connected

    if not 0 <= grace_s <= LONGEST_GRACE_S:
        raise ConfigError(f"--grace-s is {grace_s}; it must be 0 to {LONGEST_GRACE_S:g} seconds")
    who = operator_name(operator)
    with connected(address, trunk_tls(ca, certificate, key)) as trunk:
        sessions = trunk.sessions()
        told = {"address": address, "open_sessions": len(sessions), "grace_s": grace_s}
        if dry_run:
            emit(told | {"clients": _clients(sessions)}, output)
            talk(f"{len(sessions)} sessions would get {grace_s:g} s, and those still open then would be cut off")
            return
        question = f"Drain trunk {address}? Its {len(sessions)} sessions get {grace_s:g} s, then they are cut off."
        require_agreed("a trunk that is drained ends", question, yes=yes)
        _note(who, address, grace_s, len(sessions))
        told["open_sessions"] = trunk.drain(grace_s, who)
    emit(told, output)
    talk(f"it takes no more sessions, and ends once the {told['open_sessions']} open ones have, or in {grace_s:g} s")


def _clients(sessions: list[SessionLine]) -> list[str]:
    return sorted({session.client for session in sessions})


def _note(operator: str, address: str, grace_s: float, sessions: int) -> None:
    """Into this machine's audit log, where it has one: a trunk's machine needs no database."""
    from storage.records import Deed
    from storage.store import has_database, open_present_store

    if not has_database():
        talk("this machine has no database: only the trunk's own log says who drained it")
        return
    with closing(open_present_store()) as store:
        store.note(Deed(operator, "trunk-drained", address, {"grace_s": grace_s, "open_sessions": sessions}))
