"""Adapters: what is resolved, what is refused, first values, names, bytes, export and its proof."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from contract.adapter import (
    adapter_parameters,
    adapter_shapes,
    add_lora,
    flatten,
    from_bytes,
    initial_adapter,
    load_adapter_,
    resolve_lora,
    sha256_hex,
    split_adapter,
    to_bytes,
    trainable_names,
    unflatten,
    write_export,
)
from contract.adapter_proof import verify_export
from contract.architecture import probe
from contract.errors import ConfigError, ModelError, StorageError
from contract.partition import load_part
from contract.records import CutLayers, LoraSpec
from tests.contract.families import FAMILIES, attention, family_config, random_model, save_model
from tests.contract.parity import Tensors, trained_adapter

CUT = CutLayers(1, 1)
ALL_LINEAR = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
EVERYTHING = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules="all-linear",
    use_rslora=True,
    rank_pattern={r"\.0\..*": 2, r"\.2\..*": 6},
    alpha_pattern={r"\.3\..*": 5},
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def adapter(llama: Path) -> Tensors:
    return trained_adapter(llama, ALL_LINEAR)


@pytest.fixture(scope="module")
def spec(llama: Path) -> LoraSpec:
    return resolve_lora(llama, ALL_LINEAR)


# ---- structure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [ALL_LINEAR, EVERYTHING], ids=["all-linear", "patterns"])
def test_a_resolved_spec_gives_what_stock_peft_gives(tmp_path: Path, family: str, lora: LoraConfig) -> None:
    family_config(family).save_pretrained(tmp_path)
    spec = resolve_lora(tmp_path, lora)
    stock = get_peft_model(random_model(family), LoraConfig(**lora.to_dict()))
    ours = add_lora(random_model(family), spec)
    expected = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(stock).items()}
    assert adapter_shapes(tmp_path, spec) == dict(sorted(expected.items()))
    assert {name: tuple(value.shape) for name, value in adapter_parameters(ours).items()} == expected
    scaling = {name: module.scaling for name, module in stock.named_modules() if hasattr(module, "lora_A")}
    assert {name: module.scaling for name, module in ours.named_modules() if hasattr(module, "lora_A")} == scaling


def test_parts_hold_exactly_their_share_of_the_names(llama: Path, adapter: Tensors, spec: LoraSpec) -> None:
    halves = split_adapter(adapter, probe(llama), CUT)
    for half, side in zip(halves, ("client", "trunk"), strict=True):
        assert half
        assert adapter_parameters(add_lora(load_part(llama, CUT, side), spec)).keys() == half.keys()
    assert {**halves[0], **halves[1]}.keys() == adapter.keys()


def test_the_output_heads_adapter_is_the_clients(llama: Path) -> None:
    shapes = adapter_shapes(llama, resolve_lora(llama, LoraConfig(r=2, target_modules=["lm_head", "q_proj"])))
    client, trunk = split_adapter(initial_adapter(shapes, 0), probe(llama), CUT)
    assert any("lm_head" in name for name in client)
    assert not any("lm_head" in name for name in trunk)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [(0, 2)]}, "layer_replication"),
        ({"target_modules": ["embed_tokens"]}, "embedding"),
        ({"target_modules": ["no_such"]}, "not found"),
        ({"target_modules": ["norm"]}, "do not fit"),
        ({"r": 0}, "do not fit"),
    ],
)
def test_what_the_other_half_would_not_know_is_refused(llama: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_lora(llama, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings}))


def test_another_peft_method_is_refused_by_name(llama: Path) -> None:
    with pytest.raises(ConfigError, match="IA3Config"):
        resolve_lora(llama, IA3Config(target_modules=["q_proj"]))  # type: ignore[arg-type]


def test_dora_on_fused_experts_is_refused_in_pefts_words(tmp_path: Path) -> None:
    family_config("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="use_dora"):
        resolve_lora(tmp_path, LoraConfig(target_modules="all-linear", use_dora=True))


# ---- values --------------------------------------------------------------------------------------------------------


def test_first_values_depend_on_seed_and_name_alone(llama: Path, spec: LoraSpec) -> None:
    shapes = adapter_shapes(llama, spec)
    whole = initial_adapter(shapes, 7)
    some = dict(list(shapes.items())[5:9])
    assert all(torch.equal(value, whole[name]) for name, value in initial_adapter(some, 7).items())
    other = initial_adapter(shapes, 8)
    assert all(torch.equal(other[name], whole[name]) == name.endswith("lora_B.weight") for name in shapes)


def test_first_values_are_distributed_as_pefts(llama: Path, spec: LoraSpec) -> None:
    values = initial_adapter(adapter_shapes(llama, spec), 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock = adapter_parameters(get_peft_model(random_model("llama"), LoraConfig(**ALL_LINEAR.to_dict())))
    for factor in ("A", "B"):
        ours, pefts = (
            torch.cat([value.detach().flatten() for name, value in tensors.items() if f"lora_{factor}." in name])
            for tensors in (values, stock)
        )
        assert abs(float(ours.std() - pefts.std())) <= 0.05 * float(pefts.std())
    for name, value in values.items():
        if "lora_A" in name:
            assert float(value.abs().max()) <= 1 / math.sqrt(value.shape[1])


def test_dora_magnitudes_start_at_the_base_weights_norm(llama: Path) -> None:
    spec = resolve_lora(llama, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    shapes = adapter_shapes(llama, spec)
    values = initial_adapter(shapes, 0)
    assert any("magnitude" in name for name in shapes)
    assert not any("magnitude" in name for name in values)
    model = add_lora(random_model("llama"), spec)
    load_adapter_(model, values)
    norm = random_model("llama").model.layers[0].self_attn.q_proj.weight.norm(dim=1)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    assert torch.equal(adapter_parameters(model)[name], norm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "the adapter lacks"),
        (lambda tensors, name: tensors.update(extra=torch.zeros(1)), "holds extra"),
        (lambda tensors, name: tensors.update({name: torch.zeros(1, 1)}), r"has shape \(1, 1\)"),
    ],
)
def test_an_adapter_that_does_not_fit_is_not_loaded(
    adapter: Tensors, spec: LoraSpec, change: Any, message: str
) -> None:
    model = add_lora(random_model("llama"), spec)
    before = {name: value.detach().clone() for name, value in adapter_parameters(model).items()}
    wrong = dict(adapter)
    change(wrong, sorted(adapter)[3])
    with pytest.raises(ModelError, match=message):
        load_adapter_(model, wrong)
    assert all(torch.equal(before[name], value) for name, value in adapter_parameters(model).items())


def test_factors_are_told_apart_by_name() -> None:
    names = ["m.lora_B.weight", "m.lora_A.weight", "m.lora_magnitude_vector", "lora_A.q.lora_B.weight"]
    assert trainable_names(names, "A") == ("m.lora_A.weight",)
    assert trainable_names(names, "B") == ("lora_A.q.lora_B.weight", "m.lora_B.weight")
    assert trainable_names(names, "AB") == tuple(sorted(names))


# ---- bytes ---------------------------------------------------------------------------------------------------------


def test_equal_adapters_have_equal_bytes(adapter: Tensors) -> None:
    shuffled = {name: adapter[name].clone() for name in reversed(list(adapter))}
    assert to_bytes(shuffled) == to_bytes(adapter)
    back = from_bytes(to_bytes(adapter))
    assert list(back) == sorted(adapter)
    assert all(torch.equal(back[name], adapter[name]) for name in adapter)
    changed = {**adapter, sorted(adapter)[0]: adapter[sorted(adapter)[0]] + 1e-3}
    assert sha256_hex(to_bytes(changed)) != sha256_hex(to_bytes(adapter))


@pytest.mark.parametrize("data", [b"", b"nothing", b"\xff" * 64])
def test_bytes_that_are_no_adapter_are_refused(data: bytes) -> None:
    with pytest.raises(ModelError, match="not safetensors"):
        from_bytes(data)


def test_an_adapter_of_another_dtype_is_refused() -> None:
    with pytest.raises(ModelError, match="float32"):
        from_bytes(safetensors.torch.save({"a": torch.zeros(2, dtype=torch.bfloat16)}))


def test_a_vector_goes_back_to_the_tensors_it_came_from(adapter: Tensors) -> None:
    names = sorted(adapter)[::2]
    shapes = {name: tuple(adapter[name].shape) for name in names}
    vector = flatten(adapter, names)
    assert vector.dtype == np.float32
    back = unflatten(vector, shapes, names)
    assert all(torch.equal(back[name], adapter[name]) for name in names)
    vector[:] = 0
    assert all(torch.equal(back[name], adapter[name]) for name in names)
    with pytest.raises(ModelError, match="adapter vector"):
        unflatten(vector[:-1], shapes, names)
    assert flatten({}, []).shape == (0,)


# ---- export --------------------------------------------------------------------------------------------------------

STOCK = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation=sys.argv[3])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
print(model(input_ids=torch.arange(3, 15).reshape(2, 6)).logits.double().sum().item())
"""


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen3_moe"])
def test_an_export_is_proved_equal_to_the_split_system(tmp_path: Path, family: str) -> None:
    model = save_model(family, tmp_path / "model")
    tensors = trained_adapter(model, EVERYTHING)
    out = write_export(tmp_path / "out", tensors, resolve_lora(model, EVERYTHING), str(model))
    report = verify_export(
        out, model, cut=CUT, expected_sha256=sha256_hex(to_bytes(tensors)), attn_implementation=attention(family)
    )
    assert report.ok, report.checks
    assert report.adapter_sha256 == sha256_hex(to_bytes(tensors))
    assert report.tensors == len(tensors)


