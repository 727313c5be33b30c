"""Which codec a session's tensors cross the wire by; under `auto`, picked from what link and computers are measured at.

No torch and no gRPC. A microbatch crosses twice, forward and backward, each time both ways. With W requests in flight a
microbatch takes the longest of: the client's work, the trunk's, the bytes of either direction, and a W-th of all of it
with its two round trips. `auto` takes the least lossy codec by which that is no more than 5 % above what it would be
with tensors of no size at all.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from contract.errors import AgreementError, ConfigError, ConnectionFailedError
from contract.records import DELTA_CODEC, gradient_codec

logger = logging.getLogger("trunkline.clients")

AUTO = "auto"
AUTO_CODECS = ("identity", "bf16", "int8")
"""What `auto` picks from, the least lossy first; fp16 is as large as bf16 and overflows."""
TOLERATED_COST = 0.05
RELAXED_COST = TOLERATED_COST / 2
"""As cheap a less lossy codec must be before it comes back, or a link at the limit would change codecs all the time."""
WINDOW = 6
FIRST_DECISION, DECISION_EVERY = 2, 32
_TINY_S = 1e-6

Direction = Literal["forward", "backward"]
_DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclass(frozen=True, slots=True)
class WireCodecs:
    """The codec of activations and that of gradients, either of them perhaps `auto`."""

    forward: str = "identity"
    backward: str = "identity"

    @classmethod
    def named(cls, codec: str, codec_backward: str, known: Collection[str]) -> WireCodecs:
        """As a setting names them, `same` for the other's. Raises ConfigError unless both are `known` or `auto`.

        `int4-delta`, of activations alone, need not be among those.
        """
        found = cls(codec, gradient_codec(codec, codec_backward))
        for key, name, more in (("codec", codec, (DELTA_CODEC, AUTO)), ("codec-backward", found.backward, (AUTO,))):
            if name not in (*known, *more):
                raise ConfigError(f"{key} is {name!r}; it must be one of {', '.join((*known, *more))}")
        return found

    def __str__(self) -> str:
        return self.forward if self.forward == self.backward else f"{self.forward} and {self.backward} back"

    def offered(self) -> list[str]:
        """What the hello says that this client may use."""
        automatic = AUTO_CODECS if AUTO in (self.forward, self.backward) else ()
        return list(dict.fromkeys([*self._named(), *automatic]))

    def _named(self) -> list[str]:
        named = [name for name in (self.forward, self.backward) if name != AUTO]
        return [*named, DELTA_START] if self.forward == DELTA_CODEC else named

    def require_accepted(self, accepted: Collection[str], address: str) -> None:
        """Raise AgreementError unless the trunk takes each named codec, and for `auto` one at least."""
        lost = set(self._named()) - set(accepted)
        automatic = AUTO not in (self.forward, self.backward) or set(accepted) & set(AUTO_CODECS)
        if lost or not automatic:
            raise AgreementError(
                f"this client's codecs are {', '.join(self.offered())}; of those the trunk at {address} takes "
                f"{', '.join(accepted) or 'none'}: name another codec"
            )


EXACT = WireCodecs()
DELTA_START = "int8"
"""What goes in full by int4-delta, and what crosses without training."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its reply. Times are of one clock, in seconds; sizes in bytes.

    `sizes` is what the tensor takes by each codec. `answered_s` is when the reply's first frame had come, `held_s` how
    long the trunk held the whole request before it, `work_s` how long the client worked since the exchange before.
    """

    sizes: Mapping[str, int]
    sent_bytes: int
    received_bytes: int
    started_s: float
    answered_s: float
    ended_s: float
    held_s: float
    work_s: float = 0.0

    @property
    def trunk_s(self) -> float:
        """What can be true of `held_s`, which is the trunk's own word."""
        told_s = 0.0 if math.isnan(self.held_s) else self.held_s
        return min(max(told_s, 0.0), self.answered_s - self.started_s)


