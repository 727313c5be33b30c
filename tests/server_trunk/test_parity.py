"""A session over real gRPC against the un-split PEFT model, bit for bit, and against its optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from contract.adapter import adapter_parameters, trainable_names
from contract.records import CutLayers
from server_trunk.server import ServeOptions
from tests.contract.families import attention, batch, save_model
from tests.contract.parity import Tensors, differences, reference, run, trained_adapter
from tests.server_trunk.conftest import RunningTrunk, running
from tests.server_trunk.remote import RemoteClient
from tests.server_trunk.wire_client import WireClient

ALL_LINEAR = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
CUT = CutLayers(1, 1)
FAMILIES = ("llama", "gpt2", "gemma3-text", "bloom", "opt", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def serve_family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Context managers of (checkpoint, client of a trunk that serves it)."""
    root = tmp_path_factory.mktemp("families")

    @contextmanager
    def serve(family: str, cut: CutLayers = CUT, **options: Any) -> Iterator[tuple[Path, WireClient]]:
        directory = root / family
        if not directory.exists():
            save_model(family, directory)
        plain = ServeOptions(
            str(directory), cut, "127.0.0.1:0", root / "state", attn_implementation=attention(family), device="cpu"
        )
        with running(replace(plain, **options)) as trunk:
            wire = WireClient(trunk.address)
            yield directory, wire
            wire.close()

    yield serve


def run_remote(client: RemoteClient, *args: Any, **kwargs: Any) -> Tensors:
    found = run(client.model, client.local(), *args, **kwargs)
    return found | {f"grad {name}": grad for name, grad in client.trunk_gradients().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_session_equals_the_unsplit_model_bitwise(serve_family: Callable[..., Any], family: str) -> None:
    with serve_family(family) as (directory, wire):
        adapter = trained_adapter(directory, ALL_LINEAR)
        whole = reference(directory, ALL_LINEAR, adapter, attention(family))
        client = RemoteClient(wire, directory, ALL_LINEAR, adapter, CUT)
        for padding in ("none", "left", "right"):
            expected = run(whole, adapter_parameters(whole), batch(padding))
            assert differences(expected, run_remote(client, batch(padding))) == [], padding
            client.session.step(lr=0.0)  # forgets the gradients
