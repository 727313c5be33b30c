"""The demo's run: four clients, three rounds, each client one domain of the standard library."""

from __future__ import annotations

from pathlib import Path

from clients.stdlib_text import DOMAINS
from contract.config import ConfigValue

MODEL_DIR = Path(__file__).parent / "model"
SOURCES = tuple(f"stdlib:{domain}" for domain in DOMAINS)
"""What client 0, 1, ... trains on; in a simulation `data` names the same by number."""

RUN_CONFIG: dict[str, ConfigValue] = {
    "data": "stdlib:{partition}",
    "num-rounds": 3,
    "quorum": 3,
    "aggregation": "ffa",
    "max-length": 128,
    "eval-fraction": 0.03,
    "local-steps": 10,
    "per-device-train-batch-size": 8,
    "learning-rate": 5e-3,
    "lr-scheduler-type": "linear",
    "lora-r": 16,
    "lora-alpha": 32.0,
    "threads": 1,
}
"""What the demo sets beside RunConfig's defaults; `model` and `trunk-address` are the caller's."""
