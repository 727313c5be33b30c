"""A flat array in numpy's format: read back as written, refused by name where header and body disagree."""

from __future__ import annotations

import tracemalloc
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.lib import format as npy

from contract.errors import FrameError
from contract.flat_array import HEADER_BYTES, read_flat


def written(array: np.ndarray) -> bytes:
    stream = BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def headed(shape: tuple[int, ...], body: bytes) -> bytes:
    stream = BytesIO()
    npy.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue() + body


@given(arrays(np.float32, st.integers(0, 300)))
def test_what_numpy_wrote_is_read_back_bit_for_bit(array_d: np.ndarray) -> None:
    data = written(array_d)
    assert read_flat(data, np.float32, "it").tobytes() == array_d.tobytes()
    assert len(data) - array_d.nbytes <= HEADER_BYTES


@given(st.binary(max_size=400))
def test_bytes_of_another_kind_are_refused(data: bytes) -> None:
    with pytest.raises(FrameError, match="the thing is no array"):
        read_flat(data, np.float32, "the thing")


@given(st.integers(0, 200), st.integers(-200, 200).filter(bool))
def test_a_body_of_another_length_than_the_header_says_is_refused(size: int, change: int) -> None:
    body = bytes(max(0, 4 * size + change))
    if len(body) != 4 * size:
        with pytest.raises(FrameError, match="must be flat float32"):
            read_flat(headed((size,), body), np.float32, "the thing")


@pytest.mark.parametrize(
    "array", [np.zeros(4, np.float64), np.zeros((2, 2), np.float32), np.float32(1), np.zeros(4, ">f4")]
)
def test_another_type_or_shape_is_refused(array: np.ndarray) -> None:
    with pytest.raises(FrameError, match="must be flat float32"):
        read_flat(written(np.asarray(array)), np.float32, "the thing")


def test_an_array_of_objects_is_not_unpickled() -> None:
    stream = BytesIO()
    np.save(stream, np.array([object], dtype=object), allow_pickle=True)
    with pytest.raises(FrameError):
        read_flat(stream.getvalue(), np.float32, "the thing")


def test_a_header_that_claims_a_terabyte_takes_no_memory() -> None:
    data = headed((1 << 38,), b"few")
    tracemalloc.start()
    with pytest.raises(FrameError, match="in 3 bytes"):
        read_flat(data, np.float32, "the thing")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20
