"""How long an idle OpenMP thread spins before it sleeps: read by OpenMP once, when torch is imported."""

from __future__ import annotations

from collections.abc import Mapping

# A small fraction of a millisecond. Never spinning wakes a sleeping thread in every parallel region, which made a step
# on two cores a fifth slower; the default spins for milliseconds, on a core that the process at the other end of the
# stream needs just then, and cost as much.
SPIN_COUNT = "10000"


def waiting(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a process which shares its cores with others should be started with.

    Nothing where `environment` already says how to wait.
    """
    told = environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    return {} if told else {"GOMP_SPINCOUNT": SPIN_COUNT}