@dataclass(frozen=True, slots=True)
class Measured:
    """One microbatch on a link: seconds of work, bytes a second each way, and bytes each way by codec and direction.

    A rate is infinite where a direction took no time that could be measured.
    """

    client_s: float
    trunk_s: float
    round_trip_s: float
    up_rate: float
    down_rate: float
    up_bytes: Mapping[Direction, Mapping[str, float]]
    down_bytes: Mapping[Direction, Mapping[str, float]]

    def cost(self, codecs: WireCodecs, in_flight: int = 1) -> float:
        """How much longer a microbatch takes than one whose tensors had no size, as a share of that."""
        up_s = self._bytes(self.up_bytes, codecs) / self.up_rate
        down_s = self._bytes(self.down_bytes, codecs) / self.down_rate
        return self._step_s(up_s, down_s, in_flight) / self._step_s(0.0, 0.0, in_flight) - 1.0

    def _step_s(self, up_s: float, down_s: float, in_flight: int) -> float:
        one_by_one_s = self.client_s + self.trunk_s + 2 * self.round_trip_s + up_s + down_s
        return max(self.client_s, self.trunk_s, up_s, down_s, one_by_one_s / in_flight, _TINY_S)

    @staticmethod
    def _bytes(sizes: Mapping[Direction, Mapping[str, float]], codecs: WireCodecs) -> float:
        return sizes["forward"][codecs.forward] + sizes["backward"][codecs.backward]

    def __str__(self) -> str:
        return (
            f"{_rate(self.up_rate)} up, {_rate(self.down_rate)} down, round trip {1e3 * self.round_trip_s:.3g} ms, "
            f"a microbatch's work {1e3 * self.client_s:.3g} ms here and {1e3 * self.trunk_s:.3g} ms at the trunk"
        )


def measure(forwards: Collection[Exchange], backwards: Collection[Exchange], round_trip_s: float) -> Measured:
    """What the last exchanges, at least one of each kind, tell."""
    exchanges = (*forwards, *backwards)
    up_s = sum(max(one.answered_s - one.started_s - one.trunk_s - round_trip_s, 0.0) for one in exchanges)
    down_s = sum(one.ended_s - one.answered_s for one in exchanges)
    received_bytes = sum(one.received_bytes for one in exchanges)
    answered = sum(one.received_bytes > 0 for one in backwards) / len(backwards)
    sizes: dict[Direction, dict[str, float]] = {"forward": _mean_sizes(forwards), "backward": _mean_sizes(backwards)}
    returned = {name: answered * size for name, size in sizes["backward"].items()}
    return Measured(
        client_s=sum(statistics.median(one.work_s for one in kind) for kind in (forwards, backwards)),
        trunk_s=sum(statistics.median(one.trunk_s for one in kind) for kind in (forwards, backwards)),
        round_trip_s=round_trip_s,
        up_rate=sum(one.sent_bytes for one in exchanges) / max(up_s, _TINY_S),
        down_rate=received_bytes / max(down_s, _TINY_S) if received_bytes else math.inf,
        up_bytes=sizes,
        down_bytes={"forward": sizes["forward"], "backward": returned},
    )


def choose(measured: Measured, candidates: Sequence[WireCodecs], current: WireCodecs, in_flight: int = 1) -> WireCodecs:
    """Of `candidates`, the least lossy first, the first that costs no more than it may; else the cheapest."""
    now = candidates.index(current)
    costs = [measured.cost(codecs, in_flight) for codecs in candidates]
    for place, cost in enumerate(costs):
        if cost <= (RELAXED_COST if place < now else TOLERATED_COST):
            return candidates[place]
    return candidates[costs.index(min(costs))]


