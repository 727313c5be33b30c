"""The yardstick of throughput and of slow links: a trunk as one would first write it. Its client: naive_client.

Plain unary gRPC: one request after another under one lock, with the caller's own PEFT adapter swapped in. Tensors cross
as raw float32. The arithmetic is that of an un-split model: the split itself is contract.partition's, so that only how
requests travel and are served differs from the trunk.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
from peft import PeftModel
from torch import Tensor, nn

from benchmarks.workload import Workload
from contract import adapter
from contract.architecture import probe
from contract.partition import TrunkPart, load_part, present_modules
from contract.records import CutLayers

CUT = CutLayers(1, 1)
MAX_REQUESTS = 64
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass(eq=False)
class _Client:
    """What the server keeps of one client."""

    name: str
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    graphs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class NaiveTrunk:
    """The middle layers, and every client's adapter in them under the client's name. One request at a time."""

    def __init__(self, model_dir: str | Path, workload: Workload, device: str = "cpu") -> None:
        self._workload = workload
        self._device = device
        self._spec = adapter.resolve_lora(model_dir, workload.lora())
        shapes = adapter.adapter_shapes(model_dir, self._spec)
        self._shapes = adapter.split_adapter(shapes, probe(model_dir), CUT)[1]
        part = load_part(model_dir, CUT, "trunk", dtype=workload.dtype, device=device)
        self._config = adapter.peft_config(self._spec, present_modules(part))
        self.model: PeftModel = adapter.add_lora(part, self._spec, "nobody")
        self._part = TrunkPart(self.model, CUT)
        self._clients: dict[str, _Client] = {}
        self._lock = threading.Lock()

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        methods = {"Open": self._open, "Forward": self._forward, "Backward": self._backward, "Step": self._step}
        return grpc.method_handlers_generic_handler(
            "naive.Trunk",
            {name: grpc.unary_unary_rpc_method_handler(self._one_by_one(method)) for name, method in methods.items()},
        )

    def _one_by_one(self, method: Any) -> Any:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            asked, data = unpacked(request)
            with self._lock:
                return bytes(method(asked, data))

        return answer

    def _open(self, asked: dict[str, Any], data: memoryview) -> bytes:
        name = asked["client"]
        self.model.add_adapter(name, self._config)
        adapter.load_adapter_(self.model, adapter.initial_adapter(self._shapes, asked["seed"]), name)
        parameters = list(adapter.adapter_parameters(self.model, name).values())
        optimizer = torch.optim.AdamW(parameters, lr=self._workload.learning_rate)
        self._clients[name] = _Client(name, parameters, optimizer)
        return b""

    def _swapped_in(self, asked: dict[str, Any]) -> _Client:
        client = self._clients[asked["client"]]
        self.model.set_adapter(client.name)
        return client

    def _forward(self, asked: dict[str, Any], data: memoryview) -> bytes:
        client = self._swapped_in(asked)
        dtype = getattr(torch, self._workload.dtype)
        input_BTD = tensor_of(data, asked["shape"]).to(self._device, dtype).requires_grad_()
        output_BTD = self._part(input_BTD)
        client.graphs[asked["microbatch"]] = (input_BTD, output_BTD)
        return raw(output_BTD)

    def _backward(self, asked: dict[str, Any], data: memoryview) -> bytes:
        client = self._swapped_in(asked)
        input_BTD, output_BTD = client.graphs.pop(asked["microbatch"])
        torch.autograd.backward([output_BTD], [tensor_of(data, asked["shape"]).to(output_BTD)])
        norm = norm_of(client.parameters)
        if input_BTD.grad is None:
            raise RuntimeError("the trunk's backward left no gradient of its input")
        return packed({"norm": norm}, raw(input_BTD.grad))

    def _step(self, asked: dict[str, Any], data: memoryview) -> bytes:
        client = self._swapped_in(asked)
        scale_(client.parameters, asked["scale"])
        client.optimizer.step()
        client.optimizer.zero_grad()
        return b""


def norm_of(parameters: list[nn.Parameter]) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def scale_(parameters: list[nn.Parameter], scale: float) -> None:
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], scale)


def packed(fields: dict[str, Any], data: bytes) -> bytes:
    return json.dumps(fields).encode() + b"\n" + data


def unpacked(message: bytes) -> tuple[dict[str, Any], memoryview]:
    end = message.index(b"\n")
    return json.loads(message[:end]), memoryview(message)[end + 1 :]


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()


def tensor_of(data: memoryview, shape: Any) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(*shape)


def serve(trunk: NaiveTrunk) -> tuple[grpc.Server, str]:
    """A running server on a free loopback port, and its HOST:PORT."""
    server = grpc.server(ThreadPoolExecutor(MAX_REQUESTS), options=OPTIONS)
    server.add_generic_rpc_handlers((trunk.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.naive_trunk", description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("announce_file", type=Path, help="gets HOST:PORT once the server is ready")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(argv)
    trunk = NaiveTrunk(options.model_dir, Workload(dtype=options.dtype), options.device)
    server, address = serve(trunk)
    new = options.announce_file.with_suffix(".new")
    new.write_text(address)
    os.replace(new, options.announce_file)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
