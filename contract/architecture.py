"""What a Hugging Face architecture is, and the proof that its decoder layers can be held apart.

No architecture is named here. A dry run of the backbone under fake tensors shows how its layers are called; what it
cannot prove is refused with its reason.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from contract.errors import ModelError, TrunklineError, UnsupportedModelError
from contract.model_files import CONFIG_FILE, resolve_model

# What a layer may be given. All of it either crosses the wire (hidden states, the 2-D mask, position ids) or is
# rebuilt from that by the backbone of either side.
LAYER_ARGUMENTS = frozenset(
    {
        *("hidden_states", "attention_mask", "causal_mask", "alibi", "position_bias", "position_ids", "cache_position"),
        *("position_embeddings", "position_embeddings_global", "position_embeddings_local", "rotary_emb"),
        *("past_key_values", "past_key_value", "layer_past", "cache_params", "use_cache"),
        *("output_attentions", "output_router_logits", "output_hidden_states", "return_dict"),
    }
)


_ROWS, _TOKENS = 2, 3  # of the dry run
_proved: dict[str, LayerProbe] = {}


@dataclass(frozen=True, slots=True)
class LayerProbe:
    """What the dry run proved. `layers_path` is the decoder layers' module name, for example "model.layers"."""

    layers: int
    hidden_size: int
    returns_tuple: bool
    layers_path: str


