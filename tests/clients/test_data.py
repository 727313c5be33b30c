"""A site's text as training batches."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clients.data import (
    IGNORED,
    LengthBucket,
    TokenRow,
    check_dataset,
    collate,
    load_dataset,
    load_tokenizer,
    order_key,
    row_batches,
)
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


def test_rows_without_text_are_dropped_and_long_ones_cut(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", *({"text": text} for text in ("abcdefghij", "", "  ", "abc", "xyz")))
    data = load_dataset(source, byte_tokenizer(), 6, 0.2, 0)
    assert (data.counts.rows, data.counts.empty, data.counts.truncated) == (5, 2, 1)
    assert data.counts.tokens == 6 + 4 + 4
    assert data.counts.masked_share == 0.0
    assert len(data.train_rows) + len(data.heldout_rows) == 3


def test_the_loss_counts_completions_only(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", *({"prompt": "question ", "completion": "answer"} for _ in range(4)))
    tokenizer = byte_tokenizer()
    data = load_dataset(source, tokenizer, 64, 0.2, 0)
    row = data.train_rows[0]
    assert tokenizer.decode(row.tokens_T) == "question answer<eos>"
    assert learned_text(tokenizer, row) == "answer<eos>"
    assert row.targets == len("answer") + 1
    assert data.counts.masked_share == pytest.approx(9 / 16)


def test_a_prompt_that_fills_the_length_leaves_nothing_to_learn(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", *({"prompt": "question ", "completion": "answer"} for _ in range(4)))
    with pytest.raises(DataError, match=r"a\.jsonl: 0 of 4 rows hold something to learn within 9 tokens"):
        load_dataset(source, byte_tokenizer(), 9, 0.2, 0)
    assert "0 of 4 rows hold something" in check_dataset(source, byte_tokenizer(), 9).problem


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        # `trim` takes the blanks away, wherever the template does so; the end of the turn is learned, its newline not.
        (PLAIN_TEMPLATE, "four<|end|>yes<|end|>"),
        (MARKED_TEMPLATE, " four <|end|>yes<|end|>"),
        (THINKING_TEMPLATE, " four <|end|>yes<|end|>"),
    ],
)
def test_the_loss_counts_assistant_turns_only(tmp_path: Path, template: str, learned: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", *({"messages": CHAT} for _ in range(3)))
    tokenizer = byte_tokenizer(template)
    row = load_dataset(source, tokenizer, 200, 0.3, 0).train_rows[0]
    assert tokenizer.decode(row.tokens_T) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert learned_text(tokenizer, row) == learned


def test_chat_rows_that_cannot_be_marked_are_broken(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(DataError, match="line 1: the model's tokenizer has no chat template"):
        load_dataset(source, byte_tokenizer(), 64, 0.3, 0)
    summed = "{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="line 1: the chat template changes more than message 2"):
        load_dataset(source, byte_tokenizer(summed), 64, 0.3, 0)
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="line 1: the chat template refuses the conversation: roles must alternate"):
        load_dataset(source, byte_tokenizer(refusing), 64, 0.3, 0)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 + messages[0]['content'] }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('not this: ' + messages[0]['content']) }}", "TemplateError"),
    ],
)
def test_a_template_that_fails_is_named_without_a_word_of_the_row(tmp_path: Path, template: str, reason: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"messages": CHAT})
    report = check_dataset(source, byte_tokenizer(template), 64)
    assert report.problem == f"line 1: the chat template refuses the conversation: {reason}"


def test_a_tokenizer_that_fails_on_a_row_is_named_without_a_word_of_it(tmp_path: Path) -> None:
    class Failing(PreTrainedTokenizerFast):
        def __call__(self, text: str, **_: object) -> object:
            raise TypeError(text)

    source = write_lines(tmp_path / "a.jsonl", {"text": "secret"}, {"text": "secret"})
    failing = Failing(tokenizer_object=byte_tokenizer().backend_tokenizer)
    assert check_dataset(source, failing, 64).problem == "line 1: the model's tokenizer fails on it: TypeError"


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "b\\ud800"}]')
    (tmp_path / "b.json").write_text('[{"messages": [{"role": "user", "content": "\\udfff"}]}]')
    for name, problem in {
        "a.json": "row 2: 'text' holds half of a surrogate pair",
        "b.json": "row 1: 'content' of message 1 holds half of a surrogate pair",
    }.items():
        assert check_dataset(str(tmp_path / name), byte_tokenizer(MARKED_TEMPLATE), 64).problem.startswith(problem)


def test_a_tokenizer_of_an_unknown_kind_is_a_model_error(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    written = json.loads(file.read_text())
    for content in ({**written, "model": {**written["model"], "type": "Wonder"}}, [], {}):
        file.write_text(json.dumps(content))
        with pytest.raises(ModelError, match="no tokenizer can be loaded: ."):
            load_tokenizer(tmp_path / "model")


def test_plain_text_is_packed_without_losing_a_token(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a long text, with ümlauts\n" for i in range(4000))
    (tmp_path / "a.txt").write_text(text)
    tokenizer = byte_tokenizer()
    data = load_dataset(str(tmp_path / "a.txt"), tokenizer, 50, 0.1, 0)
    rows = sorted(data.train_rows + data.heldout_rows, key=lambda row: row.number)
    assert {len(row.tokens_T) for row in rows[:-1]} == {50}
    assert tokenizer.decode(np.concatenate([row.tokens_T for row in rows])) == f"{text}<eos>"
    assert (data.counts.truncated, data.counts.masked_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (['{"text": "a"}', "", '{"text": "b"'], "line 3: Missing a comma or '}' after an object member."),
        (['{"text": "a"}', "", "  ", '{"text": 3}'], "line 4: text is of JSON type number; wants string"),
        (['{"text": "a"}', '"b"'], "line 2: the line is of JSON type string; wants object"),
        (['{"text": "a"}', '{"text": null}'], "line 2: has none of the fields"),
        (['{"text": "a"}', '{"prompt": "b"}'], "line 2: has 'prompt' but no 'completion'"),
        (
            ['{"text": "a", "prompt": "b", "completion": "c"}'],
            "line 1: has 'prompt' and 'completion' and 'text'; wants",
        ),
        (
            ['{"text": "a"}', '{"prompt": "b", "completion": "c"}'],
            "line 2: has 'prompt' and 'completion' but line 1 has 'text'; wants one form in a file",
        ),
        (['{"messages": [{"role": "user"}]}'], "line 1: message 1 has no 'content' text"),
        (['{"messages": [{"role": "user", "content": ["x"]}]}'], "line 1: messages[].content is of JSON type array"),
        (['{"text": "a"} {"text": "b"}'], "line 1: a line holds several JSON values"),
    ],
)
def test_the_first_broken_line_is_named(tmp_path: Path, lines: list[str], problem: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", *lines, '{"text": 0}')
    report = check_dataset(source, byte_tokenizer(MARKED_TEMPLATE), 64)
    assert report.problem.startswith(problem)
    assert report.counts.rows == sum(line == '{"text": "a"}' for line in lines)
    with pytest.raises(DataError) as refused:
        load_dataset(source, byte_tokenizer(MARKED_TEMPLATE), 64, 0.1, 0)
    assert str(refused.value) == f"{source}: {report.problem}"


def test_line_numbers_go_on_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clients.text_files._BLOCK_BYTES", 40)
    source = write_lines(tmp_path / "a.jsonl", *({"text": f"row {i}"} for i in range(20)), "", "{", {"text": "x"})
    report = check_dataset(source, byte_tokenizer(), 64)
    assert report.problem.startswith("line 22: ")
    assert report.counts.rows == 20


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\xfe\n")
    for name, line in (("a.jsonl", 2), ("a.txt", 3)):
        with pytest.raises(DataError, match=f"{name}: line {line}: not UTF-8 text"):
            load_dataset(str(tmp_path / name), byte_tokenizer(), 64, 0.1, 0)


def test_a_parquet_row_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    texts = pyarrow.array([b"one", b"two", b"\xff", b"four"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    report = check_dataset(str(tmp_path / "a.parquet"), byte_tokenizer(), 64)
    assert (report.problem, report.counts.rows) == ("row 3: not UTF-8 text", 2)


def test_dates_stay_text_and_other_columns_may_be_of_any_type(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"text": "2024-01-01", "id": 1}, {"text": "2024-01-02", "id": "two"})
    tokenizer = byte_tokenizer()
    data = load_dataset(source, tokenizer, 64, 0.1, 0)
    texts = {tokenizer.decode(row.tokens_T) for row in data.train_rows + data.heldout_rows}
    assert texts == {"2024-01-01<eos>", "2024-01-02<eos>"}


@pytest.mark.parametrize("content", ['[{"text": ' + "1" * 5000 + "}]", "[" * 20_000])
def test_json_that_python_does_not_take_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(DataError, match="odd.json: cannot be read as JSON"):
        load_dataset(str(tmp_path / "odd.json"), byte_tokenizer(), 64, 0.1, 0)


def test_broken_json_arrays_and_parquet_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"},\n {"text": "b"},\n]')
    (tmp_path / "b.json").write_text('[{"text": "a"}, {"text": 3}]')
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not parquet")
    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "d.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "e.parquet")
    for name, problem in {
        "a.json": "a.json: line 3: ",
        "b.json": "b.json: row 2: 'text' is of type int; wants text",
        "c.parquet": "c.parquet: cannot be read as Parquet: ",
        "d.parquet": "d.parquet: has the columns id; wants 'text'",
        "e.parquet": "e.parquet: row 2: has none of the fields",
    }.items():
        with pytest.raises(DataError, match=problem):
            load_dataset(str(tmp_path / name), byte_tokenizer(), 64, 0.1, 0)


def test_parquet_chat_rows_read_like_json_ones(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"messages": [CHAT, CHAT]}), tmp_path / "a.parquet")
    source = write_lines(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": CHAT})
    tokenizer = byte_tokenizer(MARKED_TEMPLATE)
    from_parquet, from_lines = (load_dataset(str(s), tokenizer, 64, 0.1, 0) for s in (tmp_path / "a.parquet", source))
    assert from_parquet.train_rows[0].labels_T.tolist() == from_lines.train_rows[0].labels_T.tolist()


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "one.jsonl").write_text('{"text": "only row"}\n')
    (tmp_path / "a.csv").write_text("text\nx\n")
    for name, problem in {
        "empty.jsonl": "the file is empty",
        "blank.jsonl": "0 of 0 rows hold something to learn",
        "one.jsonl": "1 of 1 rows .* wants at least 2, one to train on and one to hold out",
        "a.csv": "suffix '.csv' is not known; wants one of .jsonl",
        "gone.jsonl": "cannot be read: No such file or directory",
    }.items():
        with pytest.raises(DataError, match=f"{name}: {problem}"):
            load_dataset(str(tmp_path / name), byte_tokenizer(), 64, 0.1, 0)
    with pytest.raises(DataError, match="stdlib:cooking: no such domain; wants one of networking, gui, text, testing"):
        load_dataset("stdlib:cooking", byte_tokenizer(), 64, 0.1, 0)
    with pytest.raises(ModelError, match="gone' is not a directory"):
        load_tokenizer(tmp_path / "gone")


def test_the_split_depends_on_seed_and_row_number_alone(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}"} for i in range(400)]
    heldout = {}
    for name, kept, seed in (("a", rows, 0), ("b", rows, 0), ("c", rows, 1), ("d", [*rows[:399], {"text": ""}], 0)):
        source = write_lines(tmp_path / f"{name}.jsonl", *kept)
        heldout[name] = {row.number for row in load_dataset(source, byte_tokenizer(), 64, 0.1, seed).heldout_rows}
    assert heldout["a"] == heldout["b"] != heldout["c"]
    assert heldout["d"] == heldout["a"] - {399}
    assert 20 < len(heldout["a"]) < 60


@pytest.mark.parametrize(("fraction", "heldout"), [(0.0, 0), (1e-9, 1), (0.999999, 4)])
def test_both_sides_of_the_split_keep_a_row(tmp_path: Path, fraction: float, heldout: int) -> None:
    source = write_lines(tmp_path / "a.jsonl", *({"text": f"row {i}"} for i in range(5)))
    data = load_dataset(source, byte_tokenizer(), 64, fraction, 0)
    assert (len(data.heldout_rows), len(data.train_rows)) == (heldout, 5 - heldout)


def test_batches_are_padded_right_and_masked(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "abcdef"}, {"text": "a"})
    rows = load_dataset(source, byte_tokenizer(), 64, 0.0, 0).train_rows
    first, last = map(collate, row_batches(rows, 2))
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]
    assert first["labels"][0, 4:].tolist() == [IGNORED] * 3
    assert first["labels"][0, :4].tolist() == first["input_ids"][0, :4].tolist() == rows[0].tokens_T.tolist()
    assert last["input_ids"].shape == (1, 2)


def test_a_bucket_shows_rows_as_longer_than_they_are(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", *({"text": "x" * length} for length in (2, 3, 8, 9)))
    rows = load_dataset(source, byte_tokenizer(), 10, 0.0, 0).train_rows
    assert [len(row.tokens_T) for row in rows] == [3, 4, 9, 10]
    own = collate(rows)
    for tokens, shown in ((4, [4, 4, 10, 10]), (10, [10] * 4), (0, [3, 4, 9, 10])):
        batch = collate(rows, LengthBucket(tokens, longest=10))
        assert batch["attention_mask"].sum(dim=1).tolist() == shown, tokens
        assert batch["labels"].tolist() == own["labels"].tolist()
        assert batch["input_ids"].tolist() == own["input_ids"].tolist()
    (short,) = (collate(rows[:1], LengthBucket(8, longest=10))[name] for name in ("attention_mask",))
    assert short.tolist() == [[1] * 8]


def test_a_row_is_never_shown_as_shorter_than_it_is() -> None:
    tokens = np.arange(12, dtype=np.int32)
    batch = collate([TokenRow(0, tokens, tokens, truncated=False)], LengthBucket(8, longest=10))
    assert batch["attention_mask"].tolist() == [[1] * 12]


def test_the_order_of_batches_depends_on_the_key_alone(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", *({"text": f"row {i:03}"} for i in range(50)))
    rows = load_dataset(source, byte_tokenizer(), 64, 0.0, 0).train_rows

    def seen(key: str | None, epochs: int = 1) -> list[list[int]]:
        return [row.tokens_T.tolist() for batch in row_batches(rows, 8, key, epochs) for row in batch]

    key = order_key(0, "run", 1, "client")
    assert seen(key) == seen(key)
    assert sorted(seen(key)) == sorted(seen(None))
    for other in (order_key(1, "run", 1, "client"), order_key(0, "nur", 1, "client"), order_key(0, "run", 2, "client")):
        assert seen(other) != seen(key)
    assert seen(order_key(0, "run", 1, "another")) != seen(key)
    assert key == order_key(0, "run", 1, "client", attempt=1) == "0/run/1/client"
    attempts = [seen(order_key(0, "run", 1, "client", attempt)) for attempt in (1, 2, 3)]
    assert all(one != other for one, other in itertools.combinations(attempts, 2))
    two = seen(key, epochs=2)
    assert two[:50] == seen(key)
    assert two[50:] != two[:50]
    assert sorted(two[50:]) == sorted(two[:50])


def test_endless_batches_outlast_an_epoch(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", *({"text": f"row {i}"} for i in range(3)))
    endless = row_batches(load_dataset(source, byte_tokenizer(), 64, 0.0, 0).train_rows, 2, "key", epochs=None)
    assert [len(next(endless)) for _ in range(6)] == [2, 1] * 3


def test_reading_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(home))
    source = write_lines(tmp_path / "a.jsonl", *({"text": f"private {i}"} for i in range(3)))
    load_dataset(source, byte_tokenizer(), 64, 0.2, 0)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.jsonl", "home"]
