"""What hostile and honest clients share: a small model, its LoRAs, the adapters that a trunk holds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from contract import trunk_pb2 as pb
from contract.adapter import adapter_shapes, initial_adapter, resolve_lora, to_bytes
from contract.records import CutLayers, LoraSpec
from contract.wire import lora_to_wire
from server_trunk.server import ServeOptions, TrunkServer
from storage.artifacts import ArtifactStore
from tests.hostile.conversations import Served

CUT = CutLayers(1, 1)
LAYERS = 4
HIDDEN = 64
MAX_TOKENS = 2048


def save_model(directory: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def specs(model_dir: Path) -> list[LoraSpec]:
    """The trunk's part of a few structures: plain, with dropout, DoRA, other ranks for some layers."""
    kinds: list[dict[str, Any]] = [
        {"r": 4},
        {"r": 4, "lora_dropout": 0.1},
        {"r": 2, "use_dora": True},
        {"r": 8, "rank_pattern": {"q_proj": 3}, "use_rslora": True},
    ]
    found = []
    for kind in kinds:
        config = LoraConfig(lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **kind)
        found.append(resolve_lora(model_dir, config).only(_in_trunk))
    return found


def _in_trunk(name: str) -> bool:
    return any(f".{index}." in name for index in CUT.kept(LAYERS, "trunk"))


def put_bases(model_dir: Path, state_dir: Path) -> tuple[tuple[pb.Lora, ...], tuple[str, ...]]:
    """The LoRAs as they go over the wire, and an adapter of each in the trunk's store."""
    store = ArtifactStore(state_dir / "artifacts")
    found = specs(model_dir)
    bases = tuple(store.put(to_bytes(initial_adapter(adapter_shapes(model_dir, spec), 7))) for spec in found)
    return tuple(lora_to_wire(spec) for spec in found), bases


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[TrunkServer, Served]]:
    """A server in this process, with little memory, and what it serves."""
    model_dir, state_dir = save_model(folder / "model"), folder / "state"
    loras, bases = put_bases(model_dir, state_dir)
    options = ServeOptions(
        str(model_dir),
        CUT,
        "127.0.0.1:0",
        state_dir,
        device="cpu",
        batch_tokens=512,
        max_sessions=16,
        max_pending=8,
        max_tokens=MAX_TOKENS,
        memory_budget="64M",
        spill_budget="256M",
        sample_cache_mib=1,
    )
    server = TrunkServer(options)
    await server.start()
    try:
        servicer: Any = server._servicer
        yield server, Served(servicer._agreement, HIDDEN, loras, bases)
    finally:
        await server.stop()
