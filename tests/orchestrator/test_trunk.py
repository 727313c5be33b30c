"""The orchestrator's calls to a real trunk, and what it makes of a trunk that fails."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from contract import trunk_pb2 as pb
from contract import wire
from contract.config import RunConfig
from contract.errors import (
    AgreementError,
    ConnectionFailedError,
    DeadlineError,
    IntegrityError,
    SessionError,
    TrunklineError,
)
from contract.records import NOTHING_SEEN, RoundKey
from contract.trunk_pb2_grpc import TrunkServicer, add_TrunkServicer_to_server
from orchestrator.adapters import draw_first_adapter
from orchestrator.trunk import Trunk
from tests.orchestrator.conftest import SETTINGS, LiveTrunk

KEY = RoundKey("a-run", 1, 1)


@contextmanager
def serving(servicer: TrunkServicer) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    add_TrunkServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def test_an_adapter_comes_back_as_it_was_put(live_trunk: LiveTrunk, tiny_model: object) -> None:
    trunk = Trunk(live_trunk.address)
    data = draw_first_adapter(RunConfig.from_flower({**SETTINGS, "lora-r": 64}), tiny_model).trunk  # type: ignore[arg-type]
    sha256 = trunk.put_adapter(data)
    assert trunk.put_adapter(data) == sha256
    assert trunk.get_adapter(sha256) == data


def test_an_unknown_round_has_made_no_progress(live_trunk: LiveTrunk) -> None:
    assert Trunk(live_trunk.address).progress(KEY) == NOTHING_SEEN


def test_the_trunks_own_error_comes_through_by_its_class(live_trunk: LiveTrunk) -> None:
    with pytest.raises(SessionError, match="does not hold adapter 0000"):
        Trunk(live_trunk.address).commit_round(KEY, "0" * 64, ["1"])


def test_nothing_that_answers_is_a_connection_error_with_its_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConnectionFailedError, match=f"trunk at {address} does not answer: start it with"):
            Trunk(address).describe()


def test_a_trunk_that_hangs_is_not_waited_for() -> None:
    class Hanging(TrunkServicer):
        def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.TrunkDescription:  # noqa: N802
            time.sleep(2.0)
            return pb.TrunkDescription()

    with serving(Hanging()) as address:
        started = time.monotonic()
        with pytest.raises(DeadlineError, match="did not answer in time"):
            Trunk(address, answer_timeout_s=0.3).describe()
        assert time.monotonic() - started < 1.5


def test_a_trunk_of_another_protocol_is_named() -> None:
    class Newer(TrunkServicer):
        def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.TrunkDescription:  # noqa: N802
            return pb.TrunkDescription(protocol=99)

    told = f"speaks protocol 99, this orchestrator {wire.PROTOCOL}"
    with serving(Newer()) as address, pytest.raises(AgreementError, match=told):
        Trunk(address).describe()


def test_an_adapter_with_other_bytes_than_its_name_is_refused() -> None:
    class Lying(TrunkServicer):
        def GetAdapter(self, request: pb.GetAdapterRequest, context: grpc.ServicerContext) -> Iterator[pb.AdapterChunk]:  # noqa: N802
            yield pb.AdapterChunk(sha256=request.sha256, size_bytes=3, data=b"odd")

    with serving(Lying()) as address, pytest.raises(IntegrityError, match="sent .* for adapter 0000"):
        Trunk(address).get_adapter("0" * 64)


def test_a_failure_without_a_name_is_still_one_line() -> None:
    with (
        serving(TrunkServicer()) as address,
        pytest.raises(TrunklineError, match="failed with UNIMPLEMENTED") as caught,
    ):
        Trunk(address).describe()
    assert "\n" not in str(caught.value)
