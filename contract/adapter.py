"""LoRA adapters as every process must see them: structure, names, order, first values, bytes.

A parameter's canonical name is the one PEFT saves it under, without the adapter's name; for example
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`. Vectors are flattened in sorted-name order. An
adapter's bytes are safetensors of float32, sorted, without metadata, and its id is their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError
from torch import Tensor, nn

from contract.architecture import LayerProbe, first_line, read_config, whole_on_meta
from contract.checkpoint import make_folder
from contract.config import RunConfig
from contract.errors import ConfigError, ModelError, StorageError
from contract.partition import present_modules
from contract.records import CutLayers, Factor, LoraSpec, Trainable

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RECORD_FILE = "trunkline.json"
README_FILE = "README.md"

PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"
_Value = TypeVar("_Value")

# What of a LoraConfig is carried over. Anything else that differs from PEFT's own default is refused by name, because
# the other half of the model would not know of it.
_CARRIED = frozenset(
    {
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "fan_in_fan_out"),
    }
)


# ---- structure -----------------------------------------------------------------------------------------------------


def run_lora(config: RunConfig) -> LoraConfig:
    """The adapter that a run's settings ask for, in PEFT's terms; every party of a run resolves this one."""
    names = config.target_module_names()
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=_plain(config.lora_alpha),
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=names[0] if names == ("all-linear",) else list(names),
    )


def resolve_lora(model_dir: str | Path, peft_config: LoraConfig) -> LoraSpec:
    """Spell out every target of `peft_config` on the whole model, which is built without weights.

    `model_dir` needs config.json only. Raises ConfigError for anything but plain LoRA, rsLoRA and DoRA on linear
    layers and fused expert parameters (modules_to_save, biases, embeddings, ... are refused by name), and where
    nothing matches.
    """
    _refuse_unsupported(peft_config)
    asked = LoraConfig(**{name: value for name, value in peft_config.to_dict().items() if name in _CARRIED})
    model = _wrap_on_meta(model_dir, asked)
    rank, alpha = asked.r, float(asked.lora_alpha)
    modules: list[str] = []
    parameters: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target, layer in _lora_layers(model):
        (parameters if isinstance(layer, ParamWrapper) else modules).append(target)
        if layer.r["default"] != rank:
            ranks[target] = int(layer.r["default"])
        if float(layer.lora_alpha["default"]) != alpha:
            alphas[target] = float(layer.lora_alpha["default"])
        if layer.lora_embedding_A:
            raise ConfigError(f"target-modules names {target}, an embedding; LoRA on embeddings is not supported")
    return LoraSpec(
        rank=rank,
        alpha=alpha,
        target_modules=tuple(sorted(modules)),
        target_parameters=tuple(sorted(parameters)),
        rank_pattern=dict(sorted(ranks.items())),
        alpha_pattern=dict(sorted(alphas.items())),
        dropout=float(asked.lora_dropout),
        use_rslora=bool(asked.use_rslora),
        use_dora=bool(asked.use_dora),
    )


def peft_config(spec: LoraSpec, present: Collection[str]) -> LoraConfig:
    """The PEFT configuration of `spec` for a model (a part or the whole) that holds `present` (see present_modules).

    Targets are exact full names and patterns are anchored, so that PEFT's suffix matching has nothing to choose.
    """
    held = set(present)
    modules = [name for name in spec.target_modules if name in held]
    parameters = [name for name in spec.target_parameters if name.rpartition(".")[0] in held]
    kept = {*modules, *parameters}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=_plain(spec.alpha),
        target_modules=modules if kept else DUMMY_TARGET_MODULES,
        target_parameters=parameters or None,
        rank_pattern={_anchored(name): rank for name, rank in spec.rank_pattern.items() if name in kept},
        alpha_pattern={_anchored(name): _plain(alpha) for name, alpha in spec.alpha_pattern.items() if name in kept},
        lora_dropout=spec.dropout,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
    )


def add_lora(model: nn.Module, spec: LoraSpec, adapter: str = "default") -> PeftModel:
    """Wrap a part (or a whole model) in PEFT with the targets of `spec` that it holds.

    Raises ConfigError where PEFT refuses the combination, in PEFT's words.
    """
    with peft_refusals():
        return get_peft_model(model, peft_config(spec, present_modules(model)), adapter)


def adapter_shapes(model_dir: str | Path, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the whole model's adapter by canonical name, sorted; needs config.json only."""
    model = whole_on_meta(read_config(model_dir))
    wrapped = _get_on_meta(model, peft_config(spec, present_modules(model)))
    found = adapter_parameters(wrapped)
    return {name: tuple(found[name].shape) for name in sorted(found)}


def _refuse_unsupported(config: object) -> None:
    if not isinstance(config, LoraConfig) or type(config) is not LoraConfig:
        raise ConfigError(f"lora_config is a {type(config).__name__}; only a peft.LoraConfig is supported")
    usual = LoraConfig().to_dict()
    for name, value in config.to_dict().items():
        if name not in _CARRIED and value != usual.get(name):
            raise ConfigError(f"lora_config.{name} is {value!r}, which is not supported: leave it at {usual.get(name)}")