class CodecPolicy:
    """The codecs that the next tensors go by. Without `auto` they stay as they are, and nothing is measured.

    Only exchanges that had the link to themselves tell its rates. Bounded: the last WINDOW of each kind count, so that
    a link that changes is followed. Safe to use from several threads.
    """

    def __init__(self, asked: WireCodecs, accepted: Collection[str], round_trip_s: Callable[[], float]) -> None:
        """`round_trip_s` measures it, and may raise ConnectionFailedError; `accepted` is the welcome's."""
        self.automatic = AUTO in (asked.forward, asked.backward)
        levels = [name for name in AUTO_CODECS if name in accepted] if self.automatic else [""]
        self._candidates = [
            WireCodecs(*(level if name == AUTO else name for name in (asked.forward, asked.backward)))
            for level in levels
        ]
        self.now = self._candidates[0]
        self._measure_round_trip = round_trip_s
        self._round_trips_s: deque[float] = deque(maxlen=WINDOW)
        self._seen: dict[Direction, deque[Exchange]] = {name: deque(maxlen=WINDOW) for name in _DIRECTIONS}
        self._ended_s: float | None = None
        self._lock = threading.Lock()
        self._under_way = 0
        self._crowds = 0  # how often an exchange began beside another one
        self._most_under_way = 1  # since the last decision
        self._since = -FIRST_DECISION  # microbatches that count for the next decision

    @property
    def wanted_alone(self) -> int:
        """How many microbatches should be sent one by one now, so that the link can be measured."""
        if not self.automatic:
            return 0
        return -self._since if self._since < 0 else int(self._since >= DECISION_EVERY)

    def begins(self) -> int:
        """An exchange begins; answers what `ends` asks for."""
        with self._lock:
            self._under_way += 1
            self._crowds += self._under_way > 1
            self._most_under_way = max(self._most_under_way, self._under_way)
            return self._crowds if self._under_way == 1 else -1

    def ends(self, began: int, direction: Direction | None, exchange: Callable[[], Exchange]) -> None:
        """An exchange that was `begins`' `began` is over; `direction` is None without training."""
        with self._lock:
            self._under_way -= 1
            alone = began == self._crowds
        if self.automatic and direction is not None:
            self._observe(direction, exchange() if alone else None)

    def _observe(self, direction: Direction, exchange: Exchange | None) -> None:
        before_s, self._ended_s = self._ended_s, None if exchange is None else exchange.ended_s
        if exchange is not None and before_s is not None:  # else it is not known how long the client worked before it
            self._seen[direction].append(replace(exchange, work_s=max(exchange.started_s - before_s, 0.0)))
        if direction == "forward":
            return
        self._since += 1
        measured = exchange is not None and all(self._seen.values())
        if measured and (self._since == 0 or self._since > DECISION_EVERY):
            self._decide(first=self._since == 0)

    def _decide(self, *, first: bool) -> None:
        try:
            self._round_trips_s.append(self._measure_round_trip())
        except ConnectionFailedError as error:
            logger.info("codec auto: the round trip could not be measured: %s", error)
        measured = measure(self._seen["forward"], self._seen["backward"], min(self._round_trips_s, default=0.0))
        in_flight = max(1, self._most_under_way)
        before, self.now = self.now, choose(measured, self._candidates, self.now, in_flight)
        if self.now != before or first:
            costs = ", ".join(f"{each} {100 * measured.cost(each, in_flight):.1f} %" for each in self._candidates)
            logger.info("codec auto: %s after %s: %s; added to a microbatch: %s", self.now, before, measured, costs)
        self._since, self._most_under_way = 0, 1


class Timing:
    """The times of one exchange, from the moment that its request goes out."""

    def __init__(self, policy: CodecPolicy) -> None:
        self._policy = policy

    def begins(self, sizes: Callable[[], Mapping[str, int]], sent_bytes: int) -> None:
        """`sizes` are the tensor's by each codec."""
        self._sizes = sizes() if self._policy.automatic else {}
        self._sent_bytes = sent_bytes
        self._began = self._policy.begins()
        self._started_s = time.monotonic()

    def answered(self, held_s: float, size_bytes: int) -> None:
        """The reply's first frame has come, before its tensor of `size_bytes`."""
        self._answered_s, self._held_s, self._received_bytes = time.monotonic(), held_s, size_bytes

    def ends(self, direction: Direction | None) -> None:
        """The reply's tensor has come, where one was due."""
        self._policy.ends(self._began, direction, self._exchange)

    def _exchange(self) -> Exchange:
        return Exchange(
            sizes=self._sizes,
            sent_bytes=self._sent_bytes,
            received_bytes=self._received_bytes,
            started_s=self._started_s,
            answered_s=self._answered_s,
            ended_s=time.monotonic(),
            held_s=self._held_s,
        )


def _mean_sizes(exchanges: Collection[Exchange]) -> dict[str, float]:
    names = next(iter(exchanges)).sizes
    return {name: statistics.fmean(one.sizes[name] for one in exchanges) for name in names}


def _rate(rate: float) -> str:
    return f"{8e-6 * rate:.3g} Mbit/s"
