"""Imported once, before the matrix forks its processes: what torch and transformers make at their first use is there.

Nothing here starts a thread, and no gRPC: neither would survive the fork.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from contract.config import RunConfig
from contract.partition import load_part
from contract.records import CutLayers
from orchestrator.adapters import draw_first_adapter
from tests.clients.sites import save_site_model


def warm_up() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        model = save_site_model(Path(name) / "model")
        draw_first_adapter(RunConfig.from_flower({"model": str(model), "target-modules": "q_proj"}), model)
        load_part(model, CutLayers(1, 1), "client", dtype="float32", attn_implementation="sdpa", device="cpu")


warm_up()
