"""The yardstick computes what an un-split model computes: only its way of serving is naive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.naive_client import NaiveLayers, accumulate_naively, open_naive_model
from benchmarks.naive_trunk import NaiveTrunk, serve
from benchmarks.workload import Workload, accumulate
from contract import adapter

SMALL = Workload(layers=4, hidden_size=32, ffn_size=48, heads=4, vocab_size=64, batch_size=2, tokens=8)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    SMALL.write_model(directory)
    return directory


@pytest.fixture(scope="module")
def naive(model_dir: Path) -> Iterator[tuple[NaiveTrunk, str]]:
    trunk = NaiveTrunk(model_dir, SMALL)
    server, address = serve(trunk)
    yield trunk, address
    server.stop(None)


def unsplit(model_dir: Path, workload: Workload) -> torch.nn.Module:
    spec = adapter.resolve_lora(model_dir, workload.lora())
    model = adapter.add_lora(AutoModelForCausalLM.from_pretrained(model_dir), spec)
    first = adapter.initial_adapter(adapter.adapter_shapes(model_dir, spec), workload.seed)
    adapter.load_adapter_(model, first)
    return model


def state(trunk: NaiveTrunk, model: torch.nn.Module, layers: NaiveLayers) -> dict[str, torch.Tensor]:
    """Both halves of a naive client's adapter by canonical name."""
    return adapter.adapter_parameters(model) | adapter.adapter_parameters(trunk.model, layers.name)


def close_to(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == wanted.keys()
    return all(
        float((found[name] - wanted[name]).detach().norm()) <= 1e-5 * float(wanted[name].detach().norm())
        for name in wanted
    )


def test_two_interleaved_clients_get_the_unsplit_gradients(model_dir: Path, naive: tuple[NaiveTrunk, str]) -> None:
    trunk, address = naive
    workloads = [SMALL, replace(SMALL, seed=1)]
    wholes = [unsplit(model_dir, workload) for workload in workloads]
    halves = [open_naive_model(model_dir, address, workload) for workload in workloads]
    # B is zero at first, and so is every gradient of A: a step makes all of them count.
    for workload, whole, (model, layers) in zip(workloads, wholes, halves, strict=True):
        for parameter in state(trunk, model, layers).values():
            parameter.data.add_(0.01)
        for parameter in adapter.adapter_parameters(whole).values():
            parameter.data.add_(0.01)
        tokens_BT = workload.batch_BT()
        whole(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
    losses = []
    for workload, (model, _) in zip(workloads, halves, strict=True):
        tokens_BT = workload.batch_BT()
        losses.append(model(input_ids=tokens_BT, labels=tokens_BT).loss)
    for loss in losses:
        loss.backward()
    for whole, (model, layers) in zip(wholes, halves, strict=True):
        wanted = {name: parameter.grad for name, parameter in adapter.adapter_parameters(whole).items()}
        found = {name: parameter.grad for name, parameter in state(trunk, model, layers).items()}
        assert close_to(found, wanted)


def test_its_training_with_accumulation_is_the_unsplit_training(model_dir: Path, naive: tuple[NaiveTrunk, str]) -> None:
    trunk, address = naive
    workload = replace(SMALL, max_grad_norm=0.05)  # small enough that clipping over both halves has something to do
    whole = unsplit(model_dir, workload)
    model, layers = open_naive_model(model_dir, address, workload)
    found = accumulate_naively(model, layers, workload, adamw(model, workload), steps=2, microbatches=3)
    wanted = accumulate(whole, workload, adamw(whole, workload), steps=2, microbatches=3)
    assert found == pytest.approx(wanted, rel=1e-5)
    trained = dict(adapter.adapter_parameters(whole))
    first = adapter.adapter_parameters(unsplit(model_dir, workload))
    assert not close_to(first, trained)
    # AdamW's first steps divide a gradient by itself, so that rounding shows where one is almost zero.
    for name, parameter in state(trunk, model, layers).items():
        assert torch.allclose(parameter, trained[name], atol=2e-5), name


def adamw(model: torch.nn.Module, workload: Workload) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=workload.learning_rate)
