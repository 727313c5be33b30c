"""The trunk's arithmetic on one thread: forwards and backwards, of one session or of many in one pass.

Lanes share the frozen weights and nothing else: each has its own modules, hooks and PEFT slots, so that several compute
at once. One session alone goes through stock PEFT and gets the un-split model's bits; many in one pass get theirs to
rounding, since how a matrix product rounds depends on how many rows it has.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from contract.codec import dtype_name
from contract.errors import CapacityError
from contract.partition import TrunkPart
from contract.records import CutLayers
from server_trunk.adapters import AdapterSlots
from server_trunk.graph_meter import GraphMeter, PassKind
from server_trunk.grouped_lora import GroupedLora, Segment, Share
from server_trunk.session_adapter import SessionAdapter
from server_trunk.torch_globals import drawing, parametrizing

AUTOCAST: Mapping[str, torch.dtype | None] = {"": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """A forward that is asked for: hidden_BTD at the head cut, and how the layers run."""

    adapter: SessionAdapter
    hidden_BTD: Tensor
    mask_BT: Tensor | None
    position_ids: Tensor | None
    autocast_dtype: str = ""
    training: bool = False
    need_grad: bool = True
    keeps_dtype: bool = False
    """Whether the answer has the request's dtype, whatever autocast made of it: the client's own layers do not cast."""
    own_dropout: bool = False
    """Whether the frozen layers drop values in training, beside what the adapter drops."""
    seed: int = 0
    """What dropout draws follows from it, so that a second forward draws the same."""
    read_again: Callable[[], Tensor] | None = None
    """Gives the hidden states, where they are on disk and `hidden_BTD` is empty, on the meta device."""

    @property
    def values_BTD(self) -> Tensor:
        """The hidden states, wherever they are."""
        return self.hidden_BTD if self.read_again is None else self.read_again()

    @property
    def kind(self) -> PassKind:
        return PassKind(self.adapter.layout.key, self.autocast_dtype, self.draws, self.hidden_BTD.shape[1])

    @property
    def draws(self) -> bool:
        """Whether there is dropout."""
        return self.training and (self.own_dropout or bool(self.adapter.layout.spec.dropout))

    @property
    def rows(self) -> int:
        return self.hidden_BTD.shape[0]

    @property
    def length(self) -> int:
        return self.hidden_BTD.shape[1]

    @property
    def tokens(self) -> int:
        """B * T."""
        return self.hidden_BTD.shape[0] * self.hidden_BTD.shape[1]

    @property
    def manner(self) -> Manner:
        return Manner(self.autocast_dtype, self.training, self.keeps_dtype, self.draws, self.seed)

    @property
    def _modes(self) -> tuple[torch.dtype, str, bool, bool, bool]:
        return self.hidden_BTD.dtype, self.autocast_dtype, self.keeps_dtype, self.training, self.need_grad

    def shares_with(self, other: Forward) -> bool:
        """Whether both can be rows of one pass: they run alike and draw nothing, and neither is padded by much."""
        return (
            not self.draws
            and self.position_ids is None
            and other.position_ids is None
            and self._modes == other._modes
            and pads_little(self.length, other.length)
        )


def pads_little(*lengths: int) -> bool:
    """Whether rows as long as the longest of `lengths` pad none of them by more than a fourth."""
    return 4 * max(lengths) <= 5 * min(lengths)


@dataclass(frozen=True, slots=True)
class Manner:
    """How the layers run, of a Forward: see there."""

    autocast_dtype: str = ""
    training: bool = False
    keeps_dtype: bool = False
    draws: bool = False
    seed: int = 0


_CALLING = threading.local()
_TRIED_LENGTH = 64


class Graph:
    """What one forward keeps for its backward: its request, and the graph of its own pass or its part in a shared one.

    With neither, the backward computes the forward a second time.
    """

    __slots__ = ("__weakref__", "dtype", "forward", "gang", "generation", "input_BTD", "output_BTD", "shape")

    def __init__(self, forward: Forward, output_BTD: Tensor) -> None:
        self.forward = forward
        self.shape = tuple(output_BTD.shape)
        self.dtype = dtype_name(output_BTD.dtype)
        self.generation = 0
        """Of the adapter's tensors, to which a graph of its own leads, and to no later ones."""
        self.input_BTD: Tensor | None = None
        self.output_BTD: Tensor | None = None
        self.gang: Gang | None = None

    @property
    def mask_BT(self) -> Tensor | None:
        return self.forward.mask_BT

    def put_aside(self, read_again: Callable[[], Tensor]) -> None:
        """Keep no input in memory; a graph that is kept does by itself, if it must."""
        empty_BTD = torch.empty_like(self.forward.hidden_BTD, device="meta")
        self.forward = replace(self.forward, hidden_BTD=empty_BTD, read_again=read_again)

    def drop(self) -> None:
        """Keep nothing that was computed: the backward computes it again."""
        self.input_BTD = self.output_BTD = None
        if self.gang is not None:
            self.gang.part_from(self)