def read_config(model_dir: str | Path) -> PretrainedConfig:
    """The model's configuration. Raises ModelError or UnsupportedModelError (own code, no such architecture)."""
    directory = resolve_model(model_dir)
    if not (directory / CONFIG_FILE).is_file():
        raise ModelError(f"{directory} holds no {CONFIG_FILE}")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ModelError(f"{directory / CONFIG_FILE} is not valid: {str(error).splitlines()[-1].strip()}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(f"{directory / CONFIG_FILE}: {first_line(error)}") from error


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The causal-LM class for `config`. Raises UnsupportedModelError where there is none that can be split."""
    name = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only decoder-only models can be split")
    if config.get_text_config() is not config:
        raise UnsupportedModelError(f"{name} wraps several models; only a text model on its own can be split")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"{name} has no causal-LM class in this version of transformers")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{name}: the checkpoint is quantized, which the split does not support")
    if getattr(config, "output_router_logits", False):
        raise UnsupportedModelError(
            f"{name}: output_router_logits is set, but the router loss needs the routers of all layers in one place"
        )
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return cast(type[PreTrainedModel], found[0] if isinstance(found, (list, tuple)) else found)


def whole_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The whole model without memory for its weights, to read names and shapes from."""
    with torch.device("meta"):
        return model_class(config)._from_config(copy.deepcopy(config), dtype=torch.float32)


def decoder_layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """(backbone, the layers' path in the model without PEFT's wrappers, the layers).

    Raises UnsupportedModelError where no module list is as long as the configuration says.
    """
    base = unwrap(model)
    count = base.config.num_hidden_layers
    for path, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return base.get_submodule(path.rpartition(".")[0]), path, module
    raise UnsupportedModelError(f"{base.config.model_type} has no list of {count} decoder layers")


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a PeftModel, or `model` itself."""
    get_base_model = cast(Any, getattr(model, "get_base_model", None))
    return cast(PreTrainedModel, model if get_base_model is None else get_base_model())


def probe(config_dir: str | Path) -> LayerProbe:
    """Run the backbone once without memory or weights and prove that its layers can be cut apart.

    `config_dir` needs no more than config.json. Proved: the layers run once each, in order; each takes the last one's
    output unchanged; each is given nothing but hidden states, masks, positions, caches and flags; none of these but
    the hidden states depends on a weight; and the layers run the same when hidden states come in place of tokens.
    Raises UnsupportedModelError with the architecture and the reason, ModelError on an unreadable configuration.
    """
    return probe_config(read_config(config_dir))


def probe_config(config: PretrainedConfig) -> LayerProbe:
    """`probe` for a configuration that is already in hand; a second call for an equal one costs nothing."""
    key = f"{type(config).__qualname__} {config.to_json_string(use_diff=False)}"
    if key not in _proved:
        _proved[key] = _prove(config)
    return _proved[key]


def _prove(config: PretrainedConfig) -> LayerProbe:
    name = config.model_type
    cls = model_class(config)
    reasons = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        try:
            model = cls._from_config(copy.deepcopy(config), attn_implementation="eager", dtype=torch.bfloat16).eval()
        except (ValueError, RuntimeError, TypeError, AttributeError, ImportError) as error:
            raise UnsupportedModelError(f"{name} cannot be built for the dry run: {first_line(error)}") from error
        backbone, path, layers = decoder_layers(model)
        if "inputs_embeds" not in inspect.signature(backbone.forward).parameters:
            raise UnsupportedModelError(
                f"{name} cannot be split: its layers sit in {type(backbone).__name__}, which takes no inputs_embeds"
            )
        for returns_tuple in (False, True):
            run = _DryRun(name, returns_tuple, layers)
            reason = run.failure(model, backbone)
            if reason is None:
                _refuse_sharing(config)
                return LayerProbe(len(layers), run.hidden_size, returns_tuple, path)
            reasons.append(reason)
    raise UnsupportedModelError(f"{name} cannot be split: {reasons[0]}; with tuples from its layers: {reasons[1]}")


def _refuse_sharing(config: PretrainedConfig) -> None:
    for field in ("num_kv_shared_layers", "use_cla"):
        if getattr(config, field, None):
            raise UnsupportedModelError(
                f"{config.model_type} shares keys and values across layers ({field} = {getattr(config, field)}), "
                "so its layers cannot be held apart"
            )


class _DryRun:
    """One pass in which every layer only records what it was given and answers a fresh tensor."""

    def __init__(self, name: str, returns_tuple: bool, layers: nn.ModuleList) -> None:
        self.name = name
        self.returns_tuple = returns_tuple
        self.called: list[int] = []
        self.hidden_size = 0
        self.reason: str | None = None
        self.last: Tensor | None = None
        for index, layer in enumerate(layers):
            signature = inspect.signature(type(layer).forward)
            layer.forward = self._stand_in(index, signature)
        self.layers = len(layers)

    def _stand_in(self, index: int, signature: inspect.Signature) -> Callable[..., object]:
        def forward(*args: object, **kwargs: object) -> object:
            given = flat_arguments(signature.bind_partial(None, *args, **kwargs).arguments)
            given.pop("self", None)
            hidden = given.pop("hidden_states", None)
            self._check_arguments(given)
            if not isinstance(hidden, Tensor) or hidden.dim() != 3 or tuple(hidden.shape[:2]) != (_ROWS, _TOKENS):
                shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
                self.reason = self.reason or f"layer {index} is given {shape} where (B, T, D) is needed"
                hidden = torch.zeros(_ROWS, _TOKENS, max(self.hidden_size, 1), dtype=torch.bfloat16)
            elif index and hidden is not self.last:
                self.reason = self.reason or f"layer {index} is not given layer {index - 1}'s output as it is"
            self.hidden_size = hidden.shape[-1]
            self.called.append(index)
            self.last = torch.empty_like(hidden, requires_grad=False)
            return (self.last, None) if self.returns_tuple else self.last

        return forward

    def _check_arguments(self, given: Mapping[str, object]) -> None:
        for argument, value in given.items():
            if argument not in LAYER_ARGUMENTS and value is not None:
                raise UnsupportedModelError(
                    f"{self.name} cannot be split: its layers are given {argument!r}, which does not cross the cut"
                )
            if _is_learned(value):
                raise UnsupportedModelError(
                    f"{self.name} cannot be split: its layers are given {argument!r}, which is made with weights"
                )

    def failure(self, model: PreTrainedModel, backbone: nn.Module) -> str | None:
        """Why the layers cannot be cut apart if they answer in this run's way; None if they can."""
        mask = torch.ones(_ROWS, _TOKENS, dtype=torch.long)
        try:
            tokens = torch.zeros(_ROWS, _TOKENS, dtype=torch.long)
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
            from_tokens, self.called = self.called, []
            hidden = torch.zeros(_ROWS, _TOKENS, max(self.hidden_size, 1), dtype=torch.bfloat16)
            # Narrower embeddings are projected first, which a trunk leaves out; its own layers still run as proved.
            if self.hidden_size == model.get_input_embeddings().weight.shape[-1]:
                backbone(inputs_embeds=hidden, attention_mask=mask, use_cache=False)
                if self.called != from_tokens:
                    self.reason = self.reason or "its layers run otherwise when given hidden states"
        except TrunklineError:
            raise
        # Anything may come out of foreign model code, and whatever it is, the answer is the same: not proved.
        except Exception as error:  # noqa: BLE001
            return self.reason or f"the dry run failed with {type(error).__name__}: {first_line(error)}"
        if self.reason is None and from_tokens != list(range(self.layers)):
            self.reason = f"its layers run in the order {from_tokens}"
        if self.reason is None and logits.dim() != 3:
            self.reason = f"its logits have shape {tuple(logits.shape)}"
        return self.reason


def _is_learned(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, Mapping):
        return any(_is_learned(item) for item in value.values())
    return isinstance(value, (tuple, list)) and any(_is_learned(item) for item in value)


def flat_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in arguments.items() if name not in ("args", "kwargs")}
    return {**flat, **arguments.get("kwargs", {})}


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
