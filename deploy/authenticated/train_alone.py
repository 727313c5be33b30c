"""Asks a trunk for a session outside of any round: `train_alone.py HOST:PORT MODEL DIRECTORY NAME`.

DIRECTORY holds ca.pem, NAME.pem and NAME.key.
"""

import sys
from pathlib import Path

from peft import LoraConfig

import clients

address, model, directory, name = sys.argv[1:]
files = Path(directory)
split = clients.load_split_model(
    model,
    address,
    head_layers=1,
    tail_layers=1,
    lora_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    trunk_ca=files / "ca.pem",
    trunk_certificate=files / f"{name}.pem",
    trunk_key=files / f"{name}.key",
)
clients.close(split)
