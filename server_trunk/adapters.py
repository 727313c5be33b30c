"""Many sessions' LoRA adapters over one frozen trunk, one at a time: stock PEFT's own arithmetic, bit for bit.

A lane's model has one PEFT slot for each distinct LoRA structure. A session owns its tensors and its optimiser; they
are bound into its slot for its turn on the lane's thread, so no session ever sees another's. One thread only.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from contract.adapter import adapter_parameters, add_lora, initial_adapter, peft_config, peft_refusals
from contract.errors import AgreementError, ConfigError, FrameError
from contract.records import LoraSpec, Trainable
from server_trunk.session_adapter import Layout, SessionAdapter
from server_trunk.torch_globals import drawing, keep_versions

_SLOTS = 16
_MAX_ALPHA = 1e6  # far above any use, and every product with it is a float32
_NO_TARGETS = LoraSpec(rank=1, alpha=1.0, target_modules=())


@dataclass(eq=False)
class Slot:
    """A LoRA structure in the shared model, and where its parameters sit."""

    name: str
    places: dict[str, tuple[nn.Module, str]]  # canonical name -> (module, attribute)
    placeholders: dict[str, nn.Parameter]


class AdapterSlots:
    """The slots of one shared trunk model. `model` gets PEFT's wrappers in place."""

    def __init__(self, model: PreTrainedModel, device: str = "") -> None:
        """Sessions' values are on `device`, which is the model's unless it is named."""
        self._device = torch.device(device) if device else next(model.parameters()).device
        self._model = model
        self._modules = dict(model.named_modules())
        self._shapes = {
            name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        """As the model has them: a parameter that a pass parametrizes is not there meanwhile."""
        keep_versions()
        self._hidden_size = int(model.config.hidden_size)
        self._peft = add_lora(model, _NO_TARGETS, "none")
        self._made = 0
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        self._active = Slot("none", {}, {})
        self._bound: SessionAdapter | None = None
        self._generation = 0
        self._wrapped: list[BaseTunerLayer] = []

    def check(self, spec: LoraSpec) -> None:
        """Raise AgreementError unless every target is in this trunk, FrameError on an impossible structure."""
        targets = {*spec.target_modules, *spec.target_parameters}
        if len(targets) < len(spec.target_modules) + len(spec.target_parameters):
            raise FrameError("lora names a target twice")
        unknown = [name for name in spec.target_modules if not isinstance(self._modules.get(name), (nn.Linear, Conv1D))]
        for name in spec.target_parameters:
            if len(self._shapes.get(name, ())) not in (2, 3):
                unknown.append(name)
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise AgreementError(f"LoRA targets that this trunk does not hold: {', '.join(unknown[:3])}{more}")
        for name in (*spec.rank_pattern, *spec.alpha_pattern):
            if name not in targets:
                raise FrameError(f"lora has a pattern for {name[:200]!r}, which is none of its targets")
        for rank in (spec.rank, *spec.rank_pattern.values()):
            if not 1 <= rank <= self._hidden_size:
                raise FrameError(f"lora.rank is {rank}; it must be 1 to {self._hidden_size}, the hidden size")
        for alpha in (spec.alpha, *spec.alpha_pattern.values()):
            if not abs(alpha) <= _MAX_ALPHA:
                raise FrameError(f"lora.alpha is {alpha}; it must be finite, and {_MAX_ALPHA:g} at most")
        if not 0.0 <= spec.dropout < 1.0:
            raise FrameError(f"lora.dropout is {spec.dropout}; it must be at least 0 and less than 1")

    def knows(self, spec: LoraSpec) -> bool:
        """Whether there is a slot for it already; may be asked on any thread."""
        return repr(spec) in self._slots

    def values(self, spec: LoraSpec) -> int:
        """How many values an adapter of `spec`, which was checked, has at most."""
        return sum(self._values_of(spec, name) for name in (*spec.target_modules, *spec.target_parameters))

    def _values_of(self, spec: LoraSpec, name: str) -> int:
        module = self._modules.get(name)
        shape = self._shapes[name] if module is None else tuple(module.weight.shape)
        factors: int = spec.rank_pattern.get(name, spec.rank) * math.prod(shape[:-2]) * sum(shape[-2:])
        return factors + (max(shape) if spec.use_dora else 0)

    def open(self, spec: LoraSpec, start: Mapping[str, Tensor] | int, trained: Trainable) -> SessionAdapter:
        """A new session's adapter, from given tensors or from a seed. Raises AgreementError, ConfigError (PEFT's)."""
        slot = self._slot(spec)
        shapes = {name: tuple(place.shape) for name, place in slot.placeholders.items()}
        if isinstance(start, int):
            start = initial_adapter(shapes, start)
        return SessionAdapter(Layout(spec, trained, shapes), slot.placeholders, start, self._device)

    def close(self, adapter: SessionAdapter) -> None:
        """Forget a session's adapter, so that the model holds it no longer."""
        if self._bound is adapter:
            self._unbind()

    def bind(self, adapter: SessionAdapter) -> None:
        """Make the model compute with `adapter`'s own tensors."""
        if self._bound is adapter and self._generation == adapter.generation:
            return
        slot = self._slot(adapter.layout.spec)
        self._unbind()
        if self._active is not slot:
            self._peft.set_adapter(slot.name)
            self._active = slot
        for name, (module, attribute) in slot.places.items():
            setattr(module, attribute, adapter.parameters[name])
        self._bound, self._generation = adapter, adapter.generation

    @contextmanager
    def unadapted(self) -> Iterator[None]:
        """Within, the model computes without any adapter of PEFT's."""
        layers = self._wrapped
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def _unbind(self) -> None:
        """Put the slot's own parameters back, so that PEFT's bookkeeping never touches a session's."""
        if self._bound is None:
            return
        for name, (module, attribute) in self._active.places.items():
            setattr(module, attribute, self._active.placeholders[name])
        self._bound = None

    def _slot(self, spec: LoraSpec) -> Slot:
        key = repr(spec)
        if key not in self._slots:
            self._drop_oldest()
            self._slots[key] = self._new_slot(spec)
        self._slots.move_to_end(key)
        return self._slots[key]

    def _new_slot(self, spec: LoraSpec) -> Slot:
        self._unbind()
        name = f"slot{self._made}"
        self._made += 1
        try:
            # On no device: what it would hold is never computed with, but for DoRA's magnitudes. Not by PEFT's
            # low_cpu_mem_usage, which patches nn.Module, so that the tensors which another lane binds were gone.
            with peft_refusals(), drawing(0, self._device.type) if spec.use_dora else torch.device("meta"):
                self._peft.add_adapter(name, peft_config(spec, self._modules))
        except ConfigError:
            if name in self._peft.peft_config:
                self._peft.delete_adapter(name)
            raise
        self._model.train(self._model.training)  # PEFT's new modules start in training mode, whatever the model's is
        placeholders = adapter_parameters(self._peft, name)
        canonical = {id(parameter): name for name, parameter in placeholders.items()}
        places = {
            canonical[id(parameter)]: (module, attribute)
            for module in self._peft.modules()
            for attribute, parameter in module._parameters.items()
            if id(parameter) in canonical
        }
        self._wrapped = [module for module in self._peft.modules() if isinstance(module, BaseTunerLayer)]
        return Slot(name, places, placeholders)

    def _drop_oldest(self) -> None:
        """Make room for a structure. One that is needed again is made again, which takes milliseconds a layer."""
        while len(self._slots) >= _SLOTS:
            _, slot = self._slots.popitem(last=False)
            if self._active is slot:
                self._unbind()
                self._peft.set_adapter("none")
                self._active = Slot("none", {}, {})
            self._peft.delete_adapter(slot.name)
