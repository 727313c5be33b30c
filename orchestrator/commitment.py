"""The end of a round: the trunk averages over the same clients and weights, and SQL takes both halves at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from contract.errors import AgreementError, FrameError, SessionError
from contract.records import Factor, RoundKey
from orchestrator.desk import Desk, Version
from orchestrator.stopwatch import Stopwatch
from storage.records import RoundCommit


@dataclass(frozen=True, slots=True)
class Mean:
    """What the clients' half of a round came to: the mean update of `factor`, shape (d,), over `survivors`.

    `weight` is the sum of their weights: of their trained tokens, or under `dp` of 1 each.
    """

    factor: Factor
    update_d: npt.NDArray[np.float64]
    weight: int
    survivors: Sequence[str]


def average_trunk(desk: Desk, key: RoundKey, before: Version, mean: Mean) -> str:
    """The hash of the trunk's half of the average. Raises AgreementError where it comes from other weights."""
    if desk.config.trunk_adapter == "frozen":
        return before.trunk_sha256
    try:
        average = desk.trunk.commit_round(key, before.trunk_sha256, mean.survivors)
    except (SessionError, FrameError) as error:  # a client's doing: it sent its update here and none to the trunk
        raise AgreementError(f"round {key.round}: the trunk has no average over the same clients: {error}") from error
    if average.trained_tokens != mean.weight:
        raise AgreementError(
            f"round {key.round}: the trunk averaged over {average.trained_tokens} trained tokens, the clients' "
            f"updates over {mean.weight}; the two halves of the adapter would not belong together"
        )
    return average.sha256


def commit(
    desk: Desk,
    key: RoundKey,
    before: Version,
    mean: Mean,
    trunk_sha256: str,
    metrics: Mapping[str, float],
    watch: Stopwatch,
) -> Version:
    """Keep both halves, then make the round SQL's newest version."""
    with watch.lap("storing"):
        client = before.client.moved(mean.factor, mean.update_d)
        client_sha256 = desk.artifacts.put(client.to_bytes())
        trunk_sha256 = desk.artifacts.put(desk.trunk.get_adapter(trunk_sha256))
    done = RoundCommit(
        run_id=desk.run_id,
        number=key.round,
        attempt=key.attempt,
        client_sha256=client_sha256,
        trunk_sha256=trunk_sha256,
        trained_tokens=int(metrics.get("trained_tokens", 0)),
        survivors=mean.survivors,
        seconds=watch.total_s,
        phase_seconds=watch.seconds,
        metrics=metrics,
        settle_privacy=desk.config.dp != "off",
    )
    desk.store.commit_round(done)
    desk.audience.tell(lambda one: one.committed(done))
    return Version(key.round, client, client_sha256, trunk_sha256)
