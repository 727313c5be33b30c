"""One session's half of the adapter: its values, what its gradient has come to, and its AdamW.

All values lie in one flat tensor, those that train first, so that a step, a norm, a move to disk and a place in a batch
of many sessions are each one operation and not one for every LoRA factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contract.adapter import trainable_names
from contract.errors import AgreementError, StorageError
from contract.failpoint import failpoint
from contract.records import AdamWSettings, LoraSpec, Trainable

_CPU = torch.device("cpu")
_SUMMED_AT_ONCE = 1 << 18
"""Squares that are summed in float32 before float64 takes over."""
_SQUARED_WELL = 1e-15
"""The smallest norm that is the root of squares in float32: the squares of smaller values may be none at all."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies in a session's flat values."""

    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """The tensor as a view of flat values [P], or of several sessions' [G, P] as [G, *shape]."""
        return flat[..., self.start : self.stop].view(*flat.shape[:-1], *self.shape)


def shares_passes(spec: LoraSpec) -> bool:
    """Whether sessions of this structure can share a pass: LoRA and rsLoRA, without dropout.

    DoRA needs its merged weight's norm, adapters of fused experts have no row for a batch to split, and what dropout
    draws must not depend on who else is there: those run one by one.
    """
    return not (spec.use_dora or spec.target_parameters or spec.dropout)


