"""Any Hugging Face decoder-only causal LM, cut into a client part (head and tail) and a trunk part.

Layers keep their absolute indices: absent ones become parameterless stubs, so that `layer_idx`, `layer_types[i]`,
state-dict keys and adapter names are right by construction. Weights come by the class's own `from_pretrained` on a
subclass that prunes itself while still on the meta device, so that absent weights are never read.
"""

from __future__ import annotations

import copy
import inspect
import mmap
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging as hf_logging

from contract.architecture import (
    LayerProbe,
    decoder_layers,
    first_line,
    flat_arguments,
    model_class,
    probe,
    probe_config,
    read_config,
    unwrap,
)
from contract.errors import ConfigError, ModelError, UnsupportedModelError
from contract.model_files import StoredTensor, part_info, read_into, resolve_model, stored_tensors
from contract.records import CutLayers, Side

__all__ = [
    "DTYPES",
    "LayerProbe",
    "RemoteLayers",
    "RemoteStub",
    "TrunkPart",
    "attach_remote",
    "load_part",
    "present_modules",
    "probe",
]

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STORED_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
GENERATION_FILE = "generation_config.json"


class RemoteLayers(Protocol):
    """Stands for the absent layers: hidden_BTD at the head cut to hidden_BTD at the tail cut, differentiable.

    `attention_mask_BT` and `position_ids` (1 or B rows of T) are what the caller gave the model, None where it gave
    none.
    """

    def __call__(self, hidden_BTD: Tensor, attention_mask_BT: Tensor | None, position_ids: Tensor | None) -> Tensor: ...


class AbsentLayer(nn.Module):
    """Holds an absent layer's place: its input goes through unchanged."""

    def __init__(self, returns_tuple: bool, layer: nn.Module) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        # Backbones read plain settings off a layer, for example which mask it wants.
        for name, value in vars(layer).items():
            if not name.startswith("_") and isinstance(value, (str, int, float)) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, hidden_BTD: Tensor | None = None, *args: object, **kwargs: object) -> object:
        hidden_BTD = cast(Tensor, kwargs["hidden_states"]) if hidden_BTD is None else hidden_BTD
        return (hidden_BTD, None) if self.returns_tuple else hidden_BTD


class AbsentEmbedding(nn.Module):
    """Holds an absent (position) embedding's place and adds nothing."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return torch.zeros(())


class AbsentModule(nn.Module):
    """Holds the place of an absent norm, projection or output head: its input goes through unchanged."""

    def forward(self, hidden_BTD: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_BTD


def present_modules(model: nn.Module) -> set[str]:
    """Names of the modules that a part (or a whole model) really holds, stubs left out."""
    return {
        name
        for name, module in unwrap(model).named_modules()
        if not isinstance(module, (AbsentLayer, AbsentEmbedding, AbsentModule))
    }


def blank_part(model_dir: str | Path, cut: CutLayers, side: Side) -> PreTrainedModel:
    """One side's modules without weights, on PyTorch's meta device. Raises as `load_part` does."""
    config = read_config(resolve_model(model_dir))
    found = probe_config(config)
    cut.check(found.layers)
    with torch.device("meta"):
        part = _part_class(model_class(config), found, cut, side)._from_config(
            copy.deepcopy(config), dtype=torch.float32
        )
    return cast(PreTrainedModel, part.eval().requires_grad_(False))


# ---- loading -------------------------------------------------------------------------------------------------------


def load_part(
    model_dir: str | Path,
    cut: CutLayers,
    side: Side,
    *,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    device: str = "cpu",
    processes: int = 1,
) -> PreTrainedModel:
    """One side's model, frozen and in eval mode, from a whole checkpoint or from that side's part.

    With several `processes`, a process group that this one has joined, each gets its share of the weights by the
    model's own tensor-parallel plan. Absent weights are never read. Raises ConfigError (cut, dtype), ModelError (a part
    of another cut, side or dtype; missing, unexpected or misshapen weights; no safetensors) and UnsupportedModelError.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    directory = resolve_model(model_dir)
    config = read_config(directory)
    check_attention(config, attn_implementation)
    found = probe_config(config)
    cut.check(found.layers)
    _check_part(directory, cut, side, dtype)
    weights = {tensor.name: _StoredWeight(tensor) for tensor in stored_tensors(directory)}
    config.use_cache = False
    placed = {"device_map": None if device == "cpu" else {"": device}}
    if processes > 1:
        _check_shares(config, processes)
        placed = {"distributed_config": DistributedConfig(tp_size=processes)}
    part = _part_class(model_class(config), found, cut, side)
    with quiet_loading():
        try:
            model, report = part.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=DTYPES[dtype],
                attn_implementation=attn_implementation,
                output_loading_info=True,
                **placed,
            )
            if (directory / GENERATION_FILE).is_file():
                model.generation_config = GenerationConfig.from_pretrained(directory)
        # The loader's own errors are of many classes; each of them means this checkpoint cannot be loaded.
        except Exception as error:
            raise ModelError(f"{directory} cannot be loaded: {first_line(error)}") from error
    for kind, problem in (("missing_keys", "lacks"), ("unexpected_keys", "holds weights that no layer has:")):
        if report[kind]:
            raise ModelError(f"{directory} {problem} {_names(report[kind])} ({part.__name__}, {side} part)")
    model.generation_config.use_cache = False
    model.config.name_or_path = str(directory)
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


