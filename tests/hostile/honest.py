"""An honest client that trains one round after the other: `python -m tests.hostile.honest TARGET_FILE CLIENT_ID RUN`.

It prints one line of JSON a round: what came of it, which is the same every time, and how long its steps took. A round
that the trunk refuses, or whose session is lost, is trained again. It ends with its stdin.
"""

from __future__ import annotations

import hashlib
import json
import queue
import select
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from contract import trunk_pb2 as pb
from contract.tls import open_channel
from contract.wire import ERROR_KEY, SESSION_METHOD, chunk_data, chunk_frames, parse_server_frame
from tests.hostile import rights
from tests.hostile.caller import OPTIONS, Target

STEPS = 6
ROWS, LENGTH = 2, 32
WAIT_S = 600.0
_AGAIN_S = 0.2


class Lost(Exception):  # noqa: N818
    """A session that the trunk refused or ended."""


class Session:
    """One stream, in which every answer is waited for."""

    def __init__(self, channel: grpc.Channel, target: Target, client_id: str, key: pb.RoundId) -> None:
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call: Any = channel.stream_stream(SESSION_METHOD)(iter(self._out.get, None), timeout=WAIT_S)
        self.digest = hashlib.sha256()
        hello = target.hello(client_id=client_id, round=key, deterministic=True)
        if target.keys:
            hello = rights.admitted(channel, hello)
        self._send([pb.ClientFrame(hello=hello).SerializeToString()])
        self._receive("welcome")

    def forward(self, target: Target, microbatch: int, hidden: np.ndarray[Any, Any]) -> None:
        self._send(target.forward(microbatch, ROWS, LENGTH, hidden.tobytes(), training=True))

    def taken(self) -> bytes:
        """The data of the next forward's answer."""
        return self._data(self._receive("forward").hidden.size_bytes)

    def backward(self, target: Target, microbatch: int, grad: bytes) -> None:
        header = pb.TensorHeader(
            dtype="float32", shape=[ROWS, LENGTH, target.hidden_size], size_bytes=len(grad), codec="identity"
        )
        body = pb.Backward(microbatch=microbatch, grad=header, want_input_grad=True, reply_codec="identity")
        self._send([pb.ClientFrame(backward=body).SerializeToString(), *chunk_frames(memoryview(grad))])
        self._data(self._receive("backward").grad.size_bytes)

    def step(self) -> None:
        step = pb.Step(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, grad_scale=1.0)
        self._send([pb.ClientFrame(step=step).SerializeToString()])
        self._receive("step")

    def close(self) -> str:
        """The SHA-256 of the adapter that was contributed."""
        close = pb.Close(trained_tokens=100, contribute=True)
        self._send([pb.ClientFrame(close=close).SerializeToString()])
        sha256 = str(self._receive("close").adapter_sha256)
        self._out.put(None)
        return sha256

    def cancel(self) -> None:
        self._call.cancel()
        self._out.put(None)

    def _send(self, frames: list[bytes]) -> None:
        for frame in frames:
            self._out.put(frame)

    def _next(self) -> bytes:
        try:
            return bytes(next(self._call))
        except StopIteration:
            raise Lost("the stream ended") from None
        except grpc.RpcError as error:
            call: Any = error
            named = dict(call.trailing_metadata() or ()).get(ERROR_KEY, "")
            raise Lost(f"{call.code().name} {named}: {call.details()}") from None

    def _receive(self, kind: str) -> Any:
        frame = parse_server_frame(self._next())
        if frame.WhichOneof("body") != kind:
            raise Lost(f"{frame.WhichOneof('body')} came in place of {kind}")
        return getattr(frame, kind)

    def _data(self, size_bytes: int) -> bytes:
        data = b""
        while len(data) < size_bytes:
            chunk = chunk_data(self._next())
            if chunk is None:
                raise Lost("another frame came in place of a chunk")
            data += bytes(chunk)
        self.digest.update(data)
        return data


def train(channel: grpc.Channel, target: Target, client_id: str, key: pb.RoundId) -> dict[str, Any]:
    """One round: the same text each time, two microbatches under way."""
    session = Session(channel, target, client_id, key)
    draw = np.random.default_rng(int(hashlib.sha256(client_id.encode()).hexdigest()[:8], 16))
    step_s, microbatch = [], 0
    try:
        for _ in range(STEPS):
            began_s = time.monotonic()
            batch = draw.standard_normal((2, ROWS, LENGTH, target.hidden_size)).astype(np.float32)
            for hidden in batch:
                microbatch += 1
                session.forward(target, microbatch, hidden)
            answers = [session.taken() for _ in batch]
            for number, answer in zip((microbatch - 1, microbatch), answers, strict=True):
                session.backward(target, number, answer)
            session.step()
            step_s.append(time.monotonic() - began_s)
        sha256 = session.close()
    finally:
        session.cancel()
    return {"adapter": sha256, "digest": session.digest.hexdigest(), "step_s": step_s}


def main(target_file: str, client_id: str, run: str) -> None:
    target = Target.read(Path(target_file))
    number = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        number += 1
        lost: list[str] = []
        began_s = time.time()
        while True:
            # A connection of its own each time, as a site's process has.
            with open_channel(target.address, rights.files(target.keys, "north"), OPTIONS) as channel:
                try:
                    told = train(channel, target, client_id, pb.RoundId(run=run, round=number, attempt=1))
                    break
                except Lost as error:
                    lost.append(str(error))
            if select.select([sys.stdin], [], [], _AGAIN_S)[0]:
                told = {"adapter": "", "digest": "", "step_s": []}
                break
        print_line({"round": number, "began_s": began_s, "ended_s": time.time(), "lost": lost, **told})


def print_line(told: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
