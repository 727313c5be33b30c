"""The trunk's arithmetic: forward, backward and step of one session at a time. No gRPC, no files but the checkpoint.

Everything but `check_lora` must run on one thread, the same for all calls: autocast, hooks and PEFT's slots are not
shared between threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from contract.adapter import to_bytes
from contract.checkpoint import fingerprint
from contract.codec import dtype_name, require_finite
from contract.errors import CapacityError, ConfigError, UpdateError
from contract.partition import TrunkPart, load_part
from contract.records import AdamWSettings, CutLayers, LoraSpec, Trainable
from server_trunk.adapters import AdapterSlots, SessionAdapter

AUTOCAST: Mapping[str, torch.dtype | None] = {"": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True, eq=False)
class Graph:
    """A forward that waits for its backward: its input (a leaf) and its output, both [B, T, D], and its mask."""

    input_BTD: Tensor
    output_BTD: Tensor
    mask_BT: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.output_BTD.shape)

    @property
    def dtype(self) -> str:
        return dtype_name(self.output_BTD.dtype)


@contextmanager
def _memory_bounds() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise CapacityError("the trunk has no memory left for this microbatch; use a smaller one") from error
        raise


def choose_device(name: str) -> str:
    """ "auto" is cuda where there is one. Raises ConfigError for cuda where there is none, and for other names."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; it must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but this PyTorch sees no CUDA device; use --device cpu or auto")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


class Engine:
    """One frozen trunk and the arithmetic on it."""

    def __init__(
        self, model_dir: str | Path, cut: CutLayers, *, dtype: str, attn_implementation: str, device: str
    ) -> None:
        """Loads the trunk part. Raises ModelError, UnsupportedModelError, ConfigError."""
        self.device = choose_device(device)
        model = load_part(
            model_dir, cut, "trunk", dtype=dtype, attn_implementation=attn_implementation, device=self.device
        )
        self.cut = cut
        self.dtype = dtype
        self.attn_implementation = attn_implementation
        self.fingerprint = fingerprint(model_dir)
        self.layers = int(model.config.num_hidden_layers)
        self.hidden_size = int(model.config.hidden_size)
        limit = getattr(model.config, "max_position_embeddings", None)  # where clients read theirs
        self.max_positions: int | None = None if limit is None else int(limit)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self._part = TrunkPart(model, cut).eval()
        self._slots = AdapterSlots(model)

    def summary(self) -> str:
        """What is served, in words."""
        first, last = self.cut.head, self.layers - self.cut.tail - 1
        return (
            f"(layers {first} to {last} of {self.layers}, {self.parameters / 1e6:.3g} M parameters, {self.dtype}, "
            f"{self.attn_implementation}, {self.device}, {torch.get_num_threads()} threads)"
        )

    def check_lora(self, spec: LoraSpec) -> None:
        """Raise AgreementError or FrameError unless `spec` fits this trunk; may run on any thread."""
        self._slots.check(spec)

    def open(self, spec: LoraSpec, start: Mapping[str, Tensor] | int, trainable: Trainable) -> SessionAdapter:
        """A session's own adapter, from an adapter's tensors or from a seed."""
        return self._slots.open(spec, start, trainable)

    def close(self, adapter: SessionAdapter) -> None:
        """Forget a session's adapter."""
        self._slots.close(adapter)

    def forward(
        self,
        adapter: SessionAdapter,
        hidden_BTD: Tensor,
        mask_BT: Tensor | None,
        position_ids: Tensor | None,
        *,
        autocast_dtype: str,
        training: bool,
        need_grad: bool,
    ) -> Graph:
        """hidden_BTD through the trunk; the answer's output carries a graph only under `need_grad`.

        Raises NonFiniteError for a NaN or an infinity in `hidden_BTD`, CapacityError when memory runs out.
        """
        require_finite(hidden_BTD, "forward.hidden")
        self._slots.bind(adapter)
        if self._part.training != training:
            self._part.train(training)
        input_BTD = hidden_BTD.to(self.device).requires_grad_(need_grad)
        mask_here_BT, position_ids = (None if t is None else t.to(self.device) for t in (mask_BT, position_ids))
        cast = AUTOCAST[autocast_dtype]
        with (
            _memory_bounds(),
            torch.set_grad_enabled(need_grad),
            torch.autocast(self.device, dtype=cast, enabled=cast is not None),
        ):
            output_BTD = self._part(input_BTD, mask_here_BT, position_ids)
        return Graph(input_BTD, output_BTD, mask_BT)

    def backward(
        self, adapter: SessionAdapter, graph: Graph, grad_BTD: Tensor, *, want_input_grad: bool, reset: bool
    ) -> tuple[Tensor | None, float]:
        """(gradient at the head cut if wanted, norm of the adapter's accumulated gradient); uses `graph` up.

        With `reset`, what accumulated before is forgotten first. Raises NonFiniteError for a NaN or an infinity in
        `grad_BTD`, CapacityError when memory runs out.
        """
        require_finite(grad_BTD, "backward.grad")
        if reset:
            adapter.reset_gradient()
        leaves: list[Tensor] = list(adapter.trainable.values())
        if want_input_grad:
            leaves.append(graph.input_BTD)
        if leaves:
            with _memory_bounds():
                torch.autograd.backward([graph.output_BTD], [grad_BTD.to(self.device)], inputs=leaves)
        return graph.input_BTD.grad, adapter.gradient_norm()

    def step(self, adapter: SessionAdapter, settings: AdamWSettings, grad_scale: float) -> None:
        """One AdamW step of this session's trainable factors."""
        adapter.step(settings, grad_scale)

    def read(self, adapter: SessionAdapter, *, gradients: bool) -> bytes:
        """The adapter's weights, or its accumulated gradients, as safetensors."""
        return to_bytes(adapter.gradients() if gradients else adapter.parameters)

    def require_finite(self, adapter: SessionAdapter) -> None:
        """Raise UpdateError that names the first parameter with a NaN or an infinity."""
        for name, parameter in adapter.parameters.items():
            if not math.isfinite(float(parameter.detach().sum())) and not bool(torch.isfinite(parameter).all()):
                raise UpdateError(f"the trained trunk adapter holds a NaN or an infinity in {name}")
