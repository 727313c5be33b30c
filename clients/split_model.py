"""A split model as an ordinary PEFT causal LM: loaded, looked into, exported, closed."""

from __future__ import annotations

import inspect
import logging
import math
import secrets
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from clients.admission import Admission
from clients.connection import TrunkConnection
from clients.link import EXACT, WireCodecs
from clients.remote_layers import RemoteLayers
from clients.remote_trunk import RemoteTrunk
from clients.trunk_route import TrunkRoute, trunk_route
from clients.wire_log import WireLog
from contract import adapter, wire
from contract.architecture import LayerProbe, decoder_layers, flat_arguments, probe, unwrap
from contract.checkpoint import fingerprint
from contract.codec import CODECS
from contract.errors import DataError, IntegrityError, ModelError
from contract.model_files import resolve_model
from contract.partition import attach_remote, load_part
from contract.records import CutLayers, Factor, LoraSpec, RoundKey, Trainable
from contract.tls import TlsFiles
from contract.trunk_arithmetic import PLAIN, TrunkArithmetic
from contract.trunk_pb2 import CloseReply, Hello, ModelAgreement
from privacy.wire import WireMechanism

_HEADER_BYTES = (1 << 10, 1 << 9)  # of an adapter's safetensors: fixed, and per tensor

logger = logging.getLogger("trunkline.clients")


@dataclass(frozen=True, slots=True)
class SplitSettings:
    """Which model, how it is cut and run; what run-config and node-config, or a caller of the SDK, decide.

    `mechanism` stands between the model and the wire; None lets everything pass as it is.
    """

    model_path: str | Path
    cut: CutLayers
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    codecs: WireCodecs = EXACT
    device: str = "cpu"
    timeout_s: float = 300.0
    mechanism: WireMechanism | None = None
    arithmetic: TrunkArithmetic = PLAIN


@dataclass(frozen=True, slots=True)
class RoundStart:
    """Where a client begins in a round: the trunk holds its part of the adapter under `trunk_sha256`.

    With `trunk_frozen` that part stays as it is, and `trainable` is of the client's half alone. With `quiet` the trunk
    tells the orchestrator no counts of this session: how many rows were drawn would undo what secret sampling hides.
    `admission` is what a trunk that takes sessions by ticket is shown.
    """

    key: RoundKey
    client_id: str
    trainable: Factor
    client_vector: npt.NDArray[np.float32] = field(repr=False)
    client_sha256: str
    trunk_sha256: str
    trunk_frozen: bool = False
    quiet: bool = False
    admission: Admission | None = None


def load_split_model(
    model_path: str | Path,
    trunk_address: str,
    head_layers: int,
    tail_layers: int,
    lora_config: LoraConfig,
    *,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    codec: str = "identity",
    codec_backward: str = "same",
    seed: int = 0,
    device: str = "cpu",
    timeout_s: float = 300.0,
    wire_log: str | Path | None = None,
    trunk_autocast: str = "off",
    deterministic: bool = False,
    trunk_ca: str | Path | None = None,
    trunk_certificate: str | Path | None = None,
    trunk_key: str | Path | None = None,
) -> PeftModel:
    """A PEFT causal LM that holds the first `head_layers` and the last `tail_layers` decoder layers of `model_path`.

    The layers between run at the trunk that listens at `trunk_address` (HOST:PORT, or several parted by commas: then
    the one with the most room), in a session of this model's own; their half of the adapter is trained there by
    whatever AdamW the caller trains this model with. `model_path` is a
    whole checkpoint, a client part, or a hub id. Both halves of the adapter are drawn from `seed`. With `wire_log`,
    every field that leaves is listed there as JSON lines (sizes, never values).

    The cut, `dtype` ("float32" or "bfloat16") and `attn_implementation` must be the trunk's. `codec` is that of the
    activations on the wire: "identity" (exact), "bf16", "fp16", "int8", "int4-delta" for announced rows that come
    again, or "auto" for what the measured link needs. `codec_backward` is that of the gradients: "same", or any but
    "int4-delta", for which "same" is "int8". A wait for the trunk ends after `timeout_s`.

    `trunk_autocast` is what the trunk computes in: "off", its weights' type, as an un-split model would; "bfloat16"; or
    "auto", bfloat16 where the trunk gains from it. A `deterministic` session shares no pass with another, so that its
    bits do not depend on who else is there; neither codec nor autocast may go by the clock.

    `trunk_ca`, `trunk_certificate` and `trunk_key` are PEM files, all three or none: with them the trunk is talked to
    by TLS alone.

    Raises ConfigError, ModelError, UnsupportedModelError, AgreementError and ConnectionFailedError.
    """
    tls = TlsFiles.named((trunk_ca, trunk_certificate, trunk_key), ("trunk_ca", "trunk_certificate", "trunk_key"))
    cut = CutLayers(head_layers, tail_layers)
    codecs = WireCodecs.named(codec, codec_backward, CODECS)
    arithmetic = TrunkArithmetic(trunk_autocast, deterministic)
    settings = SplitSettings(
        model_path, cut, dtype, attn_implementation, codecs, device, timeout_s, arithmetic=arithmetic
    )
    route = trunk_route(trunk_address, secrets.token_hex(8), WireLog(wire_log), tls)
    spec = adapter.resolve_lora(resolve_model(model_path), lora_config)
    return open_split_model(settings, spec, route, seed)


