"""`trunkline secagg`: what a secure sum over so many clients stands against, before anybody runs one."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from aggregation.graph import ABORT_BITS, FULL_GRAPH_LIMIT, SECURITY_BITS, GraphPlan, is_safe, plan_graph
from aggregation.terms import DEFAULT_MIN_MEMBERS, MAX_MEMBERS
from contract.errors import ConfigError
from contract.output import OutputFormat, OutputOption, cli_errors, emit

app = typer.Typer(help="Secure sums: what a number of clients stands against.", no_args_is_help=True)


@app.callback()
def _secagg() -> None:
    """Keeps `plan` a command of its own while it is the only one."""


@app.command("plan")
@cli_errors
def plan(
    clients: Annotated[int, typer.Option(min=2, help="How many clients take part in a round.")],
    corrupt: Annotated[float, typer.Option(help="The fraction of clients that may be on the server's side.")] = 0.05,
    dropout: Annotated[float, typer.Option(help="The fraction of clients that may be lost during a round.")] = 0.1,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """How many neighbours each client shares secrets with (degree; 0: all others), how many of a neighbourhood must
    answer (threshold), and in words what that stands against. Fails where nothing stands against so much."""
    if clients > MAX_MEMBERS:
        raise ConfigError(f"--clients is {clients}; a secure sum has at most {MAX_MEMBERS} members")
    found = plan_graph(clients, corrupt, dropout)
    words = _full_graph(found, corrupt, dropout) if not found.degree else _ring(found, corrupt, dropout)
    numbers = {
        "members": found.members,
        "degree": found.degree,
        "threshold": found.threshold,
        "neighbourhood": found.neighbourhood,
    }
    emit(numbers | words, output)


def _full_graph(found: GraphPlan, corrupt: float, dropout: float) -> dict[str, str | None]:
    members, threshold = found.members, found.threshold
    traitors, spare = 2 * threshold - members - 1, members - threshold
    wanted, gone = math.ceil(corrupt * members), round(dropout * members)
    if not is_safe(found, wanted):
        raise ConfigError(f"{members} clients stand {traitors} on the server's side, not {wanted} ({corrupt:.0%})")
    if gone > spare:
        raise ConfigError(f"{members} clients can lose {spare} in a round, not {gone} ({dropout:.0%})")
    few = f"a client refuses sums over fewer than {DEFAULT_MIN_MEMBERS} unless its own node config allows them"
    return {
        "stands_against": f"a lying server with any {traitors} of the {members} clients on its side: in a round it "
        f"learns one sum, over at least {threshold} clients, theirs included",
        "stands_losing": f"any {spare} of the {members} clients in a round; with more of them gone it is aborted and "
        "nothing is revealed",
        "but": few if members < DEFAULT_MIN_MEMBERS else None,
    }


def _ring(found: GraphPlan, corrupt: float, dropout: float) -> dict[str, str | None]:
    traitors, gone = math.ceil(corrupt * found.members), math.ceil(dropout * found.members)
    return {
        "stands_against": f"a lying server with {traitors} of the {found.members} clients ({corrupt:.0%}) on its side, "
        f"at random places of the ring: it learns any client's update with a probability of at most 2^-{SECURITY_BITS}",
        "stands_losing": f"{gone} of the {found.members} clients ({dropout:.0%}) in a round, at random: it is aborted "
        f"for that with a probability of at most 2^-{ABORT_BITS}, and then nothing is revealed",
        "but": f"weaker than the full graph of {FULL_GRAPH_LIMIT} clients or fewer: a server that chooses who takes "
        "part can try many orders of the ring",
    }
