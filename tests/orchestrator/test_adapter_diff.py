"""Two adapters side by side, against the same arithmetic done with whole matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from contract.adapter import to_bytes, write_export
from contract.errors import ConfigError, ModelError, StorageError
from contract.records import LoraSpec
from orchestrator import adapter_diff
from orchestrator.adapter_diff import NamedAdapter, diff, read_adapter
from storage.artifacts import ArtifactStore
from storage.store import open_store

PREFIX = "base_model.model."
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
SPEC = LoraSpec(rank=2, alpha=4.0, target_modules=(Q, V), rank_pattern={V: 3}, alpha_pattern={V: 5.0})


def factors(module: str, rank: int, seed: int, out: int = 7, into: int = 5) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, into, generator=drawn),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(out, rank, generator=drawn),
    }


def adapter(tensors: dict[str, Tensor], spec: LoraSpec = SPEC, name: str = "x") -> NamedAdapter:
    def lora(target: str) -> tuple[int, float]:
        return spec.rank_pattern.get(target, spec.rank), spec.scale_of(target)

    return NamedAdapter(name, str(hash(to_bytes(tensors))), tensors, lora)


def whole(seed: int) -> dict[str, Tensor]:
    return {**factors(Q, 2, seed), **factors(V, 3, seed + 100)}


def product(tensors: dict[str, Tensor], module: str, scale: float) -> Tensor:
    one, other = (tensors[f"{PREFIX}{module}.lora_{factor}.weight"].double() for factor in "AB")
    return scale * other @ one


def check(found: adapter_diff.Difference, a: Tensor, b: Tensor) -> None:
    a, b = a.double().flatten(), b.double().flatten()
    assert found.norm_a == pytest.approx(float(a.norm()))
    assert found.norm_b == pytest.approx(float(b.norm()))
    assert found.norm_difference == pytest.approx(float((b - a).norm()))
    assert found.relative == pytest.approx(float((b - a).norm() / a.norm()))
    assert found.cosine == pytest.approx(float(torch.dot(a, b) / (a.norm() * b.norm())))
    assert found.max_abs == pytest.approx(float((b - a).abs().max()))


def test_each_parameter_and_all_together_are_told_as_whole_matrices_have_it() -> None:
    a, b = whole(1), whole(2)
    found = diff(adapter(a), adapter(b))
    assert [row.name for row in found.by_parameter] == sorted(a)
    for row in found.by_parameter:
        check(row, a[row.name], b[row.name])
    check(found.parameters, *(torch.cat([one[name].flatten() for name in sorted(a)]) for one in (a, b)))
    assert not found.equal
    assert not found.parameters.equal


@pytest.mark.parametrize("rooted", [False, True])
@pytest.mark.parametrize("values", [1, 11, 1 << 22])
def test_a_product_has_its_own_rank_and_scale_however_few_rows_are_computed_at_once(
    rooted: bool, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_diff, "_PRODUCT_VALUES", values)
    spec = replace(SPEC, use_rslora=rooted)
    scales = {Q: 4 / math.sqrt(2), V: 5 / math.sqrt(3)} if rooted else {Q: 2.0, V: 5 / 3}
    a, b = whole(1), whole(2)
    found = diff(adapter(a, spec), adapter(b, spec))
    assert [row.name for row in found.by_module] == [PREFIX + Q, PREFIX + V]
    for row, (module, scale) in zip(found.by_module, scales.items(), strict=True):
        check(row, product(a, module, scale), product(b, module, scale))
    both = [torch.cat([product(one, name, scale).flatten() for name, scale in scales.items()]) for one in (a, b)]
    check(found.products, *both)


def test_factors_that_differ_and_add_the_same_are_seen_to() -> None:
    a, turned = whole(1), torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(3)))[0]
    b = dict(a)
    b[f"{PREFIX}{Q}.lora_A.weight"] = turned @ a[f"{PREFIX}{Q}.lora_A.weight"]
    b[f"{PREFIX}{Q}.lora_B.weight"] = a[f"{PREFIX}{Q}.lora_B.weight"] @ turned.T
    found = diff(adapter(a), adapter(b))
    of_q = found.by_module[0]
    assert of_q.relative is not None
    assert of_q.relative < 1e-6
    assert found.by_parameter[0].relative is not None
    assert found.by_parameter[0].relative > 0.1


def test_equal_adapters_are_equal_to_the_bit_and_differ_by_nothing() -> None:
    a = whole(1)
    found = diff(adapter(a), adapter({name: tensor.clone() for name, tensor in a.items()}))
    assert found.equal
    for row in (found.parameters, found.products, *found.by_parameter, *found.by_module):
        assert row.equal
        assert (row.norm_difference, row.relative, row.max_abs) == (0.0, 0.0, 0.0)
        assert row.cosine == pytest.approx(1.0)


def test_the_same_weights_by_another_alpha_have_another_product() -> None:
    a = whole(1)
    found = diff(adapter(a), adapter(a, replace(SPEC, alpha=8.0)))
    assert found.equal
    assert (found.by_module[0].relative, found.by_module[1].relative) == (pytest.approx(1.0), 0.0)


def test_experts_are_compared_one_by_one_as_peft_lays_them_out() -> None:
    experts, rank = 3, 2
    spec = LoraSpec(rank=rank, alpha=2.0, target_modules=(), target_parameters=("experts.weight",))
    a, b = ({**factors("experts", experts * rank, seed)} for seed in (1, 2))

    def of_peft(tensors: dict[str, Tensor]) -> Tensor:
        one, other = (tensors[f"{PREFIX}experts.lora_{factor}.weight"].double() for factor in "AB")
        left = other.reshape(other.shape[0], -1, experts)
        return torch.einsum("o r e, e r i -> e o i", left, one.reshape(experts, -1, one.shape[1]))

    found = diff(adapter(a, spec), adapter(b, spec))
    check(found.by_module[0], of_peft(a), of_peft(b))


def test_what_cannot_be_compared_is_named_and_left_out_of_the_sum() -> None:
    a, b = whole(1), whole(2)
    del b[f"{PREFIX}{V}.lora_A.weight"]
    b |= factors(Q, 3, 9)
    found = diff(adapter(a), adapter(b, replace(SPEC, rank=3)))
    notes = {row.name.removeprefix(PREFIX): row.note for row in found.by_parameter}
    assert notes[f"{V}.lora_A.weight"] == "in A only"
    assert notes[f"{Q}.lora_A.weight"] == "of shape (2, 5) in A, (3, 5) in B"
    assert notes[f"{V}.lora_B.weight"] is None
    assert found.parameters.note == "3 of 4 could not be compared"
    check(found.parameters, a[f"{PREFIX}{V}.lora_B.weight"], b[f"{PREFIX}{V}.lora_B.weight"])
    by_module = {row.name.removeprefix(PREFIX): row for row in found.by_module}
    assert by_module[V].note == "in A only"
    check(by_module[Q], product(a, Q, 2.0), product(b, Q, 4 / 3))
    assert not found.products.equal


def test_against_an_adapter_that_adds_nothing_no_ratio_is_told() -> None:
    a = {name: torch.zeros_like(tensor) for name, tensor in whole(1).items()}
    found = diff(adapter(a), adapter(whole(2)))
    assert (found.parameters.relative, found.parameters.cosine) == (None, None)
    assert found.parameters.norm_difference == found.parameters.norm_b


# ---- directories -----------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, tensors: dict[str, Tensor], spec: LoraSpec = SPEC) -> Path:
        return write_export(tmp_path / name, tensors, spec, "a model")

    return write


def read(path: Path | str) -> NamedAdapter:
    return read_adapter(str(path), None, ArtifactStore(Path("/nowhere")))


@pytest.mark.parametrize("rooted", [False, True])
def test_an_exported_directory_is_scaled_as_peft_scales_it(exported: Callable[..., Path], rooted: bool) -> None:
    spec = replace(SPEC, use_rslora=rooted)
    found = read(exported("a", whole(1), spec))
    assert found.lora(Q) == (2, spec.scale_of(Q))
    assert found.lora(V) == (3, spec.scale_of(V))


def test_patterns_of_another_program_are_matched_as_peft_matches_them(tmp_path: Path) -> None:
    LoraConfig(r=4, lora_alpha=8, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 2}).save_pretrained(tmp_path)
    save_file(whole(1), tmp_path / "adapter_model.safetensors")
    found = read(tmp_path)
    assert found.lora(Q) == (4, 0.5)
    assert found.lora(V) == (2, 4.0)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("{}", "holds no settings of a LoRA adapter: 'r'"),
        ('{"r": 0, "lora_alpha": 1}', "a rank is below 1"),
        ('{"r": 1e999, "lora_alpha": 1}', "holds no settings"),
        ('{"r": 2, "lora_alpha": 1, "rank_pattern": {"(": 2}}', "holds no settings"),
        ("[]", "holds no settings"),
        ("not json", "holds no settings"),
    ],
)
def test_settings_that_are_none_are_one_line(tmp_path: Path, config: str, told: str) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    save_file(whole(1), tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=told):
        read(tmp_path)


def test_a_directory_without_an_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is no exported adapter: cannot read .*adapter_model.safetensors"):
        read(tmp_path)


def test_without_a_database_only_directories_can_be_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="'r1@2' is no directory, and this machine has no database"):
        read("r1@2")


def test_a_round_that_is_no_number_is_named(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'runs.db'}")
    with pytest.raises(ConfigError, match="'r1@two'; it must be a directory, RUN or RUN@ROUND"):
        read_adapter("r1@two", store, ArtifactStore(tmp_path))
    store.close()