class _StoredWeight:
    """A weight that the loader reads when it comes to it, by plain reads into memory of its own.

    The loader's own way maps the files: pages of every dtype conversion then stay resident until the last weight is
    in, and a file that changes later changes the model.
    """

    def __init__(self, stored: StoredTensor) -> None:
        self._stored = stored

    def get_shape(self) -> list[int]:
        return list(self._stored.shape)

    def __getitem__(self, index: Any) -> Tensor:
        size, dtype = self._stored.size, STORED_DTYPES[self._stored.dtype]
        if size == 0:
            return torch.empty(self._stored.shape, dtype=dtype)
        # Pages of its own, so that what is only read to be converted goes back whole, not to the allocator's heap.
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        read_into(self._stored, memoryview(pages))
        whole = torch.frombuffer(pages, dtype=dtype).reshape(self._stored.shape)
        part = whole[index]
        return part if part.numel() == whole.numel() else part.clone()  # a view would keep the whole in memory


TENSOR_PARALLEL_STYLES = frozenset(
    {"colwise", "rowwise", "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep"}
    | {"replicated_with_grad_allreduce"}
)
"""What transformers' plan may say of a layer's modules. Fused and expert weights are parted in ways of their own."""


def _check_shares(config: PretrainedConfig, processes: int) -> None:
    """Raise UnsupportedModelError unless the layers can be parted among so many processes."""
    plan = {name: style for name, style in (config.base_model_tp_plan or {}).items() if "*" in name}
    others = sorted(set(plan.values()) - TENSOR_PARALLEL_STYLES)
    if not plan or others:
        reason = f"a tensor-parallel plan with {', '.join(others)}" if others else "no tensor-parallel plan"
        raise UnsupportedModelError(f"{config.model_type} has {reason}: serve it by one process")
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads is not None and heads % processes:
            raise UnsupportedModelError(
                f"{config.model_type} has {name} {heads}, which {processes} processes cannot part evenly"
            )


def check_attention(config: PretrainedConfig, attn_implementation: str) -> None:
    """Raise ConfigError unless the architecture has this attention, of the two that give the same answer anywhere."""
    if attn_implementation not in ("sdpa", "eager"):
        raise ConfigError(f"attn-implementation is {attn_implementation!r}; it must be sdpa or eager")
    if attn_implementation == "sdpa" and not model_class(config)._supports_sdpa:
        raise ConfigError(f"attn-implementation is 'sdpa', which {config.model_type} does not have; set it to 'eager'")


