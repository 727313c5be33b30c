"""Which of several trunks a client's session goes to."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from peft import PeftModel

import clients
from clients.connection import TrunkConnection
from clients.split_model import closing_session, remote_layers
from clients.trunk_route import ReplicaRoute, trunk_route
from clients.wire_log import WireLog
from contract import trunk_pb2 as pb
from contract import wire
from contract.errors import AgreementError, CapacityError, ConfigError, ConnectionFailedError, SessionError
from contract.trunk_pb2_grpc import TrunkServicer, add_TrunkServicer_to_server
from tests.clients.conftest import ALL_LINEAR, CUT
from tests.contract.families import batch, save_model


@pytest.fixture(scope="module")
def trunks(trunk_host: Callable[..., dict[str, str]], llama_dir: Path) -> dict[str, str]:
    """Two that serve the tiny Llama, one with room for 4 sessions and one for 8; and one of another model."""
    other = save_model("llama", llama_dir.parent / "another llama", seed=9)
    same: dict[str, Any] = {"head": CUT.head, "tail": CUT.tail}
    return trunk_host(
        {
            "four": {"model": str(llama_dir), "max_sessions": 4, **same},
            "eight": {"model": str(llama_dir), "max_sessions": 8, **same},
            "other": {"model": str(other), **same},
        }
    )


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


class Refusing(TrunkServicer):
    """A trunk that describes itself as `like` with all its room, and then refuses every session."""

    def __init__(self, like: str, status: grpc.StatusCode, error: str) -> None:
        self._told = TrunkConnection(like).describe()
        self._told.open_sessions = 0
        self._refusal = status, error

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.TrunkDescription:  # noqa: N802
        return self._told

    def Session(self, request: Any, context: grpc.ServicerContext) -> Iterator[pb.ServerFrame]:  # noqa: N802
        status, error = self._refusal
        context.set_trailing_metadata(((wire.ERROR_KEY, error),))
        context.abort(status, "not here")
        yield pb.ServerFrame()


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


def load(model_dir: Path, *addresses: str) -> PeftModel:
    return clients.load_split_model(model_dir, ",".join(addresses), CUT.head, CUT.tail, ALL_LINEAR)


def chosen(model: PeftModel) -> str:
    return remote_layers(model).trunk.address


def own_order(client_id: str, addresses: list[str]) -> list[str]:
    """In which order this client takes trunks with equal room."""
    tried: list[str] = []

    def note(connection: TrunkConnection) -> None:
        tried.append(connection.address)
        raise CapacityError("full")

    route = trunk_route(",".join(addresses), client_id, WireLog())
    with pytest.raises(CapacityError):
        route.opened(note)
    route.close()
    return tried


def test_sessions_go_where_the_smallest_share_of_places_is_taken(llama_dir: Path, trunks: dict[str, str]) -> None:
    four, eight = trunks["four"], trunks["eight"]
    with ExitStack() as held:

        def taken_by(*addresses: str) -> str:
            model = load(llama_dir, *addresses)
            held.enter_context(closing_session(model))
            return chosen(model)

        assert taken_by(four) == four
        assert [taken_by(four, eight) for _ in range(2)] == [eight, eight]  # 1 of 4 against 0, then 1, of 8
        assert taken_by(eight) == eight
        assert taken_by(four, eight) == four  # 1 of 4 against 3 of 8
        assert taken_by(four, eight) == eight  # 2 of 4 against 3 of 8


def test_equal_room_is_decided_by_the_clients_id_which_spreads_them_evenly(trunks: dict[str, str]) -> None:
    addresses = [trunks["four"], trunks["eight"]]
    first = [own_order(str(number), addresses)[0] for number in range(40)]
    assert first == [own_order(str(number), addresses)[0] for number in range(40)]
    assert 10 <= first.count(addresses[0]) <= 30


def test_a_trunk_that_does_not_answer_is_passed_over_with_a_warning(
    llama_dir: Path, trunks: dict[str, str], nobody: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "trunkline"):
        model = load(llama_dir, nobody, trunks["four"])
    with closing_session(model):
        assert chosen(model) == trunks["four"]
        model(**batch().inputs()).loss.backward()
    assert f"trunk {nobody} is passed over: no trunk answers at {nobody}" in caplog.text


def test_where_none_answers_all_are_named(llama_dir: Path, nobody: str) -> None:
    with pytest.raises(ConnectionFailedError, match=rf"^no trunk answers at {nobody}, 127\.0\.0\.1:1: start one with"):
        load(llama_dir, nobody, "127.0.0.1:1")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, CapacityError),
        (grpc.StatusCode.UNAVAILABLE, ConnectionFailedError),
        (grpc.StatusCode.NOT_FOUND, SessionError),
    ],
)
def test_a_trunk_that_is_full_by_the_time_of_the_hello_is_left_for_the_next(
    llama_dir: Path, trunks: dict[str, str], status: grpc.StatusCode, error: type[Exception]
) -> None:
    with serving(Refusing(trunks["four"], status, error.__name__)) as refusing:
        with closing_session(load(llama_dir, trunks["four"])):  # so that the other one seems to have more room
            model = load(llama_dir, refusing, trunks["four"])
            with closing_session(model):
                assert chosen(model) == trunks["four"]
        with serving(Refusing(trunks["four"], status, error.__name__)) as second:
            with pytest.raises(error, match="no trunk takes a session: .*: not here; .*: not here$") as caught:
                load(llama_dir, refusing, second)
            assert refusing in str(caught.value)
            assert second in str(caught.value)


def test_another_refusal_is_not_taken_to_the_next_trunk(llama_dir: Path, trunks: dict[str, str]) -> None:
    refusal = Refusing(trunks["four"], grpc.StatusCode.FAILED_PRECONDITION, "AgreementError")
    with serving(refusal) as refusing, closing_session(load(llama_dir, trunks["four"])):
        with pytest.raises(AgreementError, match="not here"):
            load(llama_dir, refusing, trunks["four"])


def test_trunks_of_different_models_are_named_with_both_sides(llama_dir: Path, trunks: dict[str, str]) -> None:
    four, other = trunks["four"], trunks["other"]
    with pytest.raises(AgreementError) as caught:
        load(llama_dir, four, other)
    text = str(caught.value)
    assert text.startswith("the trunks of trunk-address do not serve the same: fingerprint is ")
    assert f"at {four}" in text
    assert f"at {other}" in text


def test_one_address_stays_a_plain_connection_and_several_must_be_addresses(trunks: dict[str, str]) -> None:
    assert type(trunk_route(trunks["four"], "1", WireLog())) is TrunkConnection
    assert type(trunk_route(f"{trunks['four']}, {trunks['eight']}", "1", WireLog())) is ReplicaRoute
    with pytest.raises(ConfigError, match="one of its addresses is 'nowhere'"):
        trunk_route(f"{trunks['four']},nowhere", "1", WireLog())
