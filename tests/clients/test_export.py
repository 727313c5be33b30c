"""Both halves of an adapter as one directory that stock PEFT loads, in a process that knows nothing of the split."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import clients
from clients.split_model import adapter_state
from contract.checkpoint import write_parts
from contract.errors import ConfigError, SessionError
from tests.clients.conftest import ALL_LINEAR, CUT
from tests.conftest import TrunkProcess
from tests.contract.families import batch

STOCK = """
import sys
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
import torch
whole, exported, given, answer = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32), exported).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(given)).logits.contiguous()}, answer)
assert not any(name.split(".")[0] in ("clients", "contract") for name in sys.modules)
"""


def test_stock_peft_gives_the_split_models_logits_bitwise(llama_dir: Path, trunk: TrunkProcess, tmp_path: Path) -> None:
    write_parts(llama_dir, tmp_path / "parts", CUT)
    model = clients.load_split_model(tmp_path / "parts" / "client", trunk.address, CUT.head, CUT.tail, ALL_LINEAR)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(3):
        model(**batch("right", seed=seed).inputs()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    exported = clients.export_adapter(model, tmp_path / "my adapter", base_model=str(llama_dir))
    given = {name: value for name, value in batch("left", seed=9).inputs().items() if name != "labels"}
    with torch.no_grad():
        expected = model(**given).logits
    halves = adapter_state(model)
    clients.close(model)
    save_file(given, tmp_path / "given.safetensors")
    command = [str(llama_dir), str(exported), str(tmp_path / "given.safetensors"), str(tmp_path / "answer.safetensors")]
    subprocess.run([sys.executable, "-c", STOCK, *command], check=True, timeout=120, cwd=tmp_path)
    got = load_file(tmp_path / "answer.safetensors")["logits"]
    real = batch("left", seed=9).real
    assert torch.equal(got[real], expected[real])
    assert all(bool(halves[name].any()) for name in halves)
    assert {name.split(".")[4] for name in halves} == {"0", "1", "2", "3"}


def test_an_export_does_not_overwrite_what_is_not_one(llama_dir: Path, trunk: TrunkProcess, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    model = clients.load_split_model(llama_dir, trunk.address, CUT.head, CUT.tail, ALL_LINEAR)
    with pytest.raises(ConfigError, match="no earlier export"):
        clients.export_adapter(model, tmp_path)
    clients.close(model)
    with pytest.raises(SessionError, match="is over"):
        clients.export_adapter(model, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.txt"]
