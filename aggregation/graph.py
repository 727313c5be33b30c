"""Who shares secrets and masks with whom: everybody with everybody, or each with `degree` neighbours on a ring.

The ring follows Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead" (CCS 2020), section 3:
a random order of the members, each joined to the `degree` / 2 before and behind it. The order is derived from the
public keys of all who advertised, so that no party can choose it alone; a server that chooses who may advertise can
still try many orders, which makes it weaker than the full graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aggregation.keys import digest
from contract.errors import ConfigError

FULL_GRAPH_LIMIT = 128
SECURITY_BITS = 40
ABORT_BITS = 20


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """How many neighbours (0: all others) and how many of a neighbourhood, its member counted, must answer."""

    members: int
    degree: int
    threshold: int

    @property
    def neighbourhood(self) -> int:
        """How many hold a share of one member's secrets, itself counted."""
        return self.degree + 1 if self.degree else self.members


def neighbours(members: Sequence[int], degree: int, session_id: bytes, keys_sha256: bytes) -> dict[int, frozenset[int]]:
    """Each member's neighbours, without itself; `degree` 0, or too large for a ring, gives the full graph."""
    if degree == 0 or degree >= len(members) - 1:
        everybody = frozenset(members)
        return {member: everybody - {member} for member in members}
    order = sorted(members, key=lambda member: digest("order", session_id, keys_sha256, member))
    steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    count = len(order)
    return {member: frozenset(order[(place + step) % count] for step in steps) for place, member in enumerate(order)}


def plan_graph(members: int, corrupt: float, dropout: float) -> GraphPlan:
    """The full graph with threshold floor(2N/3) + 1 up to 128 members, beyond it the smallest ring that is safe.

    Safe: with a fraction `corrupt` of the members on the server's side no secret falls but with probability 2^-40, and
    with a fraction `dropout` gone no neighbourhood is too small but with 2^-20. Exact hypergeometric tails, with a
    union bound over the members. Raises ConfigError where no ring does.
    """
    for name, value in (("corrupt", corrupt), ("dropout", dropout)):
        if not 0 <= value < 1:
            raise ConfigError(f"{name} is {value}; it must be a fraction, at least 0 and below 1")
    if members < 2:
        raise ConfigError(f"members is {members}; a sum that hides anything needs at least 2")
    if members <= FULL_GRAPH_LIMIT:
        return GraphPlan(members, 0, full_threshold(members))
    for degree in range(2, members - 1, 2):
        found = _ring_threshold(members, degree, corrupt, dropout)
        if found is not None:
            return GraphPlan(members, degree, found)
    raise ConfigError(
        f"no graph of {members} members stands {corrupt:.0%} corrupt and {dropout:.0%} dropped out; lower one of them"
    )


def full_threshold(members: int) -> int:
    """floor(2N/3) + 1: two different sets of survivors of this size cannot both be confirmed by honest members."""
    return 2 * members // 3 + 1


def is_safe(plan: GraphPlan, traitors: int) -> bool:
    """Whether `plan` keeps secrets from a server that has `traitors` of the members on its side, but for 2^-40.

    A server that tells honest neighbours different survivors learns both secrets of a member where the corrupt ones
    in its neighbourhood of n, who give both, and the honest ones, who give one, hold 2t shares: n + c >= 2t.
    """
    if plan.degree == 0 or plan.degree >= plan.members - 1:
        return plan.members + traitors < 2 * plan.threshold
    if traitors >= plan.members:
        return False
    needed = 2 * plan.threshold - plan.neighbourhood
    failure = plan.members * _tail_at_least(plan.members - 1, traitors, plan.degree, needed)
    return failure <= 2.0**-SECURITY_BITS


def _ring_threshold(members: int, degree: int, corrupt: float, dropout: float) -> int | None:
    """The smallest safe threshold of a ring, where it is also small enough for the dropout; None if there is none."""
    traitors, gone = math.ceil(corrupt * members), math.ceil(dropout * members)
    # Those who are gone may all be honest ones, and gone before the neighbourhoods are drawn.
    heard = max(members - gone, degree + 2)
    for threshold in range(degree // 2 + 1, degree + 1):
        if all(is_safe(GraphPlan(present, degree, threshold), traitors) for present in (members, heard)):
            break
    else:
        return None
    spare = degree - threshold  # neighbours of a member that is gone itself, over those whose shares are needed
    short = members * _tail_at_least(members - 1, gone, degree, spare + 1)
    torn = members * _all_of(members, traitors + gone, degree // 2)
    return threshold if short <= 2.0**-ABORT_BITS and torn <= 2.0**-SECURITY_BITS else None


def _tail_at_least(population: int, marked: int, drawn: int, least: int) -> float:
    """P(X >= least) of a hypergeometric X: marked ones among `drawn` of `population`."""
    if least <= 0:
        return 1.0
    whole = math.comb(population, drawn)
    highest = min(marked, drawn)
    favourable = sum(
        math.comb(marked, x) * math.comb(population - marked, drawn - x) for x in range(least, highest + 1)
    )
    return favourable / whole


def _all_of(population: int, marked: int, drawn: int) -> float:
    """P(all `drawn` are marked): a run of the ring that tears it where two such runs meet."""
    return math.comb(marked, drawn) / math.comb(population, drawn) if marked >= drawn else 0.0
