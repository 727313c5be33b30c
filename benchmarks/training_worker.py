"""One training process of a benchmark: does what each line on stdin orders (see benchmarks.processes.Order).

Answers a line of JSON: wall and CPU seconds of this process, and the loss. A model is opened at the first order that
needs it, so that an order of 0 steps makes ready and is not measured.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import clients
from benchmarks.naive_client import accumulate_naively, open_naive_model
from benchmarks.processes import Order, Side
from benchmarks.workload import SHAPES, Workload, accumulate, one_by_one
from clients.heap import keep_freed

Train = Callable[[Workload, torch.optim.Optimizer, int, int], float]


@dataclass(frozen=True, slots=True)
class Trainee:
    """A model in training. `train` takes the workload, the optimiser, steps and microbatches; `close` ends sessions."""

    model: PeftModel
    optimizer: torch.optim.Optimizer
    train: Train
    close: Callable[[], object]


def open_trainee(side: Side, address: str, codec: str, model_dir: str, workload: Workload, device: str) -> Trainee:
    """Un-split PEFT, or a client of the trunk or the naive trunk at `address`; cut (1, 1)."""
    if side == "naive":
        model, layers = open_naive_model(model_dir, address, workload, device)

        def naive(*order: object) -> float:
            return accumulate_naively(model, layers, *order)  # type: ignore[arg-type]

        return Trainee(model, _adamw(model, workload), naive, layers.close)
    if side == "split":
        keep_freed()  # as a site's ClientApp does
        model = clients.load_split_model(
            model_dir,
            address,
            head_layers=1,
            tail_layers=1,
            lora_config=workload.lora(),
            dtype=workload.dtype,
            codec=codec,
            device=device,
        )
    else:
        whole = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, workload.dtype)).to(device)
        model = get_peft_model(whole, workload.lora())

    backward = clients.accumulate if side == "split" else one_by_one

    def train(workload: Workload, optimizer: torch.optim.Optimizer, steps: int, microbatches: int) -> float:
        return accumulate(model, workload, optimizer, steps, microbatches, backward)

    return Trainee(model, _adamw(model, workload), train, lambda: clients.close(model) if side == "split" else None)


def _adamw(model: PeftModel, workload: Workload) -> torch.optim.Optimizer:
    model.train()
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=workload.learning_rate)


def settle(trainee: Trainee, side: Side, device: str) -> None:
    """Wait until everything that was ordered has been done, at the trunk too, whose last step is not waited for.

    What a client asks for to that end, its half of the adapter, is the cheapest thing that comes behind the step.
    """
    if side == "split":
        clients.trunk_state(trainee.model)
    if device == "cuda":
        torch.cuda.synchronize()


def main(model_dir: str, shape: str = "30m", device: str = "cpu") -> None:
    trainees: dict[tuple[Side, str, str], Trainee] = {}
    for line in sys.stdin:
        order = Order(**json.loads(line))
        torch.set_num_threads(order.threads)
        workload = replace(SHAPES[shape], batch_size=order.batch_size, tokens=order.tokens)
        key = (order.side, order.address, order.codec)
        if key not in trainees:
            trainees[key] = open_trainee(*key, model_dir, workload, device)
        trainee = trainees[key]
        started_s, cpu_s = time.perf_counter(), time.process_time()
        loss = trainee.train(workload, trainee.optimizer, order.steps, order.microbatches)
        if order.settle:
            settle(trainee, order.side, device)
        answer = {"seconds": time.perf_counter() - started_s, "cpu_seconds": time.process_time() - cpu_s, "loss": loss}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for trainee in trainees.values():
        trainee.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
