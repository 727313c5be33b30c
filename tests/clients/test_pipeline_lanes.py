"""Microbatches are under way at once, within the trunk's limits, and end together when one fails."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import clients
from clients.pipeline import accumulate, backward_all
from clients.split_model import remote_layers
from contract.errors import CapacityError, ConfigError, DataError, NonFiniteError, SessionError
from tests.clients.conftest import ALL_LINEAR, CUT
from tests.clients.pipelined import (
    DEPTHS,
    MICROBATCHES,
    WAIT_S,
    WEIGHTS,
    Loader,
    SlowStream,
    accumulated,
    assert_equal,
    at_width,
    in_turn,
    loading,
    microbatches,
    until,
)
from tests.conftest import TrunkProcess
from tests.contract.families import batch


@pytest.fixture
def load(llama_dir: Path, trunk: TrunkProcess) -> Iterator[Loader]:
    with loading(llama_dir, trunk.address) as loader:
        yield loader


@pytest.mark.parametrize("width", DEPTHS)
def test_as_many_requests_are_under_way_as_the_window_is_wide(load: Loader, width: int) -> None:
    def hold(stream: SlowStream) -> None:
        if not stream.answered:
            until(lambda: stream.under_way == width)
            time.sleep(0.05)
            assert stream.under_way == width

    model = load()
    stream = SlowStream(model, hold)
    at_width(model, width)
    accumulate(model, microbatches(), WEIGHTS, depth=width)
    assert stream.most_graphs == width
    assert stream.sent.count("forward") == stream.sent.count("backward") == MICROBATCHES


def test_a_tail_goes_before_the_next_head(load: Loader) -> None:
    """The third forward is begun only after the first microbatch has sent its backward."""
    model = load()
    stream = SlowStream(model, lambda stream: until(lambda: len(stream.sent) >= 2))
    at_width(model, 2)
    accumulate(model, microbatches(), WEIGHTS, depth=2)
    assert stream.sent[:3] == ["forward", "forward", "backward"]


def test_advice_from_the_trunk_narrows_a_step_that_is_on_its_way(load: Loader) -> None:
    model = load()
    stream = SlowStream(model, lambda stream: until(lambda: len(stream.sent) >= 4))
    stream.advice = 1
    at_width(model, 4)
    accumulate(model, microbatches(), WEIGHTS, depth=4)
    assert remote_layers(model).trunk.credits == 1
    assert stream.graphs_by_forward == [1, 2, 3, 4, 1, 1, 1, 1]
    stream.graphs_by_forward.clear()
    accumulate(model, microbatches(), WEIGHTS, depth=4)
    assert stream.most_graphs == 1
    stream.advice = 3
    accumulate(model, microbatches(), WEIGHTS, depth=4)
    stream.graphs_by_forward.clear()
    at_width(model, 4)
    accumulate(model, microbatches(), WEIGHTS, depth=4)
    assert 1 < stream.most_graphs <= 3


def test_no_more_are_begun_than_the_trunk_has_room_for_beside_others(load: Loader) -> None:
    model = load()
    trunk = remote_layers(model).trunk
    room = trunk.welcome.max_pending
    held = [model(**batch(seed=seed).inputs()).loss for seed in range(room - 2)]
    assert trunk.room == 2
    at_width(model, 8)
    accumulate(model, microbatches(), WEIGHTS)
    held.pop()
    assert trunk.room == 3
    held.pop().backward()
    assert trunk.room == 4


def test_the_window_opens_when_the_trunk_is_far_and_says_so(load: Loader, caplog: pytest.LogCaptureFixture) -> None:
    model = load()
    SlowStream(model, lambda stream: time.sleep(0.02))
    with caplog.at_level(logging.INFO, logger="trunkline.clients"):
        for step in range(3):
            accumulate(model, microbatches(step), WEIGHTS)
            model.zero_grad()
    assert remote_layers(model).window.size == MICROBATCHES
    said = [message.split()[0] for message in caplog.messages if "under way at once" in message]
    assert said == ["4", "8"]


def lanes() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("trunk-lane")]


def test_closing_leaves_no_thread_behind(load: Loader) -> None:
    model = load()
    at_width(model, 4)
    accumulate(model, microbatches(), WEIGHTS, depth=4)
    assert len(lanes()) == 4
    clients.close(model)
    assert lanes() == []
    with pytest.raises(SessionError, match="is over: start a new one"):
        accumulate(model, microbatches(), WEIGHTS, depth=4)


def test_a_model_that_is_let_go_takes_its_lanes_with_it(llama_dir: Path, trunk: TrunkProcess) -> None:
    model = clients.load_split_model(llama_dir, trunk.address, CUT.head, CUT.tail, ALL_LINEAR)
    accumulate(model, microbatches(), WEIGHTS)
    left = [weakref.ref(kept) for kept in (model, remote_layers(model), remote_layers(model).trunk)]
    del model
    gc.collect()
    assert [kept() for kept in left] == [None, None, None]
    until(lambda: lanes() == [])


def test_an_error_at_the_trunk_ends_all_of_them_and_is_told_once(
    llama_dir: Path, trunk_process: Callable[..., TrunkProcess], load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = trunk_process(llama_dir, CUT.head, CUT.tail, max_pending=3)
    model = load(address=small.address)
    monkeypatch.setattr(type(remote_layers(model).trunk), "room", MICROBATCHES)
    remote_layers(model).trunk.credits = 0
    stream = SlowStream(model, lambda stream: until(lambda: len(stream.sent) >= 4))
    at_width(model, 6)
    with pytest.raises(CapacityError, match="3 forwards wait") as caught:
        accumulate(model, microbatches(), WEIGHTS, depth=6)
    assert "\n" not in str(caught.value)
    assert stream.sent.count("backward") < MICROBATCHES
    with pytest.raises(CapacityError, match="3 forwards wait"):
        accumulate(model, microbatches(), WEIGHTS, depth=6)
    small.kill()


def test_an_answer_that_makes_no_sense_is_told_and_not_what_came_of_it(load: Loader) -> None:
    model = load()

    class Nonsense(SlowStream):
        def receive(self, kind: str) -> Any:
            reply = super().receive(kind)
            if kind == "backward":
                reply.adapter_grad_norm = float("nan")
            return reply

    Nonsense(model, lambda stream: until(lambda: len(stream.sent) >= 4))
    at_width(model, 4)
    with pytest.raises(NonFiniteError, match="norm of the trunk adapter's gradient is nan"):
        accumulate(model, microbatches(), WEIGHTS, depth=4)
    with pytest.raises(SessionError, match="is over"):
        model(**microbatches()[0])


def test_a_microbatch_that_fails_here_ends_the_step_and_not_the_session(load: Loader) -> None:
    model, given = load(), microbatches()
    called: list[int] = []

    def share(index: int) -> torch.Tensor:
        called.append(index)
        if index == 3:
            raise DataError("microbatch 3 cannot be read")
        loss: torch.Tensor = model(**given[index]).loss
        return loss

    at_width(model, 3)
    with pytest.raises(DataError, match="microbatch 3 cannot be read"):
        backward_all(model, [lambda index=index: share(index) for index in range(8)], list(range(8)), 3)
    assert called == [0, 1, 2, 3]
    model.zero_grad()
    assert remote_layers(model).trunk.room == remote_layers(model).trunk.welcome.max_pending
    assert_equal(in_turn(load()), accumulated(model, 4))


def test_gradients_left_over_from_before_a_step_are_refused(load: Loader) -> None:
    model = load()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    accumulate(model, microbatches(), WEIGHTS)
    optimizer.step()
    with pytest.raises(ConfigError, match="optimizer.zero_grad"):
        accumulate(model, microbatches(), WEIGHTS)


def test_autograd_grad_before_it_is_refused_as_elsewhere(load: Loader) -> None:
    model = load()
    probe = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    accumulate(model, microbatches(), WEIGHTS)
    torch.autograd.grad(model(**batch(seed=3).inputs()).loss, probe, allow_unused=True)
    with pytest.raises(ConfigError, match=r"torch.autograd.grad was called"):
        accumulate(model, microbatches(), WEIGHTS)


def test_ctrl_c_ends_the_session_at_once(load: Loader) -> None:
    pressed = threading.Event()

    def press(stream: SlowStream) -> None:
        if not pressed.is_set():
            pressed.set()
            os.kill(os.getpid(), signal.SIGINT)
            until(lambda: stream.over)

    model = load()
    stream = SlowStream(model, press)
    at_width(model, 4)
    started = time.monotonic()
    with interruptible(), pytest.raises(KeyboardInterrupt):
        accumulate(model, microbatches(), WEIGHTS, depth=4)
    assert time.monotonic() - started < WAIT_S / 2
    assert stream.sent.count("forward") < MICROBATCHES
    with pytest.raises(SessionError):
        model(**microbatches()[0])
    remote_layers(model).lanes.close()
    assert lanes() == []


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt within, whoever runs the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("weights", "depth", "reason"),
    [([1.0], 0, "2 batches came with"), ([1.0, float("nan")], 0, "finite"), ([1.0, 1.0], -1, "depth is -1")],
)
def test_weights_and_depth_are_checked_before_anything_is_sent(
    load: Loader, weights: list[float], depth: int, reason: str
) -> None:
    model = load()
    sent = remote_layers(model).trunk.wire_log.sent_bytes
    with pytest.raises(ConfigError, match=reason):
        accumulate(model, microbatches()[:2], weights, depth=depth)
    assert remote_layers(model).trunk.wire_log.sent_bytes == sent
    assert accumulate(model, [], []) == []
