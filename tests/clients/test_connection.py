"""What a client is told when the trunk is not there, not the right one, goes away, or does not answer."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

import clients
from clients.connection import FrameStream, TrunkConnection
from clients.wire_log import WireLog
from contract import wire
from contract.errors import AgreementError, ConfigError, ConnectionFailedError, DeadlineError, SessionError
from contract.records import RoundKey
from contract.trunk_pb2 import ClientFrame, Hello, Lora
from tests.clients.conftest import ALL_LINEAR, CUT, opened
from tests.conftest import TrunkProcess
from tests.contract.families import batch, save_model
from tests.contract.parity import trained_adapter


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def other_trunk(trunk_process: Callable[..., TrunkProcess], llama_dir: Path) -> Iterator[TrunkProcess]:
    """One that the tests of this module may stop and kill."""
    process = trunk_process(llama_dir, CUT.head, CUT.tail)
    yield process
    process.kill()


def load(model_dir: Path, address: str, head: int = CUT.head, **more: object) -> PeftModel:
    return clients.load_split_model(model_dir, address, head, CUT.tail, ALL_LINEAR, **more)  # type: ignore[arg-type]


def test_nothing_listening_is_one_line_that_names_the_address(llama_dir: Path, free_port: int) -> None:
    address = f"127.0.0.1:{free_port}"
    started = time.monotonic()
    with pytest.raises(ConnectionFailedError, match=rf"^no trunk answers at {address}: .*trunk serve") as caught:
        load(llama_dir, address)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert time.monotonic() - started < 8


def test_something_that_never_answers_is_given_up(llama_dir: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        connection = TrunkConnection(f"127.0.0.1:{silent.getsockname()[1]}", connect_timeout_s=0.5)
        with pytest.raises(ConnectionFailedError, match="no trunk answers"):
            connection.describe()


@pytest.mark.parametrize("address", ["", "localhost", "127.0.0.1:", ":50051", "127.0.0.1:http"])
def test_an_address_must_be_host_and_port(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        TrunkConnection(address)


def test_another_model_is_refused_with_both_fingerprints(trunk: TrunkProcess, tmp_path: Path) -> None:
    other = save_model("llama", tmp_path / "other", seed=1)
    served = TrunkConnection(trunk.address).describe().model.fingerprint
    with pytest.raises(AgreementError, match=rf"^fingerprint is '\w+' at the client and '{served}' at the trunk$"):
        load(other, trunk.address)


def test_another_cut_is_refused_with_both_cuts(trunk: TrunkProcess, llama_dir: Path) -> None:
    with pytest.raises(AgreementError, match="head_layers is 2 at the client and 1 at the trunk"):
        load(llama_dir, trunk.address, head=2)


def test_an_adapter_that_the_trunk_does_not_hold_is_refused_by_its_own_error(
    trunk: TrunkProcess, llama_dir: Path
) -> None:
    connection = TrunkConnection(trunk.address)
    stream = connection.open_stream(5.0)
    hello = Hello(
        protocol=wire.PROTOCOL,
        model=connection.describe().model,
        lora=Lora(rank=1, alpha=1.0),
        adapter_sha256="0" * 64,
        trainable="B",
        codecs=["identity"],
    )
    stream.send(ClientFrame(hello=hello))
    with pytest.raises(SessionError, match=f"trunk at {trunk.address}: .*{'0' * 64}"):
        stream.receive("welcome")


def test_a_trunk_that_does_not_answer_ends_the_session_in_time(llama_dir: Path, other_trunk: TrunkProcess) -> None:
    model = load(llama_dir, other_trunk.address, timeout_s=1.0)
    loss = model(**batch().inputs()).loss
    os.kill(other_trunk.process.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(DeadlineError, match="did not answer within 1 s"):
            loss.backward()
        assert time.monotonic() - started < 5
        with pytest.raises(DeadlineError):
            model(**batch().inputs())
    finally:
        os.kill(other_trunk.process.pid, signal.SIGCONT)


class SlowCall:
    """A call whose trunk sends, and takes, a chunk of one byte each `every_s`, for as long as anybody likes."""

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s
        self.over = threading.Event()
        self.taken: list[bytes] = []

    def __call__(self, frames: Iterator[bytes], metadata: object) -> SlowCall:
        threading.Thread(target=self._take, args=(frames,), daemon=True).start()
        return self

    def _take(self, frames: Iterator[bytes]) -> None:
        for frame in frames:
            self.taken.append(frame)
            if self.over.wait(self.every_s):
                return

    def __next__(self) -> bytes:
        time.sleep(self.every_s)
        return wire.chunk_frame(memoryview(b"x"))

    def done(self) -> bool:
        return self.over.is_set()

    def cancel(self) -> None:
        self.over.set()


def slow_stream(call: SlowCall, timeout_s: float) -> FrameStream:
    method: Any = call
    return FrameStream(method, "slow:1", timeout_s, WireLog())


def test_a_tensor_that_comes_a_byte_now_and_then_is_given_up_as_a_whole() -> None:
    call = SlowCall(0.02)
    chunks = slow_stream(call, timeout_s=0.3).receive_chunks(100, "the hidden states")
    with pytest.raises(DeadlineError) as caught:
        list(islice(chunks, 100))
    assert str(caught.value) == (
        "the trunk at slow:1 did not send all of the hidden states in time: at least 64 KiB/s must move"
    )
    assert call.done()


def test_a_tensor_that_is_taken_a_byte_now_and_then_is_given_up_as_a_whole() -> None:
    call = SlowCall(0.02)
    stream = slow_stream(call, timeout_s=0.3)
    with pytest.raises(DeadlineError, match="did not take all of a tensor in time: at least 64 KiB/s must move"):
        stream.send_chunks(wire.chunk_frames(memoryview(bytes(100)), 1), 100)
    assert call.done()
    assert len(call.taken) < 100


def test_a_tensor_may_take_the_longer_the_larger_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SLOWEST_BYTES_S", 4)
    chunks = slow_stream(SlowCall(0.06), timeout_s=2.0).receive_chunks(40, "the hidden states")
    assert b"".join(next(chunks) for _ in range(40)) == b"x" * 40


def test_a_trunk_that_dies_ends_the_session_and_nothing_reconnects(llama_dir: Path, other_trunk: TrunkProcess) -> None:
    model = load(llama_dir, other_trunk.address)
    model(**batch().inputs()).loss.backward()
    call = weakref.ref(clients.split_model.remote_layers(model).trunk._stream._call)
    other_trunk.kill()
    with pytest.raises(ConnectionFailedError, match=f"{other_trunk.address} broke .* start a new one") as caught:
        model(**batch().inputs())
    assert caught.value is not None  # whoever keeps the error, the call is gone: see the test below
    assert call() is None
    with pytest.raises((ConnectionFailedError, SessionError)):
        model(**batch().inputs())


@pytest.mark.parametrize("end", [clients.close, lambda model: clients.split_model.remote_layers(model).trunk.abandon()])
def test_a_session_that_is_over_leaves_nothing_for_the_interpreters_end(
    end: Callable[[PeftModel], object], llama_dir: Path, trunk: TrunkProcess
) -> None:
    """gRPC's call takes a lock when it is collected, which a thread that the interpreter stopped may hold for ever."""
    model = load(llama_dir, trunk.address)
    model(**batch().inputs()).loss.backward()
    call = weakref.ref(clients.split_model.remote_layers(model).trunk._stream._call)
    assert call() is not None
    end(model)
    assert call() is None
    with pytest.raises(SessionError, match="is over: start a new one"):
        model(**batch().inputs())


def test_one_clients_session_does_not_end_anothers(llama_dir: Path, trunk: TrunkProcess) -> None:
    tensors = trained_adapter(llama_dir, ALL_LINEAR)
    key = RoundKey("neighbours", 1, 1)
    with opened(llama_dir, trunk.address, CUT, tensors, key=key, client_id="a") as first:
        with opened(llama_dir, trunk.address, CUT, tensors, key=key, client_id="b") as second:
            expected = second(**batch().inputs()).loss
            clients.split_model.remote_layers(first).trunk.abandon()
            assert second(**batch().inputs()).loss == expected