def _check_part(directory: Path, cut: CutLayers, side: Side, dtype: str) -> None:
    info = part_info(directory)
    if info is None:
        return
    if info.side != side:
        raise ModelError(f"{directory} is the {info.side} part of a model; the {side} part is needed here")
    if info.cut != cut:
        raise ModelError(
            f"{directory} was cut with head-layers {info.cut.head} and tail-layers {info.cut.tail}; "
            f"head-layers {cut.head} and tail-layers {cut.tail} are asked for"
        )
    if info.dtype not in ("", dtype):
        raise ModelError(f"{directory} was written as {info.dtype}; load it so, or split the model again for {dtype}")


def _part_class(base: type[PreTrainedModel], found: LayerProbe, cut: CutLayers, side: Side) -> type[PreTrainedModel]:
    """`base` under its own name, pruned at the end of its construction, while its weights are still on meta."""
    kept = cut.kept(found.layers, side)

    def construct(self: PreTrainedModel, config: PretrainedConfig, *args: object, **kwargs: object) -> None:
        base.__init__(self, config, *args, **kwargs)
        absent = _prune(self, kept, side, found.returns_tuple)
        self._tp_plan = {rule: style for rule, style in (self._tp_plan or {}).items() if rule not in absent}
        patterns = {_absent_pattern(name, base.base_model_prefix) for name in absent}
        self._keys_to_ignore_on_load_unexpected = set(self._keys_to_ignore_on_load_unexpected or ()) | patterns

    return type(base.__name__, (base,), {"__init__": construct, "__module__": base.__module__})


def _absent_pattern(name: str, prefix: str) -> str:
    """Matches an absent module's keys in a checkpoint of the causal LM and in one of its backbone alone."""
    rest = name.removeprefix(f"{prefix}.")
    optional = f"(?:{re.escape(prefix)}\\.)?" if rest != name else ""
    return rf"^{optional}{re.escape(rest)}\."


def _prune(model: PreTrainedModel, kept: frozenset[int], side: Side, returns_tuple: bool) -> list[str]:
    """Put stubs where the other side's modules were; answer the names of what is gone."""
    backbone, path, layers = decoder_layers(model)
    backbone_path = path.rpartition(".")[0]
    gone = [f"{path}.{index}" for index in range(len(layers)) if index not in kept]
    for index in range(len(layers)):
        if index not in kept:
            layers[index] = AbsentLayer(returns_tuple, layers[index])
    if hasattr(model.config, "layerdrop"):
        model.config.layerdrop = 0.0
        setattr(backbone, "layerdrop", 0.0)  # noqa: B010 (a plain number, not a submodule)
    if side == "client":
        return gone
    for name, child in list(backbone.named_children()):
        if child is not layers and any(True for _ in child.parameters()):
            setattr(backbone, name, AbsentEmbedding() if isinstance(child, nn.Embedding) else AbsentModule())
            gone.append(f"{backbone_path}.{name}")
    head = model.get_output_embeddings()
    for name, child in list(model.named_children()):
        if child is head:
            setattr(model, name, AbsentModule())
            gone.append(name)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.all_tied_weights_keys = {}
            module._tied_weights_keys = {}
    return gone


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Load without the loader's progress bars and reports: what matters of them is raised."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _names(keys: object) -> str:
    names = sorted(str(key) for key in cast(Any, keys))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- running -------------------------------------------------------------------------------------------------------