@dataclass(slots=True, eq=False)
class Backward:
    """A backward that is asked for: grad_BTD at the tail cut, through a graph that is used up."""

    adapter: SessionAdapter
    graph: Graph
    grad_BTD: Tensor
    want_input_grad: bool
    reset: bool


class Gang:
    """The graph of a pass that several sessions share: one backward serves all, or those that are there in time.

    It lives as long as one of its members does. The event loop asks for its members while a lane may part them from it.
    """

    __slots__ = ("__weakref__", "_changing", "due_s", "input_RTD", "output_RTD", "rows", "segments")

    def __init__(
        self,
        input_RTD: Tensor,
        output_RTD: Tensor,
        segments: Sequence[tuple[Segment, Sequence[SessionAdapter]]],
        rows: Mapping[Graph, slice],
    ) -> None:
        """`segments` with the sessions' adapters, in the segment's order."""
        self.input_RTD = input_RTD
        self.output_RTD = output_RTD
        self.segments = segments
        self.rows: weakref.WeakKeyDictionary[Graph, slice] = weakref.WeakKeyDictionary(rows)
        self._changing = threading.Lock()
        self.due_s = 0.0
        """When those members that wait for their backward wait no longer for the others."""

    @property
    def members(self) -> list[Graph]:
        with self._changing:  # a copy first: what is collected meanwhile leaves the mapping, too
            return [graph for at in list(self.rows.keyrefs()) if (graph := at()) is not None]

    def worth_it(self, present: Iterable[Graph | None]) -> bool:
        """Whether one backward for those present, with zeros for the others, beats each computing its forward again."""
        there = {graph for graph in present if graph is not None}
        sizes = {graph: graph.shape[0] for graph in self.members}
        return 2 * sum(size for graph, size in sizes.items() if graph in there) >= sum(sizes.values())

    def keep_only(self, present: Collection[Graph | None]) -> None:
        """Its backward begins, for those present. It uses the graph up: who comes beside must not find it."""
        for graph in self.members:
            if graph not in present:
                self.part_from(graph)

    def part_from(self, graph: Graph) -> None:
        """`graph` computes its forward again; the others stay."""
        with self._changing:
            self.rows.pop(graph, None)
        graph.gang = None

    def release(self) -> None:
        """Every member that is left computes its forward again when its backward comes."""
        for graph in self.members:
            self.part_from(graph)


