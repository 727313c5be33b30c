"""Gradient accumulation with several microbatches under way, so that link and trunk work while head and tail compute.

Each microbatch runs in a thread of its own, and one computes at any moment: whoever waits for the trunk gives the baton
to the next (clients/baton.py). A microbatch's backward is done in two: down to the tail cut, and on from the head cut
once the trunk has answered. No backward pass of autograd's ever waits, then, which on a CUDA device would hold up every
other one.

Heads, tails and heads' backward passes are each run in the order of the microbatches, and each microbatch draws its own
random numbers, so that the gradients are bit for bit those of one microbatch after the other. That holds for models in
which a parameter lies on one side of the trunk only, as the cut's proof makes sure (contract/architecture.py).
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clients.baton import Baton, CancelledError, Part
from clients.crossing import Crossing
from clients.exchanges import Exchange
from clients.lanes import Randomness, ThreadState, random_devices, randomness_kept
from clients.remote_layers import RemoteLayers
from clients.remote_trunk import PendingGraph
from contract.errors import ConfigError, SessionError

logger = logging.getLogger("trunkline.clients")

Share = Callable[[], Tensor]
"""Calls the model with one microbatch; answers what of the step's loss is its own, to go backward from."""


def accumulate(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], weights: Sequence[float], *, depth: int = 0
) -> list[float]:
    """Adds the gradient of the sum of `weights` times the losses of `batches`; answers the losses themselves.

    `batches` are what the model is called with, each with its `labels`. The gradients are those of calling
    `(model(**batch).loss * weight).backward()` for one after the other, except that dropout draws other numbers, which
    follow from the state of torch's generator. A split model has up to `depth` of them under way at once; 0 finds out
    how many are of use, 1 waits for each. After an error the gradients are incomplete, and must be zeroed.

    Raises ConfigError unless there is one finite weight for each batch, and whatever the model and the trunk raise.
    """
    given = list(batches)
    if len(given) != len(weights) or not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"{len(given)} batches came with the weights {list(weights)!r}; each needs a finite one")
    if depth < 0:
        raise ConfigError(f"depth is {depth}; it must be 0 or more")
    losses = [0.0] * len(given)

    def share(index: int) -> Tensor:
        loss: Tensor = model(**given[index]).loss
        losses[index] = float(loss.detach())
        return loss * weights[index]

    key = str(int(torch.randint(2**62, ())))
    shares = [lambda index=index: share(index) for index in range(len(given))]
    backward_all(model, shares, [random_seed(key, index) for index in range(len(given))], depth)
    return losses