def open_split_model(settings: SplitSettings, spec: LoraSpec, route: TrunkRoute, start: int | RoundStart) -> PeftModel:
    """Loads the client part, wraps it and opens its session; `start` is a seed or a round's beginning."""
    directory = resolve_model(settings.model_path)
    found = probe(directory)
    settings.cut.check(found.layers)
    settings.arithmetic.check_beside(settings.codecs.forward, settings.codecs.backward)
    agreement = wire.model_agreement(fingerprint(directory), settings.cut, settings.dtype, settings.attn_implementation)
    # The trunk compares these too; here it shows before a large model is loaded for nothing.
    served = route.describe()
    wire.require_agreement(agreement, served.model)
    if served.weights:
        logger.warning("the trunk computes with %s weights: results are near the un-split model's", served.weights)
    shapes = adapter.adapter_shapes(directory, spec)
    client_shapes, trunk_shapes = adapter.split_adapter(shapes, found, settings.cut)
    if isinstance(start, int):
        trainable: Factor = "AB"
        client_adapter = adapter.initial_adapter(client_shapes, start)
    else:
        client_adapter, trainable = _client_adapter(start, client_shapes), start.trainable
    part = load_part(
        settings.model_path,
        settings.cut,
        "client",
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        device=settings.device,
    )
    model = adapter.add_lora(part, spec)
    adapter.load_adapter_(model, client_adapter)
    trained = adapter.trainable_names(client_shapes, trainable)
    for name, parameter in adapter.adapter_parameters(model).items():
        parameter.requires_grad_(name in trained)
    _refuse_long_sequences(model)
    frozen = not isinstance(start, int) and start.trunk_frozen
    hello = _hello(agreement, trunk_spec(spec, found, settings.cut), "none" if frozen else trainable, start)

    def opening(connection: TrunkConnection) -> RemoteTrunk:
        return RemoteTrunk(
            connection,
            hello,
            hidden_size=found.hidden_size,
            adapter_bytes=_size_limit(trunk_shapes),
            timeout_s=settings.timeout_s,
            mechanism=settings.mechanism,
            codecs=settings.codecs,
            arithmetic=settings.arithmetic,
            admission=None if isinstance(start, int) else start.admission,
        )

    trunk = route.opened(opening)
    layers = RemoteLayers(trunk, spec, str(settings.model_path), frozen=frozen).to(settings.device)
    layers.beside = tuple(weakref.ref(parameter) for parameter in model.parameters() if parameter.requires_grad)
    attach_remote(model, layers)
    return model


def trunk_state(model: nn.Module, *, gradients: bool = False) -> dict[str, Tensor]:
    """The trunk's half of `model`'s adapter, or its accumulated gradients, by canonical name, float32 on the CPU."""
    return remote_layers(model).trunk.read_adapter(gradients=gradients)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Both halves of `model`'s adapter by canonical name, sorted, float32 on the CPU."""
    tensors = {name: value.detach().cpu().clone() for name, value in adapter.adapter_parameters(model).items()}
    tensors.update(trunk_state(model))
    return {name: tensors[name] for name in sorted(tensors)}


