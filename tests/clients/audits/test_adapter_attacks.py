"""Attacks at an adapter find what it knows by heart, and nothing under the noise of DP-SGD."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from clients.audits.adapter_bench import AdapterBench, MemberRows
from clients.audits.adapter_training import AdapterTrainer, released_model, row_losses
from clients.audits.canaries import INSERTED, UNSEEN, draw_canaries, insert
from clients.audits.findings import CONTROL, Attack, Finding
from clients.data import TokenRow
from contract import adapter
from contract.config import ConfigValue, RunConfig
from contract.errors import ConfigError, ModelError
from tests.clients.audits.test_wire_attacks import rows_of
from tests.contract.families import VOCAB

BOTH: tuple[Attack, ...] = ("membership", "canaries")
FITTING: dict[str, ConfigValue] = {"learning-rate": 2e-2, "local-steps": 30, "num-rounds": 2, "lora-r": 16}
PRIVATE: dict[str, ConfigValue] = {"dp": "example", "trunk-adapter": "frozen", "dp-noise-multiplier": 4.0}


def entropy(size: int) -> bytes:
    return b"\x05" * size


def by_measure(found: list[Finding]) -> dict[tuple[str, str], Finding]:
    return {(one.attack if one.attack == "canaries" else one.variant, one.measure): one for one in found}


@pytest.fixture(scope="module")
def bench(llama_dir: Path) -> AdapterBench:
    rows = rows_of(150, seed=4)
    members = MemberRows(rows[:30], rows[30:])
    config = RunConfig.from_flower({"max-length": 32})
    return AdapterBench(llama_dir, config, members, 0, lambda line: None, entropy)


def test_what_is_known_by_heart_is_found(bench: AdapterBench) -> None:
    found = by_measure(bench.control(BOTH))
    assert all(one.works and one.mode == CONTROL for one in found.values())
    assert found["loss less the base model's", "AUC"].value.lower > 0.9
    assert found["loss less the base model's", "found at 1.0% false alarms"].value.value > 0.5
    assert found["canaries", "AUC"].value.lower > 0.9
    exposure = found["canaries", "mean exposure, bits"]
    assert exposure.above.lower > 3.0
    assert not exposure.in_shares
    assert ("loss", "found at 0.1% false alarms") not in found, "120 others cannot show a thousandth"


def test_noise_of_dp_sgd_hides_who_was_there(bench: AdapterBench) -> None:
    plain = by_measure(bench.run("plain", RunConfig.from_flower(FITTING), BOTH))
    private = by_measure(bench.run("dp", RunConfig.from_flower({**FITTING, **PRIVATE}), BOTH))
    assert plain["loss less the base model's", "AUC"].above.lower > 0.05
    assert plain["canaries", "AUC"].above.lower > 0.05
    for one in private.values():
        assert one.least is None
        if one.measure == "AUC":
            assert one.above.lower <= 0.0, one


def test_a_released_adapter_is_asked_for_its_rows(bench: AdapterBench, llama_dir: Path, tmp_path: Path) -> None:
    trainer = AdapterTrainer(llama_dir, RunConfig.from_flower({"max-length": 32}), entropy)
    model = trainer.overfitted(bench._rows.members[:8])
    spec = adapter.resolve_lora(llama_dir, adapter.run_lora(RunConfig()))
    tensors = {name: value.detach() for name, value in adapter.adapter_parameters(model).items()}
    exported = adapter.write_export(tmp_path / "adapter", tensors, spec, str(llama_dir))
    one = MemberRows(bench._rows.members[:8], bench._rows.others)
    outside = AdapterBench(llama_dir, RunConfig.from_flower({"max-length": 32}), one, 0, lambda line: None, entropy)
    found = by_measure(outside.released("released adapter", exported))
    assert found["loss less the base model's", "AUC"].value.lower > 0.9
    with pytest.raises(ModelError, match="no adapter for this model"):
        released_model(llama_dir, tmp_path, RunConfig())


def test_a_private_adapter_leaves_the_trunks_half_as_it_began(llama_dir: Path) -> None:
    trainer = AdapterTrainer(llama_dir, RunConfig.from_flower({**FITTING, **PRIVATE}), entropy)
    layers = {name.split(".layers.")[1][0] for name in adapter.adapter_parameters(trainer.model)}
    assert layers == {"0", "3"}


def test_each_training_begins_anew(llama_dir: Path) -> None:
    trainer = AdapterTrainer(llama_dir, RunConfig.from_flower({**FITTING, "local-steps": 2}), entropy)
    rows = rows_of(8, seed=6)
    first = row_losses(trainer.as_in_a_run(rows), rows)
    assert row_losses(trainer.as_in_a_run(rows), rows) == first


def test_losses_are_those_of_each_row_alone(llama_dir: Path) -> None:
    model = AdapterTrainer(llama_dir, RunConfig(), entropy).model.eval()
    rows = rows_of(5, seed=7, prompt=3)
    for row, loss in zip(rows, row_losses(model, rows), strict=True):
        labels = torch.from_numpy(row.labels_T)[None].long()
        whole = model(input_ids=torch.from_numpy(row.tokens_T)[None].long(), labels=labels).loss
        assert loss == pytest.approx(float(whole), rel=1e-4)


def test_noise_in_a_sum_over_clients_is_no_one_sites() -> None:
    with pytest.raises(ConfigError, match="--adapter"):
        AdapterTrainer("nowhere", RunConfig.from_flower({"dp": "client", "trunk-adapter": "frozen"}), entropy)


def test_canaries_are_uniform_and_each_is_inserted_as_often_as_told() -> None:
    inserted, unseen = draw_canaries(VOCAB, 128, seed=0)
    assert (len(inserted), len(unseen)) == (INSERTED, UNSEEN)
    tokens_N = np.concatenate([row.tokens_T for row in unseen])
    counts = np.bincount(tokens_N, minlength=VOCAB)
    chi_square = float(((counts - len(tokens_N) / VOCAB) ** 2 / (len(tokens_N) / VOCAB)).sum())
    assert abs(chi_square - (VOCAB - 1)) < 4 * math.sqrt(2 * (VOCAB - 1))
    rows = [TokenRow(number, row.tokens_T, row.labels_T, False) for number, row in enumerate(unseen[:5])]
    together = insert(rows, inserted, 3, seed=0)
    assert sorted(row.number for row in together) == sorted(
        [*range(5), *(row.number for row in inserted for _ in range(3))]
    )
    assert [row.number for row in together] == [row.number for row in insert(rows, inserted, 3, seed=0)]
    assert {row.number for row in inserted}.isdisjoint(row.number for row in unseen)
