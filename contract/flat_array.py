"""A flat array in numpy's file format, as a Flower message carries it, read within the memory that it really takes."""

from __future__ import annotations

from io import BytesIO
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from contract.errors import FrameError

Scalar = TypeVar("Scalar", bound=np.generic)

HEADER_BYTES = 4096
"""More than the header of any flat array takes."""


def read_flat(data: bytes, dtype: type[Scalar], what: str) -> npt.NDArray[Scalar]:
    """The elements, read-only, without a copy. Raises FrameError unless `data` is one flat array of `dtype`.

    numpy's own reader takes the memory that a header claims before it looks at what follows.
    """
    stream = BytesIO(data)
    try:
        version = npy.read_magic(stream)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, found = read_header(stream)
    except (ValueError, TypeError, EOFError) as error:
        raise FrameError(f"{what} is no array: {type(error).__name__}") from error
    start, wanted = stream.tell(), np.dtype(dtype)
    body_bytes = len(data) - start
    if found != wanted or len(shape) != 1 or shape[0] * wanted.itemsize != body_bytes:
        raise FrameError(f"{what} is {found} of shape {shape} in {body_bytes} bytes; it must be flat {wanted}")
    return np.frombuffer(data, dtype=wanted, offset=start)