def _wrap_on_meta(model_dir: str | Path, config: LoraConfig) -> PeftModel:
    return _get_on_meta(whole_on_meta(read_config(model_dir)), config)


def _get_on_meta(model: nn.Module, config: LoraConfig) -> PeftModel:
    with peft_refusals(), torch.device("meta"):
        return get_peft_model(model, config)


@contextmanager
def peft_refusals() -> Iterator[None]:
    """Turns PEFT's refusals into ConfigError, in PEFT's words, and keeps its needless warnings quiet."""
    with warnings.catch_warnings():
        # Notes that tell nobody anything: PEFT finds Conv1D's transposed weights by itself, looks patterns of fused
        # parameters up among the modules only, and asks transformers in a way that will be renamed.
        for message in ("fan_in_fan_out is set to", "The following (rank|alpha)_pattern keys", "`is_gradient_check"):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        except (ValueError, TypeError, AttributeError, NotImplementedError, KeyError) as error:
            raise ConfigError(f"the LoRA settings do not fit this model: {first_line(error)}") from error


def _lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):
            yield f"{name.replace('.base_layer', '')}.{module.parameter_name}", module
        elif isinstance(module, LoraLayer):
            yield name, module


def _anchored(name: str) -> str:
    return f"^{re.escape(name)}$"


