"""A lane of a trunk that several processes hold: the leader's, which tells its passes, and the others', which follow.

Sessions, their adapters, optimisers and every decision are the leader's. With a forward it tells the rows and the
sessions' values, with a backward the gradient at the tail cut; the others know nothing but the graphs that wait.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from contract.errors import FrameError, UnsupportedModelError
from contract.records import CutLayers
from server_trunk.adapters import AdapterSlots
from server_trunk.graph_meter import GraphMeter
from server_trunk.grouped_lora import Factors, Segment, Share
from server_trunk.lane import Backward, Forward, Gang, Graph, Lane, Manner
from server_trunk.ranks import Ranks
from server_trunk.session_adapter import Place

WHOLE_STYLES = ("colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep")
"""Linear layers that take all inputs and give all outputs at each process, whatever it computes of them."""


def shares_of(model: PreTrainedModel, ranks: Ranks) -> dict[str, Share]:
    """What this process computes of each linear layer, by its full name."""
    whole = Share(counts_whole=ranks.member.leads)
    plan: Mapping[str, str] = model._resolve_parallel_plans(model.config.distributed_config)[0]
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        found[name] = whole
        style = plan.get(name)
        if style in ("colwise", "rowwise"):
            weight = module.weight
            if not isinstance(weight, DTensor):
                raise UnsupportedModelError(f"{name} is {style} by its plan, but its weight was not parted")
            shape, start = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
            axis = 0 if style == "colwise" else 1
            part = slice(start[axis], start[axis] + shape[axis])
            found[name] = Share(
                inputs=part if style == "rowwise" else None,
                outputs=part if style == "colwise" else None,
                sum=ranks.sum_,
                counts_whole=whole.counts_whole,
            )
        elif style not in (None, *WHOLE_STYLES):
            raise UnsupportedModelError(f"{name} is {style} by its plan, which is not known of a linear layer")
    return found


class ShardedLane(Lane):
    """The leader's. Every pass goes by the hooks of shared ones, which know of shares, and PEFT computes none."""

    def __init__(
        self,
        model: PreTrainedModel,
        blank: PreTrainedModel,
        cut: CutLayers,
        device: str,
        meter: GraphMeter,
        ranks: Ranks,
    ) -> None:
        """`blank` is the trunk part without weights, which no process has parted."""
        slots = AdapterSlots(blank, device)
        super().__init__(model, cut, device, meter, slots=slots, shares=shares_of(model, ranks))
        self._ranks = ranks
        self._told = 0
        self._numbers: weakref.WeakKeyDictionary[Gang, int] = weakref.WeakKeyDictionary()
        self._forgotten: deque[int] = deque()

    def beat(self) -> None:
        """Let the others know that nothing is wrong."""
        with self._ranks.in_step():
            self._ranks.tell({"do": "nothing", "forget": self._forgets()})

    def end(self) -> None:
        """Send the others home."""
        with self._ranks.in_step():
            self._ranks.tell({"do": "end", "forget": self._forgets()})
            self._ranks.part()

    def _forgets(self) -> list[int]:
        """Passes whose backward will never come, or has come."""
        return [self._forgotten.popleft() for _ in range(len(self._forgotten))]

    def _alone(self, asked: Forward, keep: bool) -> tuple[Tensor, Graph]:
        known = not keep or self._meter.knows(asked.kind)
        with nullcontext() if known else self._meter.measuring(asked.kind, asked.tokens):
            (answer,) = self._together([asked], keep)
        return answer

    def _together(self, asked: Sequence[Forward], keep: bool) -> list[tuple[Tensor, Graph]]:
        answers = super()._together(asked, keep)
        gang = answers[0][1].gang
        if gang is not None:
            self._numbers[gang] = self._told
            weakref.finalize(gang, self._forgotten.append, self._told)
        return answers

    def _shared_forward(
        self,
        manner: Manner,
        keep: bool,
        segments: Sequence[Segment],
        input_RTD: Tensor,
        mask_RT: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        if input_RTD.dtype != self._dtype and not manner.autocast_dtype:
            raise FrameError(f"forward.hidden is {input_RTD.dtype}, and this trunk computes in {self._dtype}")
        self._told += 1
        more = {name: value for name, value in (("mask", mask_RT), ("positions", position_ids)) if value is not None}
        order = {
            "do": "forward",
            "pass": self._told,
            "keep": keep,
            "manner": asdict(manner),
            "segments": [_told_segment(segment) for segment in segments],
            "more": list(more),
            "forget": self._forgets(),
        }
        with self._ranks.in_step():
            self._ranks.tell(order, [input_RTD, *more.values(), *(segment.values_GP for segment in segments)])
            return super()._shared_forward(manner, keep, segments, input_RTD, mask_RT, position_ids)

    def _backward_alone(self, asked: Backward) -> tuple[Tensor | None, float]:
        ((_, graph),) = self._together([asked.graph.forward], keep=True)
        self.recomputes += 1
        if graph.gang is None:
            raise RuntimeError("a forward that keeps its graph has none")
        (answer,) = self._backward_together(graph.gang, [replace(asked, graph=graph)])
        return answer

    def _shared_backward(self, gang: Gang, grad_RTD: Tensor) -> None:
        with self._ranks.in_step():
            self._ranks.tell({"do": "backward", "pass": self._numbers[gang], "forget": self._forgets()}, [grad_RTD])
            super()._shared_backward(gang, grad_RTD)
            _sum_gradients(gang, self._ranks)


class Follower(Lane):
    """Another process's: does as it is told until it is sent home."""

    def __init__(self, model: PreTrainedModel, cut: CutLayers, device: str, ranks: Ranks) -> None:
        super().__init__(model, cut, device, GraphMeter(model), shares=shares_of(model, ranks))
        self._ranks = ranks
        self._passes: dict[int, Gang] = {}

    def follow(self) -> None:
        """Raises ConnectionFailedError when another process is lost."""
        with self._ranks.in_step():
            while self.step():
                continue
            self._passes.clear()
            self._ranks.part()

    @property
    def passes(self) -> int:
        """How many graphs wait for their backward."""
        return len(self._passes)

    def step(self) -> bool:
        """Do what comes next; False once this process is sent home."""
        order, tensors = self._ranks.hear()
        for number in order["forget"]:
            self._passes.pop(number, None)
        if order["do"] == "forward":
            self._forward(order, tensors)
        elif order["do"] == "backward":
            gang = self._passes.pop(order["pass"])
            self._shared_backward(gang, tensors[0])
            _sum_gradients(gang, self._ranks)
        return bool(order["do"] != "end")

    def _forward(self, order: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
        input_RTD = tensors[0].requires_grad_(order["keep"])
        more = dict(zip(order["more"], tensors[1:], strict=False))
        values = tensors[1 + len(more) :]
        segments = [_heard_segment(told, value) for told, value in zip(order["segments"], values, strict=True)]
        output_RTD = self._shared_forward(
            Manner(**order["manner"]), order["keep"], segments, input_RTD, more.get("mask"), more.get("positions")
        )
        if order["keep"]:
            self._passes[order["pass"]] = Gang(input_RTD, output_RTD, [(segment, ()) for segment in segments], {})


def _sum_gradients(gang: Gang, ranks: Ranks) -> None:
    for segment, _ in gang.segments:
        if segment.train_values:
            ranks.sum_(segment.gradient_GK)


def _told_segment(segment: Segment) -> dict[str, Any]:
    targets = {name: asdict(at) for name, at in segment.targets.items()}
    return {"targets": targets, "train_values": segment.train_values, "start": segment.start, "stop": segment.stop}


def _heard_segment(told: Mapping[str, Any], values_GP: Tensor) -> Segment:
    targets = {
        name: Factors(**{**at, "a": _place(at["a"]), "b": _place(at["b"])}) for name, at in told["targets"].items()
    }
    return Segment(targets, told["train_values"], values_GP, told["start"], told["stop"])


def _place(told: Mapping[str, Any]) -> Place:
    return Place(told["start"], tuple(told["shape"]))
