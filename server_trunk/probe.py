"""What this machine gains from, measured at start on made-up activations: how large passes, how many, in what type.

Forwards alone are timed, without adapters: what a pass gains from more rows, from a lane of its own or from bfloat16 is
in its matrix products, and a backward has twice as many of the same.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from server_trunk.lane import Lane

logger = logging.getLogger("trunkline.server_trunk")

SIZES = (64, 128, 256, 512, 1024, 2048)
_GAIN = 0.05  # what is less than this is noise, or not worth its price
_REPEATS = 3
_PATIENCE_S = 10.0
DEFAULT_BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Findings:
    """`batch_tokens`: B * T above which a pass gains nothing from more; `lanes`: of those there are, how many to use.

    `autocast_dtype` is "bfloat16" where a pass gains from it, else "".
    """

    batch_tokens: int
    lanes: int
    autocast_dtype: str

    def summary(self) -> str:
        gained = self.autocast_dtype or "nothing"
        return f"passes of up to {self.batch_tokens} tokens, {self.lanes} at once; autocast gains from: {gained}"


def probe(lanes: Sequence[Lane], threads: int, *, patience_s: float = _PATIENCE_S) -> Findings:
    """Times passes on `lanes`, on threads of its own, for about `patience_s` at most; defaults where that is too short.

    `threads` are all of PyTorch's.
    """
    share = max(1, threads // len(lanes))
    timed = Timings(lanes, patience_s)
    batch_tokens = timed.best_size(share)
    if batch_tokens is None:
        logger.info("a pass takes too long to try several: %d tokens in one are taken on trust", DEFAULT_BATCH_TOKENS)
        return Findings(DEFAULT_BATCH_TOKENS, len(lanes), "")
    together_s = timed.seconds(lanes, batch_tokens, share) / len(lanes)
    alone_s = timed.seconds(lanes[:1], batch_tokens, threads)
    plain_s = timed.seconds(lanes[:1], batch_tokens, share)
    cast_s = timed.seconds(lanes[:1], batch_tokens, share, "bfloat16")
    return Findings(
        batch_tokens,
        len(lanes) if together_s <= alone_s * (1 + _GAIN) else 1,
        "bfloat16" if cast_s < plain_s * (1 - _GAIN) else "",
    )


class Timings:
    """Seconds of passes, each the median of a few, while the time for them lasts."""

    def __init__(
        self, lanes: Sequence[Lane], patience_s: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._lanes = lanes
        self._ends_s = clock() + patience_s
        self._patience_s = patience_s
        self._clock = clock

    def best_size(self, threads: int) -> int | None:
        """The smallest size within a few percent of the best per token; None where even the smallest takes too long."""
        per_token: dict[int, float] = {}
        for size in SIZES:
            if per_token and self._clock() + 2 * size * min(per_token.values()) * _REPEATS > self._ends_s:
                break
            per_token[size] = self.seconds(self._lanes[:1], size, threads) / size
            if per_token[size] * SIZES[0] * _REPEATS > self._patience_s / 10:
                return None
        best = min(per_token.values())
        return next(size for size, cost in per_token.items() if cost <= best * (1 + _GAIN))

    def seconds(self, lanes: Sequence[Lane], tokens: int, threads: int, autocast_dtype: str = "") -> float:
        """Until each of `lanes` has done one pass of `tokens`, all at once."""
        with ThreadPoolExecutor(len(lanes)) as pool:
            for _ in pool.map(lambda lane: _once(lane, tokens, threads, autocast_dtype), lanes):
                continue
            readings = []
            for _ in range(_REPEATS):
                began_s = self._clock()
                for _ in pool.map(lambda lane: _once(lane, tokens, threads, autocast_dtype), lanes):
                    continue
                readings.append(self._clock() - began_s)
        return statistics.median(readings)


def _once(lane: Lane, tokens: int, threads: int, autocast_dtype: str) -> None:
    lane.use_threads(threads)
    lane.try_out(tokens, autocast_dtype)
    if lane.device == "cuda":
        torch.cuda.synchronize()