def _plain(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha


# ---- live parameters -----------------------------------------------------------------------------------------------


def parameter_names(model: nn.Module, adapter: str = "default") -> dict[str, str]:
    """Canonical name -> the live parameter's name in `model` (as of `named_parameters`), sorted."""
    names = {}
    for live, _ in model.named_parameters():
        head, found, tail = live.rpartition(f".{adapter}.")
        if found and ".lora_" in f"{head}.":
            canonical = head if head.endswith(_MAGNITUDE) else f"{head}.{tail}"
            names[canonical] = live
    return dict(sorted(names.items()))


def adapter_parameters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The live adapter parameters of a PEFT model by canonical name, sorted."""
    live = dict(model.named_parameters())
    return {canonical: live[name] for canonical, name in parameter_names(model, adapter).items()}


def load_adapter_(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str = "default") -> None:
    """Copy `tensors` into the live adapter of a PEFT model.

    Names and shapes must match exactly, or ModelError names the first that does not. Only DoRA magnitudes may be
    absent: a magnitude starts as its base weight's norm, which PEFT has set already.
    """
    live = adapter_parameters(model, adapter)
    for name in sorted(tensors.keys() - live.keys()):
        raise ModelError(f"the adapter holds {name}, which this model does not have")
    for name in sorted(live.keys() - tensors.keys()):
        if not name.endswith(_MAGNITUDE):
            raise ModelError(f"the adapter lacks {name}")
    for name, tensor in tensors.items():
        if tensor.shape != live[name].shape:
            raise ModelError(f"{name} has shape {tuple(tensor.shape)}; the model needs {tuple(live[name].shape)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            live[name].copy_(tensor)


def initial_adapter(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """A new adapter, float32: A kaiming-uniform as PEFT's, B zero, each A drawn from (seed, its name) alone.

    DoRA magnitudes are left out: only who holds the base weight can compute them (see load_adapter_).
    """
    tensors = {}
    for name in sorted(shapes):
        if name.endswith(_MAGNITUDE):
            continue
        tensors[name] = torch.zeros(shapes[name], dtype=torch.float32)
        if is_factor(name, "A"):
            digest = hashlib.sha256(f"trunkline adapter {seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            bound = 1.0 / math.sqrt(shapes[name][1])
            tensors[name].uniform_(-bound, bound, generator=generator)
    return tensors


def is_factor(name: str, factor: Factor) -> bool:
    """Whether the parameter belongs to LoRA factor "A" or "B", or, for "AB", to the adapter at all."""
    if factor == "AB":
        return True
    return name.endswith(f".lora_{factor}.weight")


def trainable_names(names: Iterable[str], factor: Trainable) -> tuple[str, ...]:
    """The names that train under `factor`, sorted. A DoRA magnitude trains with "AB" only."""
    if factor == "none":
        return ()
    return tuple(sorted(name for name in names if is_factor(name, factor)))


def split_adapter(
    tensors: Mapping[str, _Value], probe: LayerProbe, cut: CutLayers
) -> tuple[dict[str, _Value], dict[str, _Value]]:
    """(client part, trunk part): by layer; what belongs to no layer (embeddings, head) is the client's."""
    pattern = re.compile(re.escape(f"{PREFIX}{probe.layers_path}.") + r"(\d+)\.")
    trunk_layers = cut.kept(probe.layers, "trunk")
    client: dict[str, _Value] = {}
    trunk: dict[str, _Value] = {}
    for name in sorted(tensors):
        match = pattern.match(name)
        in_trunk = match is not None and int(match[1]) in trunk_layers
        (trunk if in_trunk else client)[name] = tensors[name]
    return client, trunk


# ---- bytes and vectors ---------------------------------------------------------------------------------------------


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The adapter's bytes: safetensors, float32, sorted names, no metadata. Equal adapters give equal bytes."""
    plain = {name: tensors[name].detach().to("cpu", torch.float32).contiguous().clone() for name in sorted(tensors)}
    return bytes(safetensors.torch.save(plain))


def from_bytes(data: bytes) -> dict[str, Tensor]:
    """Inverse of `to_bytes`. Raises ModelError where the bytes are not float32 safetensors."""
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"the adapter's bytes are not safetensors: {first_line(error)}") from error
    for name in sorted(tensors):
        if tensors[name].dtype != torch.float32:
            raise ModelError(f"{name} is {tensors[name].dtype}; an adapter is stored as float32")
    return {name: tensors[name] for name in sorted(tensors)}


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def flatten(tensors: Mapping[str, Tensor], names: Iterable[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One float32 vector of the named tensors, one after the other in the given order."""
    pieces = [tensors[name].detach().to("cpu", torch.float32).reshape(-1).numpy() for name in names]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.float32)


def unflatten(
    vector: np.ndarray[Any, np.dtype[Any]], shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]
) -> dict[str, Tensor]:
    """Inverse of `flatten`; the tensors own their memory. Raises ModelError where the length does not fit."""
    order = list(names)
    needed = sum(math.prod(shapes[name]) for name in order)
    if vector.ndim != 1 or vector.size != needed:
        raise ModelError(f"the adapter vector has shape {vector.shape}; {len(order)} tensors need ({needed},)")
    tensors, start = {}, 0
    for name in order:
        size = math.prod(shapes[name])
        piece = np.array(vector[start : start + size], dtype=np.float32)
        tensors[name] = torch.from_numpy(piece).reshape(shapes[name])
        start += size
    return tensors


# ---- export --------------------------------------------------------------------------------------------------------


def write_export(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    spec: LoraSpec,
    base_model_name: str,
    title: str = "adapter",
    origin: Mapping[str, str | int] | None = None,
) -> Path:
    """Write `tensors` (canonical names, both sides) as a directory that `PeftModel.from_pretrained` loads.

    It appears whole or not at all, over an earlier export only. The weights file is `to_bytes(tensors)`, so that its
    SHA-256 is the adapter's id. `origin` (the run, the round, the cut, ...) goes into the record. Raises ConfigError
    where something else is in the way, or in an earlier export, StorageError where it cannot be written.
    """
    target = Path(directory)
    weights = to_bytes(tensors)
    config = _config_json(spec, base_model_name)
    record = {
        "format": 1,
        "adapter_sha256": sha256_hex(weights),
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "base_model": base_model_name,
        "origin": dict(origin or {}),
    }
    files = {
        CONFIG_FILE: config,
        WEIGHTS_FILE: weights,
        RECORD_FILE: (json.dumps(record, indent=2) + "\n").encode(),
        README_FILE: _readme(title, spec, base_model_name, record["adapter_sha256"]).encode(),
    }
    try:
        _require_replaceable(target)
        _replace_directory(target, files)
    except OSError as error:
        raise StorageError(f"cannot write the adapter to {target}: {error.strerror or error}") from error
    return target


def _require_replaceable(target: Path) -> None:
    """Raise ConfigError where more than an earlier export would be lost."""
    if not os.path.lexists(target):
        return
    if not (target / RECORD_FILE).is_file():
        raise ConfigError(f"{target} exists and is no earlier export of an adapter; name another directory")
    ours = {CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, README_FILE}
    if others := sorted({path.name for path in target.iterdir()} - ours):
        raise ConfigError(
            f"{target} is an earlier export that also holds {', '.join(others[:3])}, which replacing it would delete; "
            "move that elsewhere or name another directory"
        )


def _replace_directory(target: Path, files: Mapping[str, bytes]) -> None:
    make_folder(target.parent)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh, old = staging / "new", staging / "old"
        fresh.mkdir()
        for name, data in files.items():
            with (fresh / name).open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        if target.exists():
            os.rename(target, old)
        os.rename(fresh, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _config_json(spec: LoraSpec, base_model_name: str) -> bytes:
    held = {*spec.target_modules, *(name.rpartition(".")[0] for name in spec.target_parameters)}
    config = peft_config(spec, held).to_dict()
    config.update(base_model_name_or_path=base_model_name, inference_mode=True)
    text = json.dumps(config, indent=2, sort_keys=True, default=_sorted_list)
    return (text + "\n").encode()


def _sorted_list(value: object) -> list[Any]:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _readme(title: str, spec: LoraSpec, base_model_name: str, sha256: object) -> str:
    kind = "DoRA" if spec.use_dora else "rsLoRA" if spec.use_rslora else "LoRA"
    targets = len(spec.target_modules) + len(spec.target_parameters)
    return f"""# {title}

{kind}, rank {spec.rank}, alpha {spec.alpha:g}, on {targets} targets of `{base_model_name}`.
Trained with Trunkline; SHA-256 of the weights: `{sha256}`.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base_model_name}")
model = PeftModel.from_pretrained(model, "PATH OF THIS DIRECTORY")
```
"""