class RemoteStub(nn.Module):
    """The first absent layer of a client part: calls the remote layers with what the caller gave the backbone."""

    def __init__(self, remote: nn.Module, place: AbsentLayer, name: str) -> None:
        super().__init__()
        self.remote = remote
        self.returns_tuple = place.returns_tuple
        self._model_type = name
        self._call = threading.local()

    def note_inputs(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the backbone: layers see only the 4-D mask that it makes from these."""
        given = flat_arguments(inspect.signature(backbone.forward).bind_partial(*args, **kwargs).arguments)
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if given.get("past_key_values") is not None:
            raise UnsupportedModelError(
                "the trunk keeps no key-value cache, but past_key_values was given: generate with use_cache=False"
            )
        if given.get("output_router_logits"):
            raise UnsupportedModelError(f"{self._model_type}: output_router_logits needs the routers of all layers")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UnsupportedModelError("attention_mask must be of shape (B, T): made 4-D masks do not cross the cut")
        self._call.inputs = (mask, positions)

    def forget_inputs(self, *_: object) -> None:
        """Forward hook of the backbone, called on failure too."""
        self._call.inputs = None

    def forward(self, hidden_BTD: Tensor | None = None, *args: object, **kwargs: object) -> object:
        hidden_BTD = cast(Tensor, kwargs["hidden_states"]) if hidden_BTD is None else hidden_BTD
        inputs = getattr(self._call, "inputs", None)
        if inputs is None:
            raise ModelError("the remote layers were called outside of the model's own forward")
        output_BTD = self.remote(hidden_BTD, *inputs)
        return (output_BTD, None) if self.returns_tuple else output_BTD


def attach_remote(client_model: nn.Module, remote: nn.Module) -> RemoteStub:
    """Put `remote` (a RemoteLayers) at the first absent layer of a client part, PEFT-wrapped or not.

    Raises ModelError where the model has no absent layer.
    """
    backbone, path, layers = decoder_layers(client_model)
    for index, layer in enumerate(layers):
        if isinstance(layer, AbsentLayer):
            stub = RemoteStub(remote, layer, unwrap(client_model).config.model_type)
            layers[index] = stub
            backbone.register_forward_pre_hook(stub.note_inputs, with_kwargs=True)
            backbone.register_forward_hook(stub.forget_inputs, always_call=True)
            return stub
    raise ModelError(f"{path} has no absent layer: a client part without its trunk is needed")


class TrunkPart(nn.Module):
    """A trunk part, PEFT-wrapped or not, as a function of hidden states.

    The model is the child `model`, so that `torch.func.functional_call` can swap its adapter by the names "model." +
    PEFT's. State between the hooks is confined to the calling thread.
    """

    def __init__(self, model: nn.Module, cut: CutLayers) -> None:
        """Raises ModelError unless exactly the layers of the trunk are present."""
        super().__init__()
        backbone, _, layers = decoder_layers(model)
        cut.check(len(layers))
        present = {index for index, layer in enumerate(layers) if not isinstance(layer, AbsentLayer)}
        if present != cut.kept(len(layers), "trunk"):
            raise ModelError(f"the model holds layers {sorted(present)}, which is not the trunk of {cut}")
        self.model = model
        self._backbone = (backbone,)  # in a tuple, or it would be registered a second time
        self._call = threading.local()
        layers[min(present)].register_forward_pre_hook(self._inject, with_kwargs=True)
        layers[max(present)].register_forward_hook(self._grab)

    def forward(
        self, hidden_BTD: Tensor, attention_mask_BT: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """hidden_BTD at the head cut -> hidden_BTD at the tail cut, differentiable in the input and the adapter."""
        positions = {} if position_ids is None else {"position_ids": position_ids}
        self._call.injected, self._call.output = hidden_BTD, None
        try:
            # The class's own forward makes the masks and the rotary embedding; what it feeds the first layer is
            # replaced by the hook.
            self._backbone[0](
                inputs_embeds=hidden_BTD.detach(),
                attention_mask=attention_mask_BT,
                use_cache=False,
                **positions,
            )
            return cast(Tensor, self._call.output)
        finally:
            self._call.injected = self._call.output = None

    def _inject(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        injected = getattr(self._call, "injected", None)
        if injected is None:
            return None
        return ((injected, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": injected})

    def _grab(self, layer: nn.Module, args: object, output: Any) -> None:
        self._call.output = output[0] if isinstance(output, tuple) else output
