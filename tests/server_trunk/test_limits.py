"""What clients can hold at a trunk is bounded: memory of graphs, places of calls, adapters on their way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from contract import errors
from contract import trunk_pb2 as pb
from server_trunk.server import ServeOptions, TrunkServer
from tests.server_trunk.conftest import CUT, HIDDEN, RunningTrunk
from tests.server_trunk.wire_client import Refused, WireClient

HIDDEN_BTD = torch.zeros(1, 4, HIDDEN)


def test_a_forward_over_the_pending_tokens_of_all_sessions_is_refused_until_they_are_free(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    client = WireClient(start_trunk(max_tokens=8, max_pending_tokens=8).address)
    first, second = client.session(client.hello(lora)), client.session(client.hello(lora))
    first.forward(HIDDEN_BTD)
    second.forward(HIDDEN_BTD)
    first.forward(HIDDEN_BTD, need_grad=False)
    third = client.session(client.hello(lora))
    with pytest.raises(Refused) as caught:
        third.forward(HIDDEN_BTD)
    assert caught.value.error is errors.CapacityError
    assert "4 more are over its --max-pending-tokens of 8" in caught.value.line
    first.backward(HIDDEN_BTD, microbatch=1)
    first.forward(HIDDEN_BTD)
    second.close()
    first.forward(HIDDEN_BTD)


def test_a_session_cut_off_in_a_forward_gives_its_tokens_back(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    client = WireClient(start_trunk(max_tokens=4, max_pending_tokens=4).address)
    for _ in range(3):
        session = client.session(client.hello(lora))
        with pytest.raises(Refused) as caught:
            session.forward(torch.full_like(HIDDEN_BTD, torch.nan))
        assert caught.value.error is errors.NonFiniteError


def test_a_forward_that_could_never_wait_is_told_at_the_start(model_dir: Path, tmp_path: Path) -> None:
    options = ServeOptions(str(model_dir), CUT, "127.0.0.1:0", tmp_path, max_tokens=9, max_pending_tokens=8)
    with pytest.raises(errors.ConfigError, match="max-pending-tokens is 8, less than max-tokens, 9"):
        TrunkServer(options)
