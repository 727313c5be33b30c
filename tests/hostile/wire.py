"""The fuzzed conversations once more, over real gRPC against a live trunk.

By gRPC's blocking client: its other one loses the status of a call that ended while it was still writing.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from contract.wire import SESSION_METHOD
from tests.hostile.caller import OPTIONS, Outcomes, Target
from tests.hostile.conversations import Served
from tests.hostile.mutations import hostile_frames

_AT_ONCE = 4
_LIMIT_S = 60.0
_PATIENCE_S = 0.5
_BACKWARD, _CHUNK = b"\x1a", b"\x3a"


def fuzz(target: Target, served: Served, seed: int, frames: int, seconds: float) -> tuple[Outcomes, int]:
    """How at least so many frames' conversations ended, or as many as the seconds allow; the number of frames sent."""
    outcomes, sent = Outcomes(), [0] * _AT_ONCE
    ends_s = time.monotonic() + seconds

    def again(number: int) -> None:
        which = number
        with grpc.insecure_channel(target.address, options=OPTIONS) as channel:
            while sum(sent) < frames and time.monotonic() < ends_s:
                name = f"{seed}/wire/{which}"
                said = hostile_frames(random.Random(name), served)
                sent[number] += len(said)
                which += _AT_ONCE
                _converse(channel, said, outcomes, name)

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for done in [threads.submit(again, number) for number in range(_AT_ONCE)]:
            done.result()
    return outcomes, sum(sent)


def _converse(channel: grpc.Channel, frames: Sequence[bytes], outcomes: Outcomes, name: str) -> None:
    spoken = _Spoken(frames)
    call: Any = channel.stream_stream(SESSION_METHOD)(iter(spoken), timeout=_LIMIT_S)
    try:
        for answer in call:
            spoken.heard(answer)
    except grpc.RpcError:
        if call.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not call.trailing_metadata():
            outcomes.add("hung", f"{name}: the trunk neither answered nor ended it within {_LIMIT_S:g} s")
        else:
            outcomes.note(call.code(), call.details(), call.trailing_metadata(), name)
    else:
        outcomes.add("well")


class _Spoken:
    """Frames, a backward only once all before it was answered, or after a moment."""

    def __init__(self, frames: Sequence[bytes]) -> None:
        self._frames = frames
        self._owed = 0
        self._answered = threading.Condition()

    def __iter__(self) -> Iterator[bytes]:
        for frame in self._frames:
            with self._answered:
                if frame[:1] == _BACKWARD:
                    self._answered.wait_for(lambda: self._owed <= 0, _PATIENCE_S)
                self._owed += frame[:1] != _CHUNK
            yield frame

    def heard(self, answer: bytes) -> None:
        with self._answered:
            self._owed -= answer[:1] != _CHUNK
            self._answered.notify_all()
