"""A checkpoint's identity, and its parts on disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from contract import checkpoint
from contract.checkpoint import fingerprint, part_info, write_parts
from contract.errors import ConfigError, ModelError, StorageError
from contract.partition import load_part
from contract.records import CutLayers
from tests.contract.families import FAMILIES, attention, random_model, save_model

CUT = CutLayers(1, 1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model("llama", tmp_path / "model")


# ---- identity ------------------------------------------------------------------------------------------------------


def test_sharding_and_bookkeeping_do_not_change_the_fingerprint(tmp_path: Path, model: Path) -> None:
    random_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    config = json.loads((model / "config.json").read_text())
    bookkeeping = {"transformers_version": "4.0.0", "use_cache": False, "_name_or_path": "elsewhere"}
    (tmp_path / "sharded" / "config.json").write_text(json.dumps({**config, **bookkeeping}))
    assert fingerprint(tmp_path / "sharded") == fingerprint(model)


def test_one_bit_of_one_weight_changes_the_fingerprint(model: Path) -> None:
    before = fingerprint(model)
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)
    assert fingerprint(model) != before


def test_a_setting_that_makes_another_model_changes_the_fingerprint(model: Path) -> None:
    before = fingerprint(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "truncated"),
        (lambda path: path.write_bytes(b"\xff" * 64), "not a whole safetensors file"),
        (lambda path: path.write_bytes((20).to_bytes(8, "little") + b"{" * 40), "broken safetensors header"),
        (lambda path: path.rename(path.with_name("pytorch_model.bin")), "pickled weights only"),
        (lambda path: path.unlink(), "holds no weights"),
    ],
)
def test_unreadable_weights_are_a_model_error(model: Path, spoil: object, message: str) -> None:
    spoil(model / "model.safetensors")  # type: ignore[operator]
    with pytest.raises(ModelError, match=message):
        fingerprint(model)


def test_an_index_cannot_lead_out_of_the_directory(tmp_path: Path, model: Path) -> None:
    shutil.move(model / "model.safetensors", tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="which is not in"):
        fingerprint(model)


def test_a_header_cannot_claim_more_than_the_file(model: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    raw = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(ModelError, match="truncated"):
        fingerprint(model)


# ---- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_load_to_what_the_whole_loads_to(tmp_path: Path, family: str) -> None:
    model = save_model(family, tmp_path / "model")
    sizes = write_parts(model, tmp_path / "out", CUT)
    assert sizes["client"] + sizes["trunk"] == sizes["whole"]
    assert sizes["whole"] == sum(tensor.size for tensor in checkpoint.stored_tensors(model))
    for side in ("client", "trunk"):
        part = tmp_path / "out" / side
        assert fingerprint(part) == fingerprint(model)
        from_part, from_whole = (
            dict(load_part(path, CUT, side, attn_implementation=attention(family)).named_parameters())
            for path in (part, model)
        )
        assert from_part.keys() == from_whole.keys()
        assert all(torch.equal(from_part[name], from_whole[name]) for name in from_whole)


def test_the_tokenizer_goes_with_the_client_only(tmp_path: Path, model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (model / name).write_text("{}")
    write_parts(model, tmp_path / "out", CUT)
    names = {side: {path.name for path in (tmp_path / "out" / side).iterdir()} for side in ("client", "trunk")}
    assert names["trunk"] == {"config.json", "model.safetensors", "trunkline.json"}
    assert names["client"] - names["trunk"] == {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
        "generation_config.json",
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["client", "trunk"]


def test_parts_may_be_sharded(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 30_000)
    write_parts(model, tmp_path / "out", CUT)
    assert len(list((tmp_path / "out" / "trunk").glob("*.safetensors"))) > 1
    part = load_part(tmp_path / "out" / "trunk", CUT, "trunk")
    whole = random_model("llama")
    assert all(torch.equal(value, whole.get_parameter(name)) for name, value in part.named_parameters())


def test_a_converted_part_loads_in_its_own_dtype_only(tmp_path: Path, model: Path) -> None:
    sizes = write_parts(model, tmp_path / "out", CUT, "bfloat16")
    assert 2 * sizes["whole"] == sum(tensor.size for tensor in checkpoint.stored_tensors(model))
    from_part, from_whole = (
        dict(load_part(path, CUT, "trunk", dtype="bfloat16").named_parameters())
        for path in (tmp_path / "out" / "trunk", model)
    )
    assert all(torch.equal(from_part[name], from_whole[name]) for name in from_whole)
    with pytest.raises(ModelError, match="written as bfloat16"):
        load_part(tmp_path / "out" / "trunk", CUT, "trunk", dtype="float32")


def test_a_part_of_another_side_or_cut_is_refused_with_both_named(tmp_path: Path, model: Path) -> None:
    write_parts(model, tmp_path / "out", CUT)
    with pytest.raises(ModelError, match="is the client part .*the trunk part is needed"):
        load_part(tmp_path / "out" / "client", CUT, "trunk")
    with pytest.raises(ModelError, match="head-layers 1 and tail-layers 1; head-layers 2 and tail-layers 0"):
        load_part(tmp_path / "out" / "client", CutLayers(2, 0), "client")


def test_a_broken_record_is_a_model_error(tmp_path: Path, model: Path) -> None:
    write_parts(model, tmp_path / "out", CUT)
    record = tmp_path / "out" / "client" / "trunkline.json"
    record.write_text(record.read_text().replace('"client"', '"both"'))
    with pytest.raises(ModelError, match="not a part's record"):
        part_info(record.parent)


@pytest.mark.parametrize("cut", [CutLayers(2, 2), CutLayers(0, -1)])
def test_an_impossible_cut_writes_nothing(tmp_path: Path, model: Path, cut: CutLayers) -> None:
    with pytest.raises(ConfigError):
        write_parts(model, tmp_path / "out", cut)
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_is_not_replaced(tmp_path: Path, model: Path) -> None:
    write_parts(model, tmp_path / "out", CUT)
    with pytest.raises(ConfigError, match="exists already"):
        write_parts(model, tmp_path / "out", CUT)


def test_a_part_cannot_be_split_again(tmp_path: Path, model: Path) -> None:
    write_parts(model, tmp_path / "out", CUT)
    with pytest.raises(ModelError, match="is a part already"):
        write_parts(tmp_path / "out" / "client", tmp_path / "again", CUT)


def test_a_layer_without_weights_is_named_before_anything_is_written(tmp_path: Path, model: Path) -> None:
    file = model / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: value for name, value in tensors.items() if ".layers.2." not in name}, file)
    with pytest.raises(ModelError, match=r"no weights for layers \[2\]"):
        write_parts(model, tmp_path / "out", CUT)
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_no_half_part(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        write_parts(model, tmp_path / "out", CUT)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("place", ["x", "x/y"])
def test_a_place_that_cannot_be_is_a_storage_error(model: Path, place: str) -> None:
    with pytest.raises(StorageError, match=f"cannot write /dev/null/{place}/client: /dev/null is not a directory"):
        write_parts(model, Path("/dev/null") / place, CUT)


def test_a_second_part_that_fails_takes_the_first_with_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed: list[object] = []
    rename = os.rename

    def once(source: str, target: str) -> None:
        if renamed:
            raise OSError(28, "No space left on device")
        renamed.append(target)
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", once)
    with pytest.raises(StorageError, match="trunk: No space left"):
        write_parts(model, tmp_path / "out", CUT)
    assert renamed == [tmp_path / "out" / "client"]
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    write_parts(model, tmp_path / "out", CUT)
