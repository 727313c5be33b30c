"""One training process of a benchmark: trains as many steps as each line on stdin says, answers seconds as JSON."""

from __future__ import annotations

import json
import sys
import time

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import clients
from benchmarks.workload import Workload, train


def main(model_dir: str, threads: str, trunk_address: str = "") -> None:
    """Un-split training, or against the trunk at `trunk_address` (cut (1, 1)) when one is given."""
    torch.set_num_threads(int(threads))
    workload = Workload()
    if trunk_address:
        model = clients.load_split_model(
            model_dir, trunk_address, head_layers=1, tail_layers=1, lora_config=workload.lora()
        )
    else:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), workload.lora())
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=workload.learning_rate)
    for line in sys.stdin:
        started_s, cpu_s = time.perf_counter(), time.process_time()
        loss = train(model, workload, optimizer, int(line))
        answer = {"seconds": time.perf_counter() - started_s, "cpu_seconds": time.process_time() - cpu_s, "loss": loss}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    if trunk_address:
        clients.close(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
