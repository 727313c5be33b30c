"""A site's text as training batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clients.data import IGNORED, batches, check_dataset, load_dataset, load_tokenizer, order_key
from contract.errors import DataError, ModelError

PLAIN_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
)
# Only the last assistant turn gets an empty thinking block, so no rendering is a prefix of the next.
THINKING_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "two plus two"},
    {"role": "assistant", "content": " four "},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
]


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, so that lengths in a test are plain to see."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<eos>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def write_lines(path: Path, *rows: object) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def learned_text(tokenizer: PreTrainedTokenizerFast, row) -> str:
    return tokenizer.decode(row.labels_T[row.labels_T != IGNORED])


def test_the_four_kinds_of_file_give_the_same_rows(tmp_path: Path) -> None:
    texts = [f"row {i} of the text" for i in range(6)]
    lines = write_lines(tmp_path / "a.jsonl", *({"text": text, "other": i} for i, text in enumerate(texts)))
    (tmp_path / "b.json").write_text(json.dumps([{"text": text} for text in texts], indent=2))
    parquet.write_table(pyarrow.table({"id": range(6), "text": texts}), tmp_path / "c.parquet")
    (tmp_path / "d.json").write_text(Path(lines).read_text())
    tokenizer = byte_tokenizer()
    loaded = [
        load_dataset(str(tmp_path / name), tokenizer, 64, 0.3, 0)
        for name in ("a.jsonl", "b.json", "c.parquet", "d.json")
    ]
    for other in loaded[1:]:
        assert other.counts == loaded[0].counts
        for rows, expected in ((other.train_rows, loaded[0].train_rows), (other.heldout_rows, loaded[0].heldout_rows)):
            assert [row.tokens_T.tolist() for row in rows] == [row.tokens_T.tolist() for row in expected]
    all_rows = sorted(loaded[0].train_rows + loaded[0].heldout_rows, key=lambda row: row.number)
    assert [tokenizer.decode(row.tokens_T) for row in all_rows] == [f"{text}<eos>" for text in texts]
