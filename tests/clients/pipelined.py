"""Accumulated steps of a split model, in a plain loop and several microbatches at once; a stream that holds back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

import clients
from clients.pipeline import accumulate
from clients.split_model import adapter_state, remote_layers
from tests.clients.conftest import ALL_LINEAR, CUT
from tests.contract.families import batch
from tests.contract.parity import Tensors, differences

MICROBATCHES = 8
WEIGHTS = [(1 + index) / MICROBATCHES for index in range(MICROBATCHES)]
WAIT_S = 20.0
DEPTHS = (2, 4, 8)

Loader = Callable[..., PeftModel]


@contextmanager
def loading(model_dir: Path, default_address: str) -> Iterator[Loader]:
    """What loads split models whose sessions end with the block."""
    opened: list[PeftModel] = []

    def loaded(lora: LoraConfig = ALL_LINEAR, **settings: Any) -> PeftModel:
        settings = {"seed": 11, "timeout_s": WAIT_S, **settings}
        address = settings.pop("address", default_address)
        opened.append(clients.load_split_model(model_dir, address, CUT.head, CUT.tail, lora, **settings))
        return opened[-1]

    yield loaded
    for model in opened:
        layers = remote_layers(model)
        layers.trunk.abandon()
        layers.lanes.close()


def microbatches(step: int = 0) -> list[dict[str, torch.Tensor]]:
    """Uneven ones, with padding on either side."""
    paddings = ("none", "left", "right")
    return [
        batch(paddings[index % 3], rows=1 + index % 3, tokens=10 + index % 4, seed=100 * step + index).inputs()
        for index in range(MICROBATCHES)
    ]


def at_width(model: PeftModel, width: int) -> None:
    remote_layers(model).window.size = width


Outcome = tuple[list[float], Tensors]


def trained(model: PeftModel, add: Callable[[int], list[float]], clip: float = 0.05, steps: int = 3) -> Outcome:
    """Losses, and the adapter after some steps of AdamW, whose gradients `add` adds up."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for step in range(steps):
        losses += add(step)
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses, adapter_state(model)


def in_turn(model: PeftModel) -> Outcome:
    """The loop that everybody writes."""

    def add(step: int) -> list[float]:
        losses = []
        for given, weight in zip(microbatches(step), WEIGHTS, strict=True):
            loss = model(**given).loss
            (loss * weight).backward()
            losses.append(float(loss.detach()))
        return losses

    return trained(model, add)


def accumulated(model: PeftModel, width: int) -> Outcome:
    def add(step: int) -> list[float]:
        at_width(model, width)
        return accumulate(model, microbatches(step), WEIGHTS, depth=width)

    return trained(model, add)


def assert_equal(expected: Outcome, got: Outcome) -> None:
    assert got[0] == expected[0]
    assert differences(expected[1], got[1]) == []


class SlowStream:
    """Stands before a session's stream: counts what is under way, and answers nothing before `hold` is done."""

    def __init__(self, model: PeftModel, hold: Callable[[SlowStream], object] = lambda stream: None) -> None:
        trunk = remote_layers(model).trunk
        self._stream, self._hold = trunk._stream, hold
        self.sent: list[str] = []
        self.answered: list[str] = []
        self.graphs = 0
        self.graphs_by_forward: list[int] = []
        self.advice: int | None = None  # in place of the trunk's own
        trunk._stream = self  # type: ignore[assignment]

    def send(self, frame: Any) -> None:
        kind = str(frame.WhichOneof("body"))
        self.sent.append(kind)
        if kind == "forward":
            self.graphs += 1
            self.graphs_by_forward.append(self.graphs)
        self._stream.send(frame)

    def receive(self, kind: str) -> Any:
        self._hold(self)
        reply = self._stream.receive(kind)
        self.answered.append(kind)
        self.graphs -= kind == "backward"
        if kind in ("forward", "backward") and self.advice is not None:
            reply.credits = self.advice
        return reply

    @property
    def most_graphs(self) -> int:
        return max(self.graphs_by_forward)

    @property
    def under_way(self) -> int:
        return len(self.sent) - len(self.answered)

    @property
    def over(self) -> bool:
        return self._stream._ended.is_set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)