def random_seed(*parts: object) -> int:
    """A seed for one microbatch, from all that names it."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "little")


def backward_all(model: nn.Module, shares: Sequence[Share], seeds: Sequence[int], depth: int) -> list[float]:
    """Backward from each of `shares` in turn, each with random numbers from its own seed; answers their values.

    The shares of a split model may be under way at once, `depth` of them at most (0: as many as are of use); they are
    called one at a time and in order all the same. Raises what the first one that fails raises.
    """
    devices = random_devices(model)
    layers = next((module for module in model.modules() if isinstance(module, RemoteLayers)), None)
    draws = [Randomness(seed, devices) for seed in seeds]
    with randomness_kept(devices):
        if layers is None:
            return _one_by_one(shares, draws)
        alone = min(len(shares), layers.trunk.alone)
        found = _one_by_one(shares[:alone], draws[:alone])
        shares, draws = shares[alone:], draws[alone:]
        most = min(len(shares), depth or len(shares), layers.trunk.room)
        if most > 1:
            return found + _Step(layers, shares, draws).run(devices, most)
        return found + _one_by_one(shares, draws)


def _one_by_one(shares: Sequence[Share], draws: Sequence[Randomness]) -> list[float]:
    found = []
    for share, randomness in zip(shares, draws, strict=True):
        randomness.enter()
        value = share()
        value.backward()  # type: ignore[no-untyped-call]
        found.append(float(value.detach()))
    return found


class _Step:
    """The microbatches of one step, in lanes."""

    def __init__(self, layers: RemoteLayers, shares: Sequence[Share], randomness: Sequence[Randomness]) -> None:
        self._layers = layers
        self._shares = shares
        self._randomness = randomness
        self._baton = Baton(len(shares))
        self._lock = threading.Lock()
        self._begun = 0
        self._lanes = 0
        self._found = [0.0] * len(shares)
        self._failure: BaseException | None = None
        self._failed_before = layers.trunk.failure

    def run(self, devices: Sequence[torch.device], most: int) -> list[float]:
        """Runs all of them, at most `most` at once."""
        window, started = self._layers.window, time.monotonic()
        self._lanes = min(most, window.size)
        self._state = ThreadState(devices)
        wait: Callable[[], None] | None = None
        try:
            wait = self._layers.lanes.run(self._lanes, self._work)
            wait()
        except BaseException:
            # As anywhere else, what interrupts a request ends the session; a lane that waits for the trunk returns.
            self._baton.cancel()
            self._layers.trunk.abandon()
            if wait is not None:
                wait()
            raise
        failure, self._failure = self._failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # it holds the frames that hold it, and a model with them
        wall_s = time.monotonic() - started
        if window.observe(self._baton.waited_s, wall_s, most):
            logger.info(
                "%d microbatches of a step are under way at once from now on: in the last one, of %.2f s, nothing "
                "could be computed for %.2f s",
                *(window.size, wall_s, self._baton.waited_s),
            )
        return self._found

    def _work(self) -> None:
        """One lane: microbatches, one after the other, until none is left."""
        try:
            with self._state.entered():
                while (index := self._claimed()) is not None:
                    lane = _Microbatch(self._layers, self._baton, index, self._randomness[index])
                    self._found[index] = lane.run(self._shares[index])
        except CancelledError:
            return
        # Everything: whoever started the step raises it.
        except BaseException as error:  # noqa: BLE001
            self._fail(error)

    def _claimed(self) -> int | None:
        """The next microbatch; None when all are begun, or when the trunk asks for fewer at once than there are."""
        with self._lock:
            credits = self._layers.trunk.credits
            if self._begun == len(self._shares) or (credits and self._lanes > credits and self._lanes > 1):
                self._lanes -= 1
                return None
            self._begun += 1
            return self._begun - 1

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._failure is None:
                # A request that ended the session tells more than another one that found it ended.
                ended = self._layers.trunk.failure
                self._failure = error if ended is None or ended is self._failed_before else ended
        self._baton.cancel()


class _Microbatch:
    """One microbatch on its way (clients.remote_layers.Lane)."""

    def __init__(self, layers: RemoteLayers, baton: Baton, number: int, randomness: Randomness) -> None:
        self._layers = layers
        self._baton = baton
        self._number = number
        self._randomness = randomness
        self._head_BTD: Tensor | None = None
        self._graph: PendingGraph | None = None
        self._grad_BTD: Tensor | None = None

    def run(self, share: Share) -> float:
        """All of it, the backward too; answers the share's value."""
        try:
            self._baton.take(self._number, Part.HEAD)
            self._randomness.enter()
            with self._layers.through(self):
                value = share()
            value.backward()  # type: ignore[no-untyped-call]
            found = float(value.detach())
            del value
            if self._graph is not None and self._grad_BTD is not None:
                self._backward(self._graph, self._grad_BTD)
            return found
        finally:
            self._baton.end(self._number)

    def cross(self, hidden_BTD: Tensor, crossing: Crossing, *, need_grad: bool) -> Tensor:
        if self._graph is not None:
            raise SessionError("a microbatch that others are under way beside goes through the trunk once: set depth=1")
        exchange = self._layers.trunk.begin_forward(hidden_BTD, crossing, need_grad=need_grad)
        self._away(exchange, Part.TAIL)
        output_BTD, self._graph = exchange.answer()
        if self._graph is None:
            return output_BTD
        self._head_BTD = hidden_BTD
        stand_in = torch.empty(0, requires_grad=True)
        cut_BTD: Tensor = _Cut.apply(stand_in, [output_BTD], self._note)  # type: ignore[no-untyped-call]
        return cut_BTD

    def _note(self, grad_BTD: Tensor) -> None:
        self._grad_BTD = grad_BTD

    def _backward(self, graph: PendingGraph, grad_BTD: Tensor) -> None:
        """From the tail cut through trunk and head."""
        head_BTD, anchor = self._head_BTD, self._layers.anchor
        self._graph = self._head_BTD = self._grad_BTD = None
        wanted = head_BTD is not None and head_BTD.requires_grad
        with self._layers.backward_under_way(graph, grad_BTD, wanted) as backward:
            self._away(backward.exchange, Part.HEAD_BACKWARD)
            head_grad_BTD, anchor_grad = backward.answer()
            for root, grad in ((anchor, anchor_grad), (head_BTD, head_grad_BTD)):
                if root is not None and grad is not None:
                    root.backward(grad)  # type: ignore[no-untyped-call]

    def _away(self, exchange: Exchange[Any, Any], then: Part) -> None:
        """Lets others compute until the trunk has answered."""
        self._randomness.leave()
        exchange.take_place()
        self._baton.give()
        exchange.run()
        self._baton.take(self._number, then)
        self._randomness.enter()


class _Cut(torch.autograd.Function):
    """Where the tail's part of the graph ends: hands on the gradient, to be sent once the pass is over."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, output: list[Tensor], note: Callable[[Tensor], None]) -> Tensor:
        ctx.note = note
        return output.pop()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[None, None, None]:
        ctx.note(grad_BTD)
        return None, None, None