def test_an_export_loads_in_a_fresh_process_that_knows_nothing_of_us(
    tmp_path: Path, llama: Path, adapter: Tensors, spec: LoraSpec
) -> None:
    out = write_export(tmp_path / "out", adapter, spec, str(llama))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STOCK, str(llama), str(out), "sdpa"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        here = PeftModel.from_pretrained(base, out).eval()(input_ids=torch.arange(3, 15).reshape(2, 6))
    assert float(done.stdout) == float(here.logits.double().sum())


def test_an_export_is_the_same_bytes_twice_and_replaces_an_earlier_one(
    tmp_path: Path, llama: Path, adapter: Tensors, spec: LoraSpec
) -> None:
    first = write_export(tmp_path / "out", adapter, spec, "base")
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    write_export(tmp_path / "out", adapter, spec, "base")
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert before["adapter_model.safetensors"] == to_bytes(adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_never_replaces_anything_else(tmp_path: Path, adapter: Tensors, spec: LoraSpec) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="no earlier export"):
        write_export(tmp_path / "mine", adapter, spec, "base")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_an_export_never_takes_along_what_was_put_beside_an_earlier_one(
    tmp_path: Path, adapter: Tensors, spec: LoraSpec
) -> None:
    out = write_export(tmp_path / "out", adapter, spec, "base")
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match=r"also holds notes\.txt, which replacing it would delete"):
        write_export(out, adapter, spec, "other base")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "notes.txt").unlink()
    write_export(out, adapter, spec, "other base")


