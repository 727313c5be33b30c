"""The Python in docs/sdk.md runs as it stands there, but for the model and the trunk's address."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.conftest import TrunkProcess

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "sdk.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def test_the_snippets_run_in_order_and_leave_adapters_that_stock_peft_loads(
    llama_dir: Path,
    trunk: TrunkProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert len(SNIPPETS) == 4
    for snippet in SNIPPETS:
        assert "demo/model" in snippet
        code = snippet.replace("demo/model", str(llama_dir)).replace("127.0.0.1:50051", trunk.address)
        exec(compile(code, str(PAGE), "exec"), {"__name__": "snippet"})
    out = capsys.readouterr().out
    losses = [float(line.split()[1]) for line in out.splitlines() if re.fullmatch(r"\d \d+\.\d+", line)]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert re.search(r"^mean loss [1-9]\.\d+$", out, re.MULTILINE)
    assert re.search(r"^[1-9]\d* LoRA tensors$", out, re.MULTILINE)
    for adapter in ("my-adapter", "my-trainer-adapter"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_dir), tmp_path / adapter)
