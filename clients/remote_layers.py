"""The absent layers as a module: to autograd and to optimisers the trunk's half of the adapter is one parameter.

That parameter is the *anchor*. Its value means nothing. Its gradient always is the L2 norm of the gradient that the
trunk's half has accumulated, so that a norm over the model's parameters is the norm over client and trunk together.
What clipping (or a loss scaler) leaves of the anchor's gradient is the factor that the trunk applies to its own, and an
optimiser's step on the anchor is the trunk's step, with the settings of the anchor's parameter group.

A frozen trunk trains nothing: its anchor needs no gradient, and no optimiser needs the anchor.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from clients.crossing import Crossing
from clients.exchanges import Exchange
from clients.lanes import LanePool
from clients.remote_trunk import PendingGraph, RemoteTrunk, Told
from clients.window import Window
from contract.errors import ConfigError, NonFiniteError
from contract.records import AdamWSettings, LoraSpec

_OTHER_ADAMS = ("amsgrad", "maximize")
_NO_PASS = -1
_IN_A_LANE = -2


class Lane(Protocol):
    """One of several microbatches under way at once, each of which lets others compute while it waits."""

    def cross(self, hidden_BTD: Tensor, crossing: Crossing, *, need_grad: bool) -> Tensor:
        """hidden_BTD at the head cut -> hidden_BTD at the tail cut; with `need_grad`, the gradient there is noted."""


@dataclass(frozen=True, slots=True)
class BackwardUnderWay:
    """A backward at the trunk beside which others may be under way, in one order of requests and answers."""

    exchange: Exchange[Told, tuple[Tensor | None, float]]
    norm_owed: Callable[[float], Tensor | None]

    def answer(self) -> tuple[Tensor | None, Tensor | None]:
        """As `RemoteLayers.backward` answers, once `exchange` has run."""
        input_grad_BTD, norm = self.exchange.answer()
        return input_grad_BTD, self.norm_owed(norm)


class RemoteLayers(nn.Module):
    """hidden_BTD at the head cut -> hidden_BTD at the tail cut, through `trunk` (contract.partition.RemoteLayers).

    `spec` is the whole model's adapter, and `base_model_name` what its export names as its base. `frozen` is what the
    trunk was told in the hello: that its half of the adapter stays as it is.
    """

    def __init__(self, trunk: RemoteTrunk, spec: LoraSpec, base_model_name: str, *, frozen: bool = False) -> None:
        super().__init__()
        self.trunk = trunk
        self.spec = spec
        self.base_model_name = base_model_name
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=not frozen)
        self.beside: tuple[weakref.ref[nn.Parameter], ...] = ()
        """The client's own trained parameters, which no optimizer may step without the anchor."""
        # The collector does not look into a tensor's hooks: one that held this module would keep it for ever.
        settle = weakref.WeakMethod(self._settle)
        if not frozen:
            self.anchor.register_post_accumulate_grad_hook(lambda _: _call(settle))  # type: ignore[no-untyped-call]
        self._norm_told = 0.0  # what backward passes since the last reset have handed to the anchor, in all
        self._norm_settled = 0.0  # the anchor's gradient as autograd left it
        self._unsettled_pass = _NO_PASS  # the backward pass that handed over what is not in the anchor's gradient yet
        self._stepped = False
        self._bypassed = False
        self.lanes = LanePool()
        self.window = Window()
        weakref.finalize(self, self.lanes.let_go)
        self._here = threading.local()
        self._under_way = 0  # backward passes in lanes whose share of the norm is not in the anchor's gradient yet
        _LIVE.add(self)
        _watch_optimizers()

    def forward(self, hidden_BTD: Tensor, attention_mask_BT: Tensor | None, position_ids: Tensor | None) -> Tensor:
        if self._bypassed:
            return hidden_BTD
        device = hidden_BTD.device.type
        autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        crossing = Crossing(attention_mask_BT, position_ids, autocast_dtype, self.training)
        need_grad = torch.is_grad_enabled() and (hidden_BTD.requires_grad or self.anchor.requires_grad)
        lane: Lane | None = getattr(self._here, "lane", None)
        if lane is not None:
            return lane.cross(hidden_BTD, crossing, need_grad=need_grad)
        if need_grad:
            output_BTD: Tensor = _Cross.apply(hidden_BTD, self.anchor, self, crossing)  # type: ignore[no-untyped-call]
            return output_BTD
        output_BTD, _ = self.trunk.forward(hidden_BTD, crossing, need_grad=False)
        return output_BTD

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Within, what comes in goes out as it is: the client's own layers can be tried out and nothing is sent."""
        self._bypassed = True
        try:
            yield
        finally:
            self._bypassed = False

    @contextmanager
    def through(self, lane: Lane) -> Iterator[None]:
        """Within, in this thread, `lane` carries what crosses."""
        self._here.lane = lane
        try:
            yield
        finally:
            self._here.lane = None

    def backward(
        self, graph: PendingGraph, grad_BTD: Tensor, want_input_grad: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient at the head cut, and what brings the anchor's gradient to the trunk's norm (None: frozen)."""
        if not self.anchor.requires_grad:
            input_grad_BTD, _ = self.trunk.backward(
                graph, grad_BTD, want_input_grad=want_input_grad, reset_gradient=False
            )
            return input_grad_BTD, None
        this_pass = torch._C._current_graph_task_id()
        reset = self._starts_anew(this_pass)
        input_grad_BTD, norm = self.trunk.backward(
            graph, grad_BTD, want_input_grad=want_input_grad, reset_gradient=reset
        )
        return input_grad_BTD, self._norm_owed(norm, reset, this_pass)

    @contextmanager
    def backward_under_way(
        self, graph: PendingGraph, grad_BTD: Tensor, want_input_grad: bool
    ) -> Iterator[BackwardUnderWay]:
        """For lanes: as `backward`, begun. Blocks may overlap, if they begin and answer in one order.

        Within the block the anchor's gradient must be brought to the trunk's norm by a backward of the anchor's own:
        the trunk does not tell, until then, whether a zero there means that nothing has accumulated.
        """
        trained = self.anchor.requires_grad
        reset = trained and not self._under_way and self._starts_anew(_IN_A_LANE)
        exchange = self.trunk.begin_backward(graph, grad_BTD, want_input_grad=want_input_grad, reset_gradient=reset)
        self._under_way += 1
        try:
            yield BackwardUnderWay(exchange, lambda norm: self._norm_owed(norm, reset, _IN_A_LANE) if trained else None)
        finally:
            self._under_way -= 1

    def _starts_anew(self, this_pass: int) -> bool:
        """Whether the trunk is to forget the gradient it has. Raises ConfigError where it cannot be said."""
        reset = self._unsettled_pass != this_pass and _is_zero(self.anchor.grad)
        if not reset and self._stepped:
            raise ConfigError(
                "the gradients were not zeroed after the optimizer's step, which the trunk does at every step: "
                "call optimizer.zero_grad() or model.zero_grad() before the next backward()"
            )
        if not reset and self._unsettled_pass not in (_NO_PASS, this_pass):
            raise ConfigError(
                "torch.autograd.grad was called through the trunk between two backward() calls whose gradients add "
                "up, and the trunk cannot take its part out again: zero the gradients first"
            )
        return reset

    def _norm_owed(self, norm: float, reset: bool, this_pass: int) -> Tensor:
        """What brings the anchor's gradient to `norm`."""
        told = 0.0 if reset else self._norm_told
        self._norm_told, self._unsettled_pass, self._stepped = norm, this_pass, False
        return torch.full_like(self.anchor, norm - told)

    def step(self, group: dict[str, Any]) -> None:
        """The trunk's step, as the anchor's parameter `group` says; none when no backward went before it."""
        if self.anchor.grad is None or self._stepped:
            return
        scale = float(self.anchor.grad) / self._norm_settled if self._norm_settled else 1.0
        if not 0.0 <= scale < float("inf"):
            raise NonFiniteError(f"the gradients of client and trunk together were scaled by {scale} before the step")
        beta1, beta2 = (float(beta) for beta in group["betas"])
        self.trunk.step(
            AdamWSettings(float(group["lr"]), beta1, beta2, float(group["eps"]), float(group["weight_decay"])), scale
        )
        self._stepped = True

    def _settle(self) -> None:
        self._unsettled_pass = _NO_PASS
        self._norm_settled = float(self.anchor.grad) if self.anchor.grad is not None else 0.0


class _Cross(torch.autograd.Function):
    """The two halves of the model's graph lie in two processes; this node joins them."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, anchor: Tensor, layers: RemoteLayers, crossing: Crossing) -> Tensor:
        ctx.layers = layers
        # Held by this node alone: when autograd drops it without a backward, the trunk is told to drop its half.
        output_BTD, ctx.graph = layers.trunk.forward(hidden_BTD, crossing, need_grad=True)
        return output_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_in_BTD, anchor_grad = ctx.layers.backward(ctx.graph, grad_BTD, ctx.needs_input_grad[0])
        return grad_in_BTD, anchor_grad, None, None


_LIVE: weakref.WeakSet[RemoteLayers] = weakref.WeakSet()
_watched: list[object] = []


def _watch_optimizers() -> None:
    """Once per process: torch has hooks for every optimizer's step, and a user's own is not known here."""
    if not _watched:
        _watched.append(register_optimizer_step_pre_hook(_before_step))
        _watched.append(register_optimizer_step_post_hook(_after_step))


def _anchored(optimizer: Optimizer) -> list[tuple[RemoteLayers, dict[str, Any]]]:
    """The remote layers whose trunk `optimizer` trains by their anchor, with the anchor's parameter group."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    return [(layers, groups[id(layers.anchor)]) for layers in _trained() if id(layers.anchor) in groups]


def _trained() -> list[RemoteLayers]:
    return [layers for layers in list(_LIVE) if layers.anchor.requires_grad]


def _before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Refuses, before anything moves, an optimizer that the trunk cannot follow."""
    name = type(optimizer).__name__
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layers in _trained():
        # Not by ids that were noted down: a parameter that is gone may have left its own to another model's.
        own = (parameter() for parameter in layers.beside)
        if id(layers.anchor) not in held and any(id(one) in held for one in own if one is not None):
            raise ConfigError(
                f"{name} holds this model's own half of the adapter but not the trunk's, which would never be trained: "
                "give it every parameter of the model with requires_grad, not only those named lora_"
            )
    for _, group in _anchored(optimizer):
        if not isinstance(optimizer, torch.optim.AdamW):
            raise ConfigError(f"optimizer is {name}; the trunk's half of the adapter can only be trained by AdamW")
        for option in _OTHER_ADAMS:
            if group.get(option):
                raise ConfigError(f"{name} has {option}=True; the trunk's half of the adapter is trained without it")
        if getattr(optimizer, "grad_scale", None) is not None:
            raise ConfigError(f"{name} is fused and unscales inside its step; use it without fused=True, or bf16")


def _after_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    for layers, group in _anchored(optimizer):
        layers.step(group)


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    if (alive := method()) is not None:
        alive()


def _is_zero(grad: Tensor | None) -> bool:
    return grad is None or float(grad) == 0.0
