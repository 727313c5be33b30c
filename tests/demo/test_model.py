"""The committed base model is what its record says, and the script that made it still runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from demo import pretrain
from demo.corpus import pretraining_documents
from demo.settings import MODEL_DIR
from tests.demo.test_corpus import library


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float32")


def test_the_checkpoint_is_small_and_leaves_four_layers_to_the_trunk(model: LlamaForCausalLM) -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 10_000_000
    assert 2e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 6e6
    assert model.config.num_hidden_layers == 6
    assert type(model) is LlamaForCausalLM
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_record_holds_what_the_model_reaches(model: LlamaForCausalLM) -> None:
    record = json.loads((MODEL_DIR / "pretraining.json").read_text())
    recipe = pretrain.Recipe(**record["recipe"])
    assert recipe == pretrain.Recipe()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    heldout = [document for document in pretraining_documents() if pretrain.is_heldout(document, recipe)]
    sample_T = pretrain.split_streams(heldout, tokenizer, recipe).heldout_T[: 64 * recipe.sequence_length]
    loss = pretrain.judge(model, sample_T, recipe, torch.device("cpu"))
    # A model that learned nothing is at log 4096 = 8.3.
    assert max(loss, record["heldout_loss"]) < 0.5 * math.log(pretrain.VOCABULARY)
    # A sample, and another Python's library differs a little; Debian leaves out Python's tests, an easier text.
    if any(document.module.startswith("test.") for document in heldout):
        assert loss == pytest.approx(record["heldout_loss"], abs=0.5)
    assert record["heldout_loss"] == pytest.approx(record["curve"][-1]["heldout_loss"], abs=0.01)


def test_the_tokenizer_gives_any_text_back(model: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    text = "def grüße(name):\n\treturn f'👋 {name}'  # <|end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < model.config.vocab_size == len(tokenizer)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>Hi<|end|><|assistant|>Hello<|end|>"


def test_the_script_trains_a_model_that_loads(tmp_path: Path) -> None:
    root = library(tmp_path / "lib", *(f"part{i}" for i in range(60)))
    for number, path in enumerate(sorted(root.glob("*.py"))):
        path.write_text("".join(f"def part_{number}_{i}(x):\n    return x + {i}\n" for i in range(60)))
    (root / "pydoc_data").mkdir()
    (root / "pydoc_data" / "topics.py").write_text("topics = {'with': 'The with statement.'}\n")
    app = pretrain.typer.Typer()
    app.command()(pretrain.main)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["--out", str(out), "--stdlib", str(root), "--steps", "2"])
    assert result.exit_code == 0, result.output
    record = json.loads((out / "pretraining.json").read_text())
    assert record["heldout_loss"] < math.log(pretrain.VOCABULARY) + 0.2
    assert record["train_tokens"] > record["heldout_tokens"] > 0
    assert len(record["curve"]) == 2
    trained = AutoModelForCausalLM.from_pretrained(out)
    assert trained.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(out)) <= trained.config.vocab_size