class Layout:
    """A LoRA structure and what of it trains: where each tensor lies, the K values that train before the others.

    Sessions of equal layouts may share a batch as one group.
    """

    def __init__(self, spec: LoraSpec, trained: Trainable, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.spec = spec
        self.trained = trained
        self.key = repr((spec, trained))
        self.trainable = trainable_names(shapes, trained)
        self.places: dict[str, Place] = {}
        start = 0
        for name in (*self.trainable, *sorted(shapes.keys() - set(self.trainable))):
            self.places[name] = Place(start, tuple(shapes[name]))
            start = self.places[name].stop
            if name in self.trainable:
                self.train_values = start
        self.values = start

    train_values = 0
    """K."""

    @cached_property
    def batches(self) -> bool:
        """Whether sessions of this layout can share a pass with others."""
        return shares_passes(self.spec)


class SessionAdapter:
    """One session's LoRA parameters by canonical name, which of them train, and their AdamW."""

    def __init__(
        self,
        layout: Layout,
        placeholders: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        device: torch.device = _CPU,
    ) -> None:
        """Names and shapes must be the layout's, or AgreementError names the first that is not.

        Only DoRA magnitudes may be absent: they start as PEFT set them in `placeholders`, at their base weight's norm.
        """
        self.layout = layout
        self.generation = 0
        """Rises when the tensors are other ones than before: what was bound to them must be bound again."""
        self._file: Path | None = None
        self._device = device
        for name in sorted(tensors.keys() - layout.places.keys()):
            raise AgreementError(f"the first adapter holds {name}, which the session's LoRA targets do not have")
        self.values_P = torch.empty(layout.values, dtype=torch.float32, device=self._device)
        for name, place in layout.places.items():
            value = tensors.get(name)
            if value is None and name.endswith("lora_magnitude_vector"):
                value = placeholders[name].detach()
            if value is None or tuple(value.shape) != place.shape:
                got = "none" if value is None else str(list(value.shape))
                raise AgreementError(f"{name}: the first adapter has {got}; the LoRA has {list(place.shape)}")
            place.of(self.values_P).copy_(value)
        self.gradient_K: Tensor | None = None
        self._bind()
        self._optimizer = self._new_optimizer() if layout.trainable else None

    def _new_optimizer(self) -> torch.optim.AdamW:
        """PyTorch's default for one tensor has the same bits and takes twice as long on a CPU."""
        return torch.optim.AdamW([self._trained], foreach=True)

    def _bind(self) -> None:
        """Make the parameters by name views of the flat values."""
        self.generation += 1
        trainable = set(self.layout.trainable)
        self.parameters = {
            name: nn.Parameter(place.of(self.values_P), requires_grad=name in trainable)
            for name, place in self.layout.places.items()
        }
        self.trainable = {name: self.parameters[name] for name in self.layout.trainable}
        self._trained = nn.Parameter(self.values_P[: self.layout.train_values])

    # ---- on disk while idle --------------------------------------------------------------------------------------

    @property
    def size_bytes(self) -> int:
        """Memory at most: values, gradient and AdamW's two moments."""
        return 4 * (self.layout.values + 3 * self.layout.train_values)

    @property
    def evicted(self) -> bool:
        return self._file is not None

    def evict(self, folder: Path) -> None:
        """Move everything to a file in `folder`. No graph of this adapter's may be kept. Raises StorageError."""
        if self._file is not None or not self.layout.values:
            return
        stored = {"values": self.values_P, **self._moments()}
        if self.gradient_K is not None:
            stored["gradient"] = self.gradient_K
        path = folder / f"adapter-{id(self)}.safetensors"
        failpoint("evict.write")
        try:
            save_file({name: value.detach().to("cpu").contiguous() for name, value in stored.items()}, path)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"an idle adapter cannot be put aside on disk: {error}") from error
        failpoint("evict.written")
        self._file = path
        self._drop()

    def restore(self) -> None:
        """Bring back what `evict` put aside, if it did. Raises StorageError."""
        if self._file is None:
            return
        try:
            stored = {name: value.to(self._device) for name, value in load_file(self._file).items()}
        except (OSError, SafetensorError) as error:
            raise StorageError(f"an adapter put aside on disk cannot be read: {error}") from error
        self._file.unlink(missing_ok=True)
        self._file = None
        self.values_P = stored.pop("values")
        gradient_K = stored.pop("gradient", None)
        self._bind()
        if gradient_K is not None:
            self.accumulator().copy_(gradient_K)
        if self.layout.trainable:
            self._optimizer = self._new_optimizer()
            if stored:
                self._optimizer.state[self._trained] = stored

    def _moments(self) -> dict[str, Tensor]:
        if self._optimizer is None:
            return {}
        return dict(self._optimizer.state.get(self._trained, {}))

    def _drop(self) -> None:
        if self._optimizer is not None:
            self._optimizer.state.clear()
            self._optimizer.param_groups.clear()
        self.trainable.clear()
        self.parameters.clear()
        self.gradient_K = None
        self.values_P = self._trained.data = torch.empty(0)

    def release(self) -> None:
        """Give the memory back now: an optimiser is part of a reference cycle and would wait for the collector."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None
        self._drop()

    def accumulator(self) -> Tensor:
        """What gradients add up in, [K]; zeros where none came since the last step. Autograd adds in place."""
        if self.gradient_K is None:
            self.gradient_K = torch.zeros_like(self._trained)
            for name, parameter in self.trainable.items():
                parameter.grad = self.layout.places[name].of(self.gradient_K)
        return self.gradient_K

    def reset_gradient(self) -> None:
        self.gradient_K = None
        for parameter in self.trainable.values():
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """What has accumulated since the last step, by name; zeros where nothing has."""
        if self.gradient_K is None:
            return {name: torch.zeros_like(parameter) for name, parameter in self.trainable.items()}
        return {name: self.layout.places[name].of(self.gradient_K) for name in self.trainable}

    def gradient_norm(self) -> float:
        """L2 norm over all accumulated gradients, to a few parts in 10^7."""
        if self.gradient_K is None:
            return 0.0
        squares = torch.stack([torch.dot(part, part) for part in torch.split(self.gradient_K, _SUMMED_AT_ONCE)])
        norm = float(squares.sum(dtype=torch.float64).sqrt())
        # Squares leave float32 sooner than their root does; summing all of them in float64 takes ten times as long.
        if _SQUARED_WELL < norm < math.inf:
            return norm
        return float(torch.linalg.vector_norm(self.gradient_K, dtype=torch.float64))

    def step(self, settings: AdamWSettings, grad_scale: float) -> None:
        """One AdamW step on the accumulated gradients times `grad_scale`, which are then forgotten.

        None where no gradient came since the last step. A factor that no row reached counts as one of gradient zero.
        """
        if self._optimizer is None or self.gradient_K is None:
            return
        if grad_scale != 1.0:
            self.gradient_K.mul_(grad_scale)
        self._trained.grad = self.gradient_K
        for group in self._optimizer.param_groups:
            group["lr"] = settings.lr
            group["betas"] = (settings.beta1, settings.beta2)
            group["eps"] = settings.eps
            group["weight_decay"] = settings.weight_decay
        self._optimizer.step()
        self._trained.grad = None
        self.reset_gradient()
