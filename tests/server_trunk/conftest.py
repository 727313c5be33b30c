"""A tiny model, and trunk servers that live in a thread of the test process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from contract import trunk_pb2 as pb
from contract.adapter import resolve_lora
from contract.records import CutLayers, LoraSpec
from contract.wire import lora_to_wire
from server_trunk.server import ServeOptions, TrunkServer
from tests.server_trunk.wire_client import WireClient

CUT = CutLayers(1, 1)
LAYERS = 4
HIDDEN = 32


def save_llama(directory: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def trunk_only(spec: LoraSpec, layers: int = LAYERS, cut: CutLayers = CUT) -> LoraSpec:
    """The part of a whole model's spec that lies in the trunk."""
    return spec.only(lambda name: any(f".{index}." in name for index in cut.kept(layers, "trunk")))


@pytest.fixture(scope="session")
def lora_config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="session")
def lora(model_dir: Path, lora_config: LoraConfig) -> pb.Lora:
    return lora_to_wire(trunk_only(resolve_lora(model_dir, lora_config)))


class RunningTrunk:
    """A server on a loop of its own thread."""

    def __init__(self, options: ServeOptions) -> None:
        self.server = TrunkServer(options)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.address, self.summary = self.run(self.server.start())

    def run(self, coroutine: Any, timeout_s: float = 60.0) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def stop(self) -> None:
        """Ends the server, if it has not drained already."""
        self.run(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@contextmanager
def running(options: ServeOptions) -> Iterator[RunningTrunk]:
    trunk = RunningTrunk(options)
    try:
        yield trunk
    finally:
        trunk.stop()


@pytest.fixture
def start_trunk(model_dir: Path, tmp_path: Path) -> Iterator[Callable[..., RunningTrunk]]:
    """Starts trunks with changed options; they end with the test."""
    started: list[RunningTrunk] = []

    def start(**options: Any) -> RunningTrunk:
        plain = ServeOptions(str(model_dir), CUT, "127.0.0.1:0", tmp_path / "state", device="cpu", batch_tokens=512)
        started.append(RunningTrunk(replace(plain, **options)))
        return started[-1]

    yield start
    for trunk in started:
        trunk.stop()


@pytest.fixture(scope="session")
def trunk(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTrunk]:
    """One trunk with small limits for the tests that leave nothing behind."""
    options = ServeOptions(
        str(model_dir),
        CUT,
        "127.0.0.1:0",
        tmp_path_factory.mktemp("state"),
        device="cpu",
        batch_tokens=512,
        max_sessions=8,
        max_pending=3,
        max_tokens=64,
    )
    with running(options) as started:
        yield started


@pytest.fixture
def client(trunk: RunningTrunk) -> Iterator[WireClient]:
    opened = WireClient(trunk.address)
    yield opened
    opened.close()
