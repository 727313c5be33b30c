"""Leader and follower in one process, by orders that go from hand to hand: each holds the whole trunk here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from contract.adapter import resolve_lora
from contract.errors import ConfigError, FrameError
from contract.partition import blank_part, load_part
from server_trunk import sharded_lane
from server_trunk.graph_meter import GraphMeter
from server_trunk.lane import Backward, Forward, Lane
from server_trunk.ranks import Member
from server_trunk.session_adapter import SessionAdapter
from server_trunk.sharded_lane import Follower, ShardedLane
from tests.server_trunk.conftest import CUT, HIDDEN, trunk_only

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LORAS = (
    LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], use_rslora=True),
)


class ByHand:
    """Takes the leader's orders, as text, to the follower."""

    member = Member(0, 2)

    def __init__(self) -> None:
        self._orders: deque[tuple[str, list[Tensor]]] = deque()

    @contextmanager
    def in_step(self) -> Iterator[None]:
        yield

    def tell(self, order: Mapping[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        self._orders.append((json.dumps(dict(order)), [one.detach().clone() for one in tensors]))

    def hear(self) -> tuple[dict[str, Any], list[Tensor]]:
        text, tensors = self._orders.popleft()
        return json.loads(text), tensors

    def sum_(self, tensor: Tensor) -> None:
        """Each has the whole layer, so that there is nothing to add."""

    @property
    def waiting(self) -> bool:
        return bool(self._orders)


@pytest.fixture
def pair(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ShardedLane, Follower, ByHand]:
    monkeypatch.setattr(sharded_lane, "shares_of", lambda model, ranks: {})
    ranks = ByHand()
    model = load_part(model_dir, CUT, "trunk")
    leader = ShardedLane(model, blank_part(model_dir, CUT, "trunk"), CUT, "cpu", GraphMeter(model), ranks)  # type: ignore[arg-type]
    follower = Follower(load_part(model_dir, CUT, "trunk"), CUT, "cpu", ranks)  # type: ignore[arg-type]
    return leader, follower, ranks


@pytest.fixture
def plain(model_dir: Path) -> Lane:
    model = load_part(model_dir, CUT, "trunk")
    return Lane(model, CUT, "cpu", GraphMeter(model))


def followed(follower: Follower, ranks: ByHand) -> None:
    while ranks.waiting:
        follower.step()


def adapters(lane: Lane, model_dir: Path) -> list[SessionAdapter]:
    opened = [lane.slots.open(trunk_only(resolve_lora(model_dir, lora)), seed, "AB") for seed, lora in enumerate(LORAS)]
    for seed, adapter in enumerate(opened):
        adapter.values_P.copy_(torch.randn(adapter.values_P.shape, generator=torch.Generator().manual_seed(seed)) / 8)
    return opened


def forwards(opened: Sequence[SessionAdapter]) -> list[Forward]:
    return [
        Forward(adapter, torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(rank)), None, None)
        for adapter in opened
        for rank in (adapter.layout.spec.rank,)
    ]


def results(lane: Lane, opened: Sequence[SessionAdapter], *, keep: bool) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Of two sessions in one pass: outputs, gradients of the inputs and of the adapters."""
    answers = lane.forward(forwards(opened), keep=keep)
    asked = [
        Backward(adapter, graph, torch.ones_like(output_BTD), True, reset=True)
        for adapter, (output_BTD, graph) in zip(opened, answers, strict=True)
    ]
    grads = [lane.backward([one])[0][0] for one in asked] if not keep else [grad for grad, _ in lane.backward(asked)]
    return [
        (output_BTD, grad, adapter.accumulator().clone())
        for (output_BTD, _), grad, adapter in zip(answers, grads, opened, strict=True)
    ]


@pytest.mark.parametrize("keep", [True, False])
def test_sessions_of_other_ranks_share_a_pass_and_get_their_own_results(
    pair: tuple[ShardedLane, Follower, ByHand], plain: Lane, model_dir: Path, keep: bool
) -> None:
    leader, follower, ranks = pair
    got = results(leader, adapters(leader, model_dir), keep=keep)
    followed(follower, ranks)
    alone = adapters(plain, model_dir)
    for one, expected in zip(got, [results(plain, [adapter], keep=True)[0] for adapter in alone], strict=True):
        for value, reference in zip(one, expected, strict=True):
            assert value is not None
            assert reference is not None
            assert (value - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_a_follower_keeps_the_graphs_that_wait_and_no_other(
    pair: tuple[ShardedLane, Follower, ByHand], model_dir: Path
) -> None:
    leader, follower, ranks = pair
    opened = adapters(leader, model_dir)
    kept = [leader.forward([one]) for one in forwards(opened)]
    leader.forward(forwards(opened), keep=False)
    followed(follower, ranks)
    assert follower.passes == 2
    output_BTD, graph = kept[0][0]
    leader.backward([Backward(opened[0], graph, torch.ones_like(output_BTD), True, reset=True)])
    followed(follower, ranks)
    assert follower.passes == 1
    kept.clear()
    leader.beat()
    followed(follower, ranks)
    assert follower.passes == 0


def test_hidden_states_of_another_dtype_are_refused_before_anybody_is_told(
    pair: tuple[ShardedLane, Follower, ByHand], model_dir: Path
) -> None:
    leader, _, ranks = pair
    asked = Forward(adapters(leader, model_dir)[0], torch.zeros(1, 4, HIDDEN, dtype=torch.bfloat16), None, None)
    with pytest.raises(FrameError, match=r"forward.hidden is torch.bfloat16, and this trunk computes in torch.float32"):
        leader.forward([asked])
    assert not ranks.waiting


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR is missing: start a trunk of several processes with torchrun"),
        ({"RANK": "2"}, "WORLD_SIZE is 2 and RANK 2"),
        ({"RANK": "one"}, "RANK is 'one' in the environment; it must be a number"),
    ],
)
def test_an_environment_that_names_no_process_is_refused(changed: Mapping[str, str | None], told: str) -> None:
    environment = {name: value for name, value in {**TORCHRUN, **changed}.items() if value is not None}
    with pytest.raises(ConfigError, match=told):
        Member.told(environment)


def test_one_process_needs_no_environment() -> None:
    assert Member.told({}) == Member.told({"RANK": "", "WORLD_SIZE": "1"}) == Member(0, 1)
    assert Member.told(TORCHRUN) == Member(1, 2)


FAILING = """
import time
from server_trunk.ranks import Member, Ranks
ranks = Ranks(Member(0, 1), "cpu")
try:
    with ranks.in_step():
        raise MemoryError("no room")
except Exception as error:
    print(type(error).__name__, error, flush=True)
time.sleep(60)
"""


def test_a_process_whose_pass_fails_tells_why_and_ends() -> None:
    """The others wait for it as long as it lives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ended = subprocess.run(
        [sys.executable, "-c", FAILING],
        env={**os.environ, **group, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=55,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout.startswith("ConnectionFailedError a process of this trunk failed, and all end: no room;")
