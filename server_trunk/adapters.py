"""Many sessions' LoRA adapters over one frozen trunk.

The shared model has one PEFT slot for each distinct LoRA structure. A session owns its tensors and its optimiser; they
are bound into its slot for its turn on the compute thread, so no session ever sees another's. Compute thread only.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from contract.adapter import adapter_parameters, add_lora, initial_adapter, peft_config, peft_refusals, trainable_names
from contract.errors import AgreementError, ConfigError, FrameError
from contract.records import AdamWSettings, LoraSpec, Trainable

_IDLE_SLOTS = 4
_NO_TARGETS = LoraSpec(rank=1, alpha=1.0, target_modules=())


@dataclass(eq=False)
class Slot:
    """A LoRA structure in the shared model, and where its parameters sit."""

    name: str
    places: dict[str, tuple[nn.Module, str]]  # canonical name -> (module, attribute)
    placeholders: dict[str, nn.Parameter]
    users: int = 0


class SessionAdapter:
    """One session's LoRA parameters by canonical name, which of them train, and their AdamW."""

    def __init__(self, slot: Slot, tensors: Mapping[str, Tensor], trained: Trainable) -> None:
        """Names and shapes must be the slot's, or AgreementError names the first that is not.

        Only DoRA magnitudes may be absent: they start as PEFT set them, at their base weight's norm.
        """
        self.slot = slot
        self.parameters: dict[str, nn.Parameter] = {}
        trainable = set(trainable_names(slot.placeholders, trained))
        for name in sorted(tensors.keys() - slot.placeholders.keys()):
            raise AgreementError(f"the first adapter holds {name}, which the session's LoRA targets do not have")
        for name, placeholder in slot.placeholders.items():
            value = tensors.get(name)
            if value is None and name.endswith("lora_magnitude_vector"):
                value = placeholder.detach()
            if value is None or value.shape != placeholder.shape:
                got = "none" if value is None else str(list(value.shape))
                raise AgreementError(f"{name}: the first adapter has {got}; the LoRA has {list(placeholder.shape)}")
            own = value.to(placeholder.device, torch.float32).clone()
            self.parameters[name] = nn.Parameter(own, requires_grad=name in trainable)
        self.trainable = {name: self.parameters[name] for name in sorted(trainable)}
        self._optimizer = torch.optim.AdamW(self.trainable.values()) if self.trainable else None

    def release(self) -> None:
        """Give the memory back now: an optimiser is part of a reference cycle and would wait for the collector."""
        if self._optimizer is not None:
            self._optimizer.state.clear()
            self._optimizer.param_groups.clear()
        self.trainable.clear()
        self.parameters.clear()

    def reset_gradient(self) -> None:
        for parameter in self.trainable.values():
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """What has accumulated since the last step, by name; zeros where nothing has."""
        return {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self.trainable.items()
        }

    def gradient_norm(self) -> float:
        """L2 norm over all accumulated gradients, summed in float64."""
        gradients = [parameter.grad for parameter in self.trainable.values() if parameter.grad is not None]
        if not gradients:
            return 0.0
        norms = torch.stack(torch._foreach_norm(gradients)).to(torch.float64)
        return math.sqrt(float(norms.square().sum()))

    def step(self, settings: AdamWSettings, grad_scale: float) -> None:
        """One AdamW step on the accumulated gradients times `grad_scale`, which are then forgotten."""
        if self._optimizer is None:
            return
        gradients = [parameter.grad for parameter in self.trainable.values() if parameter.grad is not None]
        if gradients and grad_scale != 1.0:
            torch._foreach_mul_(gradients, grad_scale)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.lr
            group["betas"] = (settings.beta1, settings.beta2)
            group["eps"] = settings.eps
            group["weight_decay"] = settings.weight_decay
        self._optimizer.step()
        self.reset_gradient()


class AdapterSlots:
    """The slots of one shared trunk model. `model` gets PEFT's wrappers in place."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        self._hidden_size = int(model.config.hidden_size)
        self._peft = add_lora(model, _NO_TARGETS, "none")
        self._made = 0
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        self._active = Slot("none", {}, {})
        self._bound: SessionAdapter | None = None

    def check(self, spec: LoraSpec) -> None:
        """Raise AgreementError unless every target is in this trunk, FrameError on an impossible rank or dropout."""
        unknown = [name for name in spec.target_modules if not isinstance(self._modules.get(name), (nn.Linear, Conv1D))]
        for name in spec.target_parameters:
            module = self._modules.get(name.rpartition(".")[0])
            parameter = None if module is None else module._parameters.get(name.rpartition(".")[2])
            if parameter is None or parameter.dim() not in (2, 3):
                unknown.append(name)
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise AgreementError(f"LoRA targets that this trunk does not hold: {', '.join(unknown[:3])}{more}")
        for rank in (spec.rank, *spec.rank_pattern.values()):
            if not 1 <= rank <= self._hidden_size:
                raise FrameError(f"lora.rank is {rank}; it must be 1 to {self._hidden_size}, the hidden size")
        if not 0.0 <= spec.dropout < 1.0 or not all(map(math.isfinite, (spec.alpha, *spec.alpha_pattern.values()))):
            raise FrameError(
                f"lora.dropout is {spec.dropout} and lora.alpha {spec.alpha}; want 0 <= dropout < 1, finite"
            )

    def open(self, spec: LoraSpec, start: Mapping[str, Tensor] | int, trainable: Trainable) -> SessionAdapter:
        """A new session's adapter, from given tensors or from a seed. Raises AgreementError, ConfigError (PEFT's)."""
        slot = self._slot(spec)
        if isinstance(start, int):
            start = initial_adapter({name: tuple(place.shape) for name, place in slot.placeholders.items()}, start)
        adapter = SessionAdapter(slot, start, trainable)
        slot.users += 1
        return adapter

    def close(self, adapter: SessionAdapter) -> None:
        """Forget a session's adapter."""
        if self._bound is adapter:
            self._unbind()
        adapter.slot.users -= 1
        adapter.release()

    def bind(self, adapter: SessionAdapter) -> None:
        """Make the shared model compute with `adapter`'s own tensors."""
        if self._bound is adapter:
            return
        self._unbind()
        if self._active is not adapter.slot:
            self._peft.set_adapter(adapter.slot.name)
            self._active = adapter.slot
        for name, (module, attribute) in adapter.slot.places.items():
            setattr(module, attribute, adapter.parameters[name])
        self._bound = adapter

    def _unbind(self) -> None:
        """Put the slot's own parameters back, so that PEFT's bookkeeping never touches a session's."""
        if self._bound is None:
            return
        slot = self._bound.slot
        for name, (module, attribute) in slot.places.items():
            setattr(module, attribute, slot.placeholders[name])
        self._bound = None

    def _slot(self, spec: LoraSpec) -> Slot:
        key = repr(spec)
        if key not in self._slots:
            self._drop_idle()
            self._slots[key] = self._new_slot(spec)
        self._slots.move_to_end(key)
        return self._slots[key]

    def _new_slot(self, spec: LoraSpec) -> Slot:
        self._unbind()
        name = f"slot{self._made}"
        self._made += 1
        try:
            with peft_refusals():
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
        return Slot(name, places, placeholders)

    def _drop_idle(self) -> None:
        idle = [key for key, slot in self._slots.items() if slot.users == 0]
        for key in idle[: max(0, len(idle) - _IDLE_SLOTS + 1)]:
            slot = self._slots.pop(key)
            if self._active is slot:
                self._unbind()
                self._peft.set_adapter("none")
                self._active = Slot("none", {}, {})
            self._peft.delete_adapter(slot.name)
