import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.protocol import PlainSumClient, PlainSumServer
from aggregation.ring import RingVector
from contract.errors import RoundError, UpdateError


def vector(*values: int) -> RingVector:
    return np.array(values, dtype=np.uint32)


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_sum_is_exact_in_the_ring(rows: list[list[int]]) -> None:
    cohort = [str(index) for index in range(len(rows))]
    server = PlainSumServer(3, cohort)
    client = PlainSumClient(3)
    for name, row in zip(cohort, rows, strict=True):
        server.accept(name, client.upload(vector(*row)))
    total = server.finish(cohort)
    assert total.tolist() == [sum(column) % 2**32 for column in zip(*rows, strict=True)]


def test_an_upload_is_little_endian_whatever_the_machine() -> None:
    assert PlainSumClient(2).upload(vector(1, 0x01020304)) == bytes([1, 0, 0, 0, 4, 3, 2, 1])


@pytest.mark.parametrize(
    ("length", "fault"), [(0, "truncated"), (11, "truncated"), (13, "oversized"), (16, "oversized")]
)
def test_an_upload_of_the_wrong_length_is_refused_by_name_and_changes_nothing(length: int, fault: str) -> None:
    server = PlainSumServer(3, ["a", "b"])
    server.accept("a", PlainSumClient(3).upload(vector(1, 2, 3)))
    with pytest.raises(UpdateError, match=f"client b sent a {fault} update: {length} bytes, 12 are due"):
        server.accept("b", bytes(length))
    assert server.accepted == {"a"}
    assert server.finish(["a"]).tolist() == [1, 2, 3]


def test_a_second_upload_is_refused_and_counts_once() -> None:
    server = PlainSumServer(1, ["a"])
    server.accept("a", PlainSumClient(1).upload(vector(5)))
    with pytest.raises(UpdateError, match="client a sent a second update"):
        server.accept("a", PlainSumClient(1).upload(vector(7)))
    assert server.finish(["a"]).tolist() == [5]


def test_a_stranger_is_refused() -> None:
    with pytest.raises(UpdateError, match="client x .* not in this round's cohort"):
        PlainSumServer(1, ["a"]).accept("x", bytes(4))


def test_a_sum_over_other_survivors_is_refused_by_their_names() -> None:
    server = PlainSumServer(1, ["a", "b", "c"])
    server.accept("a", bytes(4))
    server.accept("b", bytes(4))
    for survivors in (["a"], ["a", "b", "c"], ["a", "c"]):
        with pytest.raises(RoundError, match="survivors; they differ in [bc]"):
            server.finish(survivors)


def test_an_empty_sum_is_refused() -> None:
    with pytest.raises(RoundError, match="nothing to average"):
        PlainSumServer(1, ["a"]).finish([])


def test_a_client_refuses_to_upload_another_shape_or_type() -> None:
    with pytest.raises(UpdateError, match=r"shape \(2,\)"):
        PlainSumClient(3).upload(vector(1, 2))
    with pytest.raises(UpdateError, match="type int64"):
        PlainSumClient(2).upload(np.zeros(2, dtype=np.int64))


def test_the_server_holds_one_vector_however_many_clients_there_are() -> None:
    size, clients = 100_000, 40
    upload = bytes(4 * size)
    server = PlainSumServer(size, [str(index) for index in range(clients)])
    tracemalloc.start()
    try:
        for index in range(clients):
            server.accept(str(index), upload)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * len(upload)
