"""One client of a benchmark: trains as many steps as each line on stdin says, plainly or by DP-SGD, beside a trunk.

Answers a line of JSON: seconds, this process's CPU seconds, the loss, its highest resident memory so far, and what went
over the wire.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
from peft import PeftModel

from benchmarks.workload import Workload
from clients.connection import TrunkConnection
from clients.data import TokenRow
from clients.private_training import train_privately
from clients.split_model import RoundStart, SplitSettings, close, open_split_model, remote_layers
from clients.trainer import Training, tell_nobody, train
from contract import adapter
from contract.architecture import probe
from contract.config import ConfigValue, RunConfig
from contract.records import CutLayers, RoundKey
from orchestrator.trunk import Trunk
from privacy.stream import SecretStream

CUT = CutLayers(1, 1)
PLAIN = "plain"


def main(model_dir: str, threads: str, address: str, side: str) -> None:
    """`side` is "plain" or a value of dp-gradients. The trunk's half of the adapter is frozen on all sides."""
    torch.set_num_threads(int(threads))
    workload = Workload()
    model = open_frozen(Path(model_dir), address, workload, side)
    tokens = workload.batch_BT().numpy().astype("int32")
    rows = [TokenRow(number, row, row, truncated=False) for number, row in enumerate(tokens)]
    log = remote_layers(model).trunk.wire_log
    for line in sys.stdin:
        sent, received = log.sent_bytes, log.received_bytes
        started_s, cpu_s = time.perf_counter(), time.process_time()
        done = work(model, rows, settings(workload, int(line), side), side)
        answer = {
            "seconds": time.perf_counter() - started_s,
            "cpu_seconds": time.process_time() - cpu_s,
            "loss": done.loss,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "sent_bytes": log.sent_bytes - sent,
            "received_bytes": log.received_bytes - received,
        }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    close(model)


def work(model: PeftModel, rows: list[TokenRow], config: RunConfig, side: str) -> Training:
    """A round's training, from a new optimiser on."""
    if side == PLAIN:
        return train(model, rows, config, "benchmark")
    return train_privately(model, rows, config, SecretStream(os.urandom), tell_nobody)


def settings(workload: Workload, steps: int, side: str) -> RunConfig:
    """All rows in every step, so that the sides do the same work."""
    plain: dict[str, ConfigValue] = {
        "local-steps": steps,
        "per-device-train-batch-size": workload.batch_size,
        "learning-rate": workload.learning_rate,
        "max-length": workload.tokens,
    }
    private: dict[str, ConfigValue] = {
        "dp": "example",
        "trunk-adapter": "frozen",
        "dp-sample-rate": 1.0,
        "dp-gradients": side,
    }
    return RunConfig.from_flower(plain if side == PLAIN else plain | private | {"dp-gradients": side})


def open_frozen(model_dir: Path, address: str, workload: Workload, side: str) -> PeftModel:
    spec = adapter.resolve_lora(model_dir, workload.lora())
    first = adapter.initial_adapter(adapter.adapter_shapes(model_dir, spec), workload.seed)
    client, trunk_part = adapter.split_adapter(first, probe(model_dir), CUT)
    orchestrator = Trunk(address)
    start = RoundStart(
        key=RoundKey("benchmark", 1, 1),
        client_id=side,
        trainable="AB",
        client_vector=adapter.flatten(client, sorted(client)),
        client_sha256=adapter.sha256_hex(adapter.to_bytes(client)),
        trunk_sha256=orchestrator.put_adapter(adapter.to_bytes(trunk_part)),
        trunk_frozen=True,
    )
    orchestrator.close()
    return open_split_model(SplitSettings(model_dir, CUT), spec, TrunkConnection(address), start)


if __name__ == "__main__":
    main(*sys.argv[1:])
