"""A client part whose absent layers are a session of a running trunk, without the SDK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from contract import trunk_pb2 as pb
from contract.adapter import (
    adapter_parameters,
    add_lora,
    from_bytes,
    load_adapter_,
    resolve_lora,
    sha256_hex,
    split_adapter,
    to_bytes,
)
from contract.architecture import probe
from contract.partition import attach_remote, load_part
from contract.records import CutLayers
from contract.wire import lora_to_wire
from tests.contract.parity import Tensors
from tests.server_trunk.conftest import trunk_only
from tests.server_trunk.wire_client import WireClient, WireSession


class _OverTheWire(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, anchor: Tensor, remote: Remote, mask_BT: Tensor | None) -> Tensor:
        ctx.remote, ctx.wanted = remote, hidden_BTD.requires_grad
        output = remote.session.forward(
            hidden_BTD,
            mask_BT,
            need_grad=torch.is_grad_enabled() or anchor.requires_grad,
            training=remote.training,
            autocast_dtype=remote.autocast_dtype,
        )
        ctx.microbatch = remote.session.microbatch
        return output

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> Any:
        grad, ctx.remote.norm = ctx.remote.session.backward(
            grad_BTD, want_input_grad=ctx.wanted, microbatch=ctx.microbatch
        )
        return grad, None, None, None


class Remote(nn.Module):
    """Stands for the trunk's layers; `norm` is the trunk adapter's gradient norm after the last backward."""

    def __init__(self, session: WireSession) -> None:
        super().__init__()
        self.session = session
        self.norm = 0.0
        self.autocast_dtype = ""

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor | None, position_ids: Tensor | None) -> Tensor:
        anchor = torch.zeros((), requires_grad=True)
        output: Tensor = _OverTheWire.apply(hidden_BTD, anchor, self, mask_BT)
        return output


class RemoteClient:
    """A client of a running trunk: a PEFT model to call, and the session behind it."""

    def __init__(
        self, wire: WireClient, model_dir: Path, lora: LoraConfig, adapter: Tensors, cut: CutLayers, **hello: Any
    ) -> None:
        spec = resolve_lora(model_dir, lora)
        found = probe(model_dir)
        agreement = wire.call("Describe", pb.DescribeRequest()).model
        local, remote = split_adapter(adapter, found, cut)
        data = to_bytes(remote)
        self.base_sha256 = wire.put_adapter(sha256_hex(data), data)
        part = load_part(
            model_dir, cut, "client", dtype=agreement.dtype, attn_implementation=agreement.attn_implementation
        )
        self.model: PeftModel = add_lora(part, spec).eval()
        load_adapter_(self.model, local)
        lora_wire = lora_to_wire(trunk_only(spec, found.layers, cut))
        self.session = wire.session(wire.hello(lora_wire, adapter_sha256=self.base_sha256, **hello))
        self.remote = Remote(self.session)
        attach_remote(self.model, self.remote)

    def local(self) -> dict[str, nn.Parameter]:
        return adapter_parameters(self.model)

    def trunk_gradients(self) -> Tensors:
        return from_bytes(self.session.read(gradients=True))

    def trunk_weights(self) -> Tensors:
        return from_bytes(self.session.read())
