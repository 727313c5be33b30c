"""A forward's small inputs, without a server."""

from __future__ import annotations

import pytest

from contract import trunk_pb2 as pb
from contract.errors import FrameError
from server_trunk.requests import read_forward

HIDDEN = pb.TensorHeader(dtype="float32", shape=[1, 4, 8], size_bytes=128)


def test_a_model_without_a_position_limit_sets_none() -> None:
    forward = pb.Forward(hidden=HIDDEN, position_ids=[0, 1, 2, 1 << 20])
    inputs = read_forward(forward, "identity", hidden_size=8, max_tokens=4, max_positions=None)
    assert inputs.position_ids is not None
    assert inputs.position_ids.tolist() == [[0, 1, 2, 1 << 20]]
    with pytest.raises(FrameError, match="forward.position_ids holds 1048576; they must be 0 to 3"):
        read_forward(forward, "identity", hidden_size=8, max_tokens=4, max_positions=4)