def export_adapter(model: nn.Module, directory: str | Path, *, base_model: str | None = None) -> Path:
    """Joins the client's and its trunk session's halves into one stock PEFT adapter for the whole model.

    `PeftModel.from_pretrained(whole_model, directory)` loads it. It names `base_model` as its base, or else the path
    that this model was loaded from. Raises SessionError or ConnectionFailedError when the session is over, ConfigError
    and StorageError when the directory cannot be written.
    """
    layers = remote_layers(model)
    return adapter.write_export(directory, adapter_state(model), layers.spec, base_model or layers.base_model_name)


def close(model: nn.Module, *, trained_tokens: int = 0, contribute: bool = False) -> CloseReply:
    """Ends `model`'s session with the trunk, which then forgets its half of the adapter unless it is a contribution."""
    layers = remote_layers(model)
    reply = layers.trunk.close(trained_tokens=trained_tokens, contribute=contribute)
    layers.lanes.close()
    return reply


@contextmanager
def closing_session(model: nn.Module) -> Iterator[None]:
    """Drops `model`'s session at the end of the block, if it is not closed by then; the trunk then keeps nothing."""
    try:
        yield
    finally:
        layers = remote_layers(model)
        layers.trunk.abandon()
        layers.lanes.close()


def remote_layers(model: nn.Module) -> RemoteLayers:
    """The remote layers of a split model. Raises ModelError for any other model."""
    for module in model.modules():
        if isinstance(module, RemoteLayers):
            return module
    raise ModelError(f"{type(model).__name__} is not a split model: load it with clients.load_split_model")


def trunk_spec(spec: LoraSpec, found: LayerProbe, cut: CutLayers) -> LoraSpec:
    """What of `spec` lies on the trunk's layers."""
    kept = cut.kept(found.layers, "trunk")
    start = f"{found.layers_path}."

    def held(target: str) -> bool:
        return target.startswith(start) and int(target.removeprefix(start).partition(".")[0]) in kept

    return spec.only(held)


def _client_adapter(start: RoundStart, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    tensors = adapter.unflatten(start.client_vector, shapes, sorted(shapes))
    found = adapter.sha256_hex(adapter.to_bytes(tensors))
    if found != start.client_sha256:
        raise IntegrityError(f"the client part of the adapter hashes to {found}; the round's is {start.client_sha256}")
    return tensors


def _hello(agreement: ModelAgreement, spec: LoraSpec, trainable: Trainable, start: int | RoundStart) -> Hello:
    """All of it but the codecs and the arithmetic, which the session itself asks for."""
    hello = Hello(protocol=wire.PROTOCOL, model=agreement, lora=wire.lora_to_wire(spec), trainable=trainable)
    if isinstance(start, int):
        hello.seed = start
    else:
        hello.client_id, hello.adapter_sha256 = start.client_id, start.trunk_sha256
        hello.round.CopyFrom(wire.round_to_wire(start.key))
        hello.quiet = start.quiet
    return hello


def _size_limit(shapes: Mapping[str, tuple[int, ...]]) -> int:
    fixed, per_tensor = _HEADER_BYTES
    return fixed + sum(per_tensor + len(name) + 4 * math.prod(shape) for name, shape in shapes.items())


def _refuse_long_sequences(model: nn.Module) -> None:
    """Raises DataError from the model's forward, before learned positions run out or the trunk is asked."""
    limit = getattr(unwrap(model).config, "max_position_embeddings", None)
    if limit is None:
        return

    def check(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = flat_arguments(inspect.signature(backbone.forward).bind_partial(*args, **kwargs).arguments)
        inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if isinstance(inputs, Tensor) and inputs.shape[1] > limit:
            raise DataError(
                f"a sequence of {inputs.shape[1]} tokens is longer than the model's max_position_embeddings, {limit}: "
                "set max-length to at most that"
            )

    decoder_layers(model)[0].register_forward_pre_hook(check, with_kwargs=True)
