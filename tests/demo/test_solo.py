"""The three numbers that say whether federation pays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from clients.data import load_dataset, load_tokenizer
from contract.adapter import adapter_shapes, initial_adapter, resolve_lora, run_lora, write_export
from contract.config import RunConfig
from contract.errors import ModelError
from demo import solo
from demo.settings import MODEL_DIR, RUN_CONFIG, SOURCES

CONFIG = RunConfig.from_flower(
    RUN_CONFIG
    | {"model": str(MODEL_DIR), "num-rounds": 2, "local-steps": 2, "max-length": 32, "per-device-train-batch-size": 4}
)


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Two sites whose texts have nothing in common."""
    rows = {"cook": "Boil the potatoes, then mash them with butter.", "sail": "import os  # hoist the jib and tack"}
    for name, text in rows.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{i}. {text}\n" for i in range(60)))
    return [str(tmp_path / f"{name}.txt") for name in rows]


def export(directory: Path, config: RunConfig, factor_b: float) -> Path:
    spec = resolve_lora(config.model, run_lora(config))
    tensors = initial_adapter(adapter_shapes(config.model, spec), config.seed)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.normal_(std=factor_b, generator=generator) if factor_b else tensor.zero_()
    return write_export(directory, tensors, spec, "demo")


def test_an_adapter_that_changes_nothing_judges_as_the_base_model(tmp_path: Path, sources: list[str]) -> None:
    told: list[str] = []
    comparison = solo.compare(export(tmp_path / "export", CONFIG, 0.0), CONFIG, sources, told.append)
    assert comparison.federated_loss == comparison.base_loss
    assert not comparison.federation_pays
    assert list(comparison.alone) == sources
    assert comparison.solo_loss == sum(comparison.alone.values()) / 2
    assert all(loss < comparison.base_loss for loss in comparison.alone.values())
    assert len(told) == 2
    tokenizer = load_tokenizer(MODEL_DIR)
    heldout = [
        row for source in sources for row in load_dataset(source, tokenizer, 32, CONFIG.eval_fraction, 0).heldout_rows
    ]
    assert comparison.tokens == sum(row.targets for row in heldout)


def test_the_exported_adapter_is_what_is_judged(tmp_path: Path, sources: list[str]) -> None:
    comparison = solo.compare(export(tmp_path / "export", CONFIG, 1.0), CONFIG, sources)
    assert comparison.federated_loss > comparison.base_loss + 0.5


def test_a_lone_client_takes_as_many_steps_as_in_the_run(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    train = solo.train

    def counted(*args: object) -> object:
        done = train(*args)  # type: ignore[arg-type]
        steps.append(done.steps)
        return done

    monkeypatch.setattr(solo, "train", counted)
    solo.compare(export(tmp_path / "export", CONFIG, 0.0), CONFIG, sources)
    assert steps == [2] * 4


def test_the_command_prints_the_three_numbers(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solo, "SOURCES", sources)
    monkeypatch.setattr(solo, "RUN_CONFIG", {k: v for k, v in CONFIG.to_flower().items() if k != "model"})
    app = solo.typer.Typer()
    app.command()(solo.main)
    result = CliRunner().invoke(app, [str(export(tmp_path / "export", CONFIG, 0.0)), "-o", "json"])
    assert result.exit_code == 0, result.output
    assert {"base_loss", "federated_loss", "solo_loss"} <= json.loads(result.stdout)["data"].keys()


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gone: no exported adapter can be read: No such file or directory"):
        solo.compare(tmp_path / "gone", CONFIG, SOURCES)