@contextmanager
def memory_bounds() -> Iterator[None]:
    """Raise CapacityError where PyTorch finds no memory."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise CapacityError("the trunk has no memory left for this microbatch; use a smaller one") from error
        raise


class Lane:
    """One thread's trunk. Every method must be called on that thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        cut: CutLayers,
        device: str,
        meter: GraphMeter,
        *,
        slots: AdapterSlots | None = None,
        shares: Mapping[str, Share] | None = None,
    ) -> None:
        """`slots` are of `model`, unless they are given. With `shares` other processes hold the rest of `model`."""
        self.device = device
        self._meter = meter
        modules = dict(model.named_modules())
        self._part = TrunkPart(model, cut).eval()
        self.slots = slots or AdapterSlots(model)
        self._grouped = GroupedLora(modules, shares)
        self._hidden_size = int(model.config.hidden_size)
        self._max_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self._dtype = next(model.parameters()).dtype
        self.recomputes = 0

    def use_threads(self, threads: int) -> None:
        """PyTorch's threads for what comes next on the calling thread; others keep theirs."""
        if getattr(_CALLING, "threads", 0) != threads:
            torch.get_num_threads()  # asked for the first time in a thread, it takes up what another thread set last
            torch.set_num_threads(threads)
            _CALLING.threads = threads

    def try_out(self, tokens: int, autocast_dtype: str) -> None:
        """One forward of `tokens` in rows of 64, or as long as the model takes, on made-up activations."""
        length = min(_TRIED_LENGTH, tokens, self._max_positions or _TRIED_LENGTH)
        hidden_BTD = torch.zeros(max(1, tokens // length), length, self._hidden_size, dtype=self._dtype)
        cast = AUTOCAST[autocast_dtype]
        with (
            torch.no_grad(),
            self.slots.unadapted(),
            torch.autocast(self.device, dtype=cast, enabled=cast is not None),
        ):
            self._part(hidden_BTD.to(self.device))

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(self, asked: Sequence[Forward], *, keep: bool = True) -> list[tuple[Tensor, Graph]]:
        """For each request hidden_BTD at the tail cut, and what its backward needs; its graph only with `keep`.

        Requests of more than one session must share (`Forward.shares_with`), each of another session. Raises
        CapacityError.
        """
        keep = keep and asked[0].need_grad
        return [self._alone(asked[0], keep)] if len(asked) == 1 else self._together(asked, keep)

    def _alone(self, asked: Forward, keep: bool) -> tuple[Tensor, Graph]:
        input_BTD, output_BTD = self._pass(asked, keep)
        graph = Graph(asked, output_BTD)
        if keep:
            graph.input_BTD, graph.output_BTD = input_BTD, output_BTD
            graph.generation = asked.adapter.generation
        return output_BTD.detach(), graph

    def _pass(self, asked: Forward, keep: bool) -> tuple[Tensor, Tensor]:
        self.slots.bind(asked.adapter)
        input_BTD = asked.values_BTD.to(self.device).requires_grad_(keep)
        mask_BT, position_ids = (
            None if value is None else value.to(self.device) for value in (asked.mask_BT, asked.position_ids)
        )
        known = not keep or self._meter.knows(asked.kind)
        with (
            parametrizing() if asked.adapter.layout.spec.target_parameters else nullcontext(),
            nullcontext() if known else self._meter.measuring(asked.kind, asked.tokens),
        ):
            return input_BTD, self._run(asked.manner, keep, input_BTD, mask_BT, position_ids)

    def _run(
        self, like: Manner, keep: bool, input_BTD: Tensor, mask_BT: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        if self._part.training != like.training:
            self._part.train(like.training)
        cast = AUTOCAST[like.autocast_dtype]
        with (
            drawing(like.seed, self.device) if like.draws else nullcontext(),
            memory_bounds(),
            torch.set_grad_enabled(keep),
            torch.autocast(self.device, dtype=cast, enabled=cast is not None),
        ):
            output_BTD: Tensor = self._part(input_BTD, mask_BT, position_ids)
            return output_BTD.to(input_BTD.dtype) if like.keeps_dtype else output_BTD

    def _together(self, asked: Sequence[Forward], keep: bool) -> list[tuple[Tensor, Graph]]:
        order = sorted(asked, key=lambda one: (one.adapter.layout.key, one.rows))
        slices, rows = {}, 0
        segments: list[Segment] = []
        adapters: list[list[SessionAdapter]] = []
        for _, group in groupby(order, key=lambda one: (one.adapter.layout.key, one.rows)):
            members, start = list(group), rows
            for one in members:
                slices[one] = slice(rows, rows + one.rows)
                rows += one.rows
            if members[0].adapter.layout.values:
                segments.append(Segment.of([one.adapter for one in members], start, rows))
                adapters.append([one.adapter for one in members])
        input_RTD, mask_RT = _joined(order)
        input_RTD = input_RTD.to(self.device).requires_grad_(keep)
        mask_RT, position_ids = (
            None if value is None else value.to(self.device) for value in (mask_RT, asked[0].position_ids)
        )
        output_RTD = self._shared_forward(asked[0].manner, keep, segments, input_RTD, mask_RT, position_ids)
        answers = {}
        for one in order:
            output_BTD = output_RTD.detach()[slices[one], : one.hidden_BTD.shape[1]]
            answers[one] = (output_BTD, Graph(one, output_BTD))
        if keep:
            graphs = {graph: slices[one] for one, (_, graph) in answers.items()}
            gang = Gang(input_RTD, output_RTD, list(zip(segments, adapters, strict=True)), graphs)
            for graph in graphs:
                graph.gang = gang
        return [answers[one] for one in asked]

    def _shared_forward(
        self,
        manner: Manner,
        keep: bool,
        segments: Sequence[Segment],
        input_RTD: Tensor,
        mask_RT: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        with self.slots.unadapted(), self._grouped.applied(segments, len(input_RTD)):
            return self._run(manner, keep, input_RTD, mask_RT, position_ids)

    # ---- backward ------------------------------------------------------------------------------------------------

    def backward(self, asked: Sequence[Backward]) -> list[tuple[Tensor | None, float]]:
        """For each request the gradient at the head cut, if wanted, and the norm of the adapter's gradient so far.

        Requests of more than one session are members of one gang; its members that are absent are released. Raises
        CapacityError.
        """
        gang = asked[0].graph.gang
        if gang is None:
            return [self._backward_alone(one) for one in asked]
        return self._backward_together(gang, asked)

    def _backward_alone(self, asked: Backward) -> tuple[Tensor | None, float]:
        graph, adapter = asked.graph, asked.adapter
        if graph.output_BTD is None or graph.generation != adapter.generation:
            graph.input_BTD, graph.output_BTD = self._pass(graph.forward, keep=True)
            self.recomputes += 1
        if asked.reset:
            adapter.reset_gradient()
        leaves: list[Tensor] = list(adapter.trainable.values())
        if leaves:
            adapter.accumulator()
        if asked.want_input_grad and graph.input_BTD is not None:
            leaves.append(graph.input_BTD)
        if leaves:
            with memory_bounds():
                torch.autograd.backward([graph.output_BTD], [asked.grad_BTD.to(self.device)], inputs=leaves)
        input_grad_BTD = graph.input_BTD.grad if asked.want_input_grad and graph.input_BTD is not None else None
        graph.input_BTD = graph.output_BTD = None
        return input_grad_BTD, adapter.gradient_norm()

    def _backward_together(self, gang: Gang, asked: Sequence[Backward]) -> list[tuple[Tensor | None, float]]:
        grad_RTD = torch.zeros_like(gang.output_RTD)
        slices = {one.graph: gang.rows[one.graph] for one in asked}
        for one in asked:
            grad_RTD[slices[one.graph], : one.grad_BTD.shape[1]] = one.grad_BTD.to(self.device)
        self._shared_backward(gang, grad_RTD)
        input_grad_RTD = gang.input_RTD.grad
        gradients = {
            adapter: segment.gradient_GK[index]
            for segment, adapters in gang.segments
            if segment.train_values
            for index, adapter in enumerate(adapters)
        }
        gang.release()
        for one in asked:  # what may find no memory, before anything is added: who failed half-way is done once more
            if one.reset:
                one.adapter.reset_gradient()
            if one.adapter in gradients:
                one.adapter.accumulator()
        answers: list[tuple[Tensor | None, float]] = []
        for one in asked:
            if one.adapter in gradients:
                one.adapter.accumulator().add_(gradients[one.adapter])
            input_grad_BTD = None
            if one.want_input_grad and input_grad_RTD is not None:
                input_grad_BTD = input_grad_RTD[slices[one.graph], : one.grad_BTD.shape[1]]
            answers.append((input_grad_BTD, one.adapter.gradient_norm()))
        return answers

    def _shared_backward(self, gang: Gang, grad_RTD: Tensor) -> None:
        with memory_bounds():
            torch.autograd.backward([gang.output_RTD], [grad_RTD], inputs=[gang.input_RTD])


def _joined(asked: Sequence[Forward]) -> tuple[Tensor, Tensor | None]:
    """All rows as one batch as long as the longest, and its mask; None where nothing is padded."""
    longest = max(one.hidden_BTD.shape[1] for one in asked)
    missing = [longest - one.hidden_BTD.shape[1] for one in asked]
    hidden = [pad(one.values_BTD, (0, 0, 0, short)) for one, short in zip(asked, missing, strict=True)]
    if not any(missing) and all(one.mask_BT is None for one in asked):
        return torch.cat(hidden), None
    masks = [
        torch.ones(one.hidden_BTD.shape[:2], dtype=torch.int64) if one.mask_BT is None else one.mask_BT for one in asked
    ]
    return torch.cat(hidden), torch.cat([pad(mask, (0, short)) for mask, short in zip(masks, missing, strict=True)])
