"""A round over the real trunk and the real sum is FedAvg of the whole, un-split LoRA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel

from clients.data import collate, load_dataset, load_tokenizer, order_key, row_batches
from contract.adapter import adapter_parameters, is_factor, trainable_names
from contract.config import RunConfig
from contract.records import Factor
from tests.clients.sites import Orchestrator, Site, Version, write_texts
from tests.conftest import TrunkProcess
from tests.contract.parity import Tensors, reference

SITES, ROUNDS, STEPS, ROWS = 3, 2, 3, 2


@pytest.fixture(scope="module")
def sites(llama_dir: Path, trunk: TrunkProcess, tmp_path_factory: pytest.TempPathFactory) -> list[Site]:
    folder = tmp_path_factory.mktemp("site data")
    return [
        Site(
            node_id=100 + number,
            node_config={
                "model": str(llama_dir),
                "data": str(write_texts(folder / f"site {number}.jsonl", rows=9 + 4 * number, seed=number)),
                "trunk-address": trunk.address,
            },
        )
        for number in range(SITES)
    ]


def run_config(aggregation: str) -> RunConfig:
    return RunConfig.from_flower(
        {
            "secagg": "off",
            "aggregation": aggregation,
            "local-steps": STEPS,
            "per-device-train-batch-size": ROWS,
            "learning-rate": 5e-3,
            "lr-scheduler-type": "linear",
            "weight-decay": 0.01,
            "max-grad-norm": 0.0,
            "max-length": 16,
            "lora-r": 4,
            "seed": 5,
        }
    )


def trained_alone(whole: PeftModel, site: Site, config: RunConfig, run: str, number: int) -> int:
    """What one client's round is, written out on the un-split model; answers its trained tokens."""
    tokenizer = load_tokenizer(site.node_config["model"])
    data = load_dataset(site.node_config["data"], tokenizer, config.max_length, config.eval_fraction, config.seed)
    optimizer = torch.optim.AdamW(
        [p for p in whole.parameters() if p.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    tokens = 0
    stream = row_batches(data.train_rows, ROWS, order_key(config.seed, run, number, site.name), epochs=None)
    for step in range(STEPS):
        batch = collate(next(stream))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (STEPS - step) / STEPS
        whole(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens += int((batch["labels"][:, 1:] != -100).sum())
    return tokens


def averaged(
    orchestrator: Orchestrator, sites: list[Site], start: Tensors, factor: Factor, number: int
) -> tuple[Tensors, int]:
    """Plain FedAvg of the whole LoRA in float64, and the sum of the weights."""
    config = orchestrator.config
    lora = LoraConfig(r=config.lora_r, lora_alpha=16, target_modules="all-linear")
    sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in start.items()}
    weight = 0
    for site in sites:
        whole = reference(orchestrator.model_dir, lora, start, "sdpa")
        for name, parameter in adapter_parameters(whole).items():
            parameter.requires_grad_(is_factor(name, factor))
        tokens = trained_alone(whole, site, config, orchestrator.run, number)
        for name, parameter in adapter_parameters(whole).items():
            sums[name] += tokens * parameter.detach().double()
        weight += tokens
    return {name: total / weight for name, total in sums.items()}, weight


def assert_within_the_bound(
    expected: Tensors, version: Version, orchestrator: Orchestrator, weight: int, what: str
) -> None:
    """Client part: N / 2 fixed-point steps over the weights, and float32's rounding. Trunk part: the rounding alone."""
    step = 1 / (orchestrator.fixed_point(SITES).scale * weight)
    for name, tensor in version.tensors().items():
        exact = expected[name].numpy()
        # The version is stored as float32: half a unit in the last place of the larger neighbour.
        rounding = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        bound = rounding + (SITES / 2 * step if name in version.client.names else 0.0)
        assert (np.abs(tensor.double().numpy() - exact) <= bound).all(), f"{what}: {name}"


@pytest.mark.usefixtures("flower_task")
@pytest.mark.parametrize("aggregation", ["ffa", "rolora", "fedavg"])
def test_rounds_equal_fedavg_of_the_unsplit_adapter(
    llama_dir: Path, trunk: TrunkProcess, sites: list[Site], aggregation: str
) -> None:
    orchestrator = Orchestrator(run_config(aggregation), llama_dir, trunk.address, run=f"equals-{aggregation}")
    version = orchestrator.first()
    chained = version.tensors()
    for number in range(1, ROUNDS + 1):
        factor = orchestrator.order(version, SITES).factor
        start = version.tensors()
        version = orchestrator.round(version, sites)
        expected, weight = averaged(orchestrator, sites, start, factor, number)
        assert weight == sum(orchestrator.weights.values())
        assert len(set(orchestrator.weights.values())) > 1
        assert_within_the_bound(expected, version, orchestrator, weight, f"round {number}")
        moved = {name for name in start if not torch.equal(start[name], version.tensors()[name])}
        assert moved == set(trainable_names(start, factor))
        chained = {name: t.float() for name, t in averaged(orchestrator, sites, chained, factor, number)[0].items()}
    # A reference that never looks back at the system drifts from it: what differs in the last bit of a float32 after
    # one round is multiplied by AdamW's division through small gradients in the next. Updates are about 1e-2 here.
    largest = max(float((chained[name] - tensor).abs().max()) for name, tensor in version.tensors().items())
    assert largest < 1e-5


@pytest.mark.usefixtures("flower_task")
def test_the_bound_would_see_one_client_weighted_wrongly(
    llama_dir: Path, trunk: TrunkProcess, sites: list[Site]
) -> None:
    orchestrator = Orchestrator(run_config("ffa"), llama_dir, trunk.address, run="weighted-wrongly")
    version = orchestrator.first()
    start = version.tensors()
    moved = orchestrator.round(version, sites)
    expected, weight = averaged(orchestrator, [*sites, sites[0]], start, "B", 1)
    with pytest.raises(AssertionError, match="round 1"):
        assert_within_the_bound(expected, moved, orchestrator, weight, "round 1")