@pytest.mark.parametrize("place", ["out", "deep/out"])
def test_what_stands_in_the_way_of_an_export_is_named(
    tmp_path: Path, adapter: Tensors, spec: LoraSpec, place: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"to {tmp_path}/file/{place}: {tmp_path}/file is not a directory"):
        write_export(tmp_path / "file" / place, adapter, spec, "base")


def test_an_export_that_cannot_be_written_is_a_storage_error(tmp_path: Path, adapter: Tensors, spec: LoraSpec) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write the adapter"):
        write_export(tmp_path / "file" / "out", adapter, spec, "base")


def failed(report: Any) -> set[str]:
    return {check.name for check in report.checks if not check.ok}


def test_a_tampered_adapter_fails_the_proof(tmp_path: Path, llama: Path, adapter: Tensors, spec: LoraSpec) -> None:
    out = write_export(tmp_path / "out", adapter, spec, str(llama))
    committed = sha256_hex(to_bytes(adapter))
    name = sorted(adapter)[1]
    changed = {**adapter, name: adapter[name] + 0.01}
    (out / "adapter_model.safetensors").write_bytes(to_bytes(changed))
    assert failed(verify_export(out, llama, cut=CUT, expected_sha256=committed)) == {"weights hash", "committed hash"}
    write_export(tmp_path / "out", changed, spec, str(llama))
    assert failed(verify_export(out, llama, cut=CUT, expected_sha256=committed)) == {"committed hash"}


def test_tampered_settings_fail_the_proof(tmp_path: Path, llama: Path, adapter: Tensors, spec: LoraSpec) -> None:
    out = write_export(tmp_path / "out", adapter, spec, str(llama))
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    assert failed(verify_export(out, llama, cut=CUT)) == {"settings hash"}


def test_an_adapter_that_changes_nothing_fails_the_proof(tmp_path: Path, llama: Path, spec: LoraSpec) -> None:
    unchanged = initial_adapter(adapter_shapes(llama, spec), 0)
    out = write_export(tmp_path / "out", unchanged, spec, str(llama))
    assert failed(verify_export(out, llama, cut=CUT)) == {"changes the model"}


def test_an_adapter_with_a_nan_fails_the_proof(tmp_path: Path, llama: Path, adapter: Tensors, spec: LoraSpec) -> None:
    name = sorted(adapter)[1]
    out = write_export(tmp_path / "out", {**adapter, name: adapter[name] * math.nan}, spec, str(llama))
    assert "finite" in failed(verify_export(out, llama, cut=CUT))


def test_a_directory_that_is_no_adapter_is_a_model_error(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(ModelError, match="is not an adapter"):
        verify_export(tmp_path, llama, cut=CUT)
