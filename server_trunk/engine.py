"""One frozen trunk and the lanes that compute on it. No gRPC, no files but the checkpoint."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from contract.adapter import to_bytes
from contract.checkpoint import fingerprint
from contract.errors import AgreementError, ConfigError, UnsupportedModelError, UpdateError
from contract.partition import blank_part, load_part
from contract.records import AdamWSettings, CutLayers, LoraSpec, Trainable
from server_trunk.graph_meter import GraphMeter
from server_trunk.int8_weights import quantize_weights_
from server_trunk.lane import Lane
from server_trunk.ranks import Ranks
from server_trunk.session_adapter import SessionAdapter, shares_passes
from server_trunk.sharded_lane import ShardedLane


def choose_device(name: str) -> str:
    """ "auto" is cuda where there is one. Raises ConfigError for cuda where there is none, and for other names."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; it must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but this PyTorch sees no CUDA device; use --device cpu or auto")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def choose_lanes(asked: int, threads: int, device: str) -> int:
    """How many passes are computed at once: one for each of up to 8 threads, one on a GPU.

    Two passes of one thread each are faster than one of two threads: nothing waits at the end of each matrix product,
    least of all for a core that a client is using. Raises ConfigError for more lanes than threads.
    """
    if device == "cuda":
        if asked > 1:
            raise ConfigError(f"lanes is {asked}; on a GPU one pass is computed at a time: leave it out")
        return 1
    if asked > threads:
        raise ConfigError(f"lanes is {asked}; it must be at most threads, {threads}: a lane needs a thread of its own")
    return asked or min(threads, 8)


class Engine:
    """One frozen trunk, loaded once, and its lanes."""

    def __init__(
        self,
        model_dir: str | Path,
        cut: CutLayers,
        *,
        dtype: str,
        attn_implementation: str,
        device: str,
        lanes: int = 0,
        weights: str = "",
        ranks: Ranks | None = None,
    ) -> None:
        """Loads the trunk part, with `ranks` this process's share of it, which leads the others.

        `weights` "int8" quantises the linear layers once they are loaded.

        Raises ModelError, UnsupportedModelError, ConfigError.
        """
        self.device = choose_device(device)
        self.threads = torch.get_num_threads()
        self.processes = 1 if ranks is None else ranks.member.size
        lanes = choose_lanes(lanes, self.threads, self.device) if ranks is None else 1
        model = load_trunk(model_dir, cut, dtype, attn_implementation, self.device, self.processes)
        self.weights = weights
        if weights:
            quantize_weights_(model)
        self.cut = cut
        self.dtype = dtype
        self.attn_implementation = attn_implementation
        self.fingerprint = fingerprint(model_dir)
        self.layers = int(model.config.num_hidden_layers)
        self.hidden_size = int(model.config.hidden_size)
        limit = getattr(model.config, "max_position_embeddings", None)  # where clients read theirs
        self.max_positions: int | None = None if limit is None else int(limit)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.own_dropout = _drops_values(model)
        self.meter = GraphMeter(model)
        self.lanes: tuple[Lane, ...]
        if ranks is None:
            models = [model, *(_sharing_weights(model) for _ in range(lanes - 1))]
            self.lanes = tuple(Lane(one, cut, self.device, self.meter) for one in models)
        else:
            blank = blank_part(model_dir, cut, "trunk")
            self.lanes = (ShardedLane(model, blank, cut, self.device, self.meter, ranks),)

    def summary(self) -> str:
        """What is served, in words."""
        first, last = self.cut.head, self.layers - self.cut.tail - 1
        return (
            f"(layers {first} to {last} of {self.layers}, {self.parameters / 1e6:.3g} M parameters, "
            f"{self.weights or self.dtype}, {self.attn_implementation}, {self.device}, "
            f"{self.threads} threads, {len(self.lanes)} lanes"
            f"{f', {self.processes} processes' if self.processes > 1 else ''})"
        )

    def check_lora(self, spec: LoraSpec) -> None:
        """Raise AgreementError or FrameError unless `spec` fits this trunk; may run on any thread."""
        self.lanes[0].slots.check(spec)
        if self.weights and (spec.use_dora or spec.target_parameters):
            raise AgreementError(
                f"this trunk's weights are {self.weights}, to which LoRA and rsLoRA of linear layers can be added: "
                f"use_dora is {spec.use_dora}, and {len(spec.target_parameters)} targets are no linear layers"
            )
        if self.processes > 1 and not shares_passes(spec):
            raise AgreementError(
                f"this trunk is parted among {self.processes} processes, which compute LoRA and rsLoRA of linear "
                f"layers, without dropout: dropout is {spec.dropout}, use_dora {spec.use_dora}, and "
                f"{len(spec.target_parameters)} targets are no linear layers"
            )

    def check_deterministic(self) -> None:
        """Raise AgreementError where this trunk cannot promise the same bits twice."""
        if self.device != "cpu":
            raise AgreementError(
                f"deterministic is asked for, and this trunk computes on {self.device}, where the same bits twice were "
                "never tested: use --device cpu, or leave it out"
            )

    def adapter_values(self, spec: LoraSpec) -> int:
        """How many values an adapter of a `spec` that was checked has at most."""
        return self.lanes[0].slots.values(spec)

    def knows(self, spec: LoraSpec) -> bool:
        """Whether sessions of this structure open at once; a new one takes milliseconds a layer."""
        return self.lanes[0].slots.knows(spec)

    def open(self, spec: LoraSpec, start: Mapping[str, Tensor] | int, trainable: Trainable) -> SessionAdapter:
        """A session's own adapter, from an adapter's tensors or from a seed. On the first lane's thread only."""
        return self.lanes[0].slots.open(spec, start, trainable)

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


def load_trunk(
    model_dir: str | Path, cut: CutLayers, dtype: str, attn_implementation: str, device: str, processes: int
) -> PreTrainedModel:
    """The trunk part, or with several `processes` this one's share. Raises ModelError, UnsupportedModelError,
    ConfigError."""
    model = load_part(
        model_dir,
        cut,
        "trunk",
        dtype=dtype,
        attn_implementation=attn_implementation,
        device=device,
        processes=processes,
    )
    if processes > 1 and _drops_values(model):
        raise UnsupportedModelError(
            f"{model.config.model_type} has dropout of its own, which each of {processes} processes would draw for "
            "itself: serve it by one process"
        )
    return model


def _drops_values(model: PreTrainedModel) -> bool:
    """Whether the layers have dropout of their own: as a module, or as a number that one hands to a function."""
    return any(
        isinstance(module, nn.Dropout)
        and module.p > 0
        or any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())
        for module in model.modules()
    )


def _sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules once more, over the very tensors of `model`."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
