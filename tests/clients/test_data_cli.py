"""`trunkline data check`, run as a user does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clients.cli import data_app
from tests.clients.test_data import byte_tokenizer, write_lines


@pytest.fixture
def model(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_sound_file_is_counted(tmp_path: Path, model: Path) -> None:
    source = write_lines(
        tmp_path / "a.jsonl",
        *({"prompt": p, "completion": "xyz"} for p in ("abcd", "abcdefgh")),
        {"prompt": "a", "completion": ""},
    )
    result = CliRunner().invoke(data_app, ["check", source, "--model", str(model), "--max-length", "10", "-o", "json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["data"] == {
        "file": source,
        "sound": True,
        "rows": 3,
        "empty_rows": 1,
        "truncated_rows": 1,
        "tokens": 18,
        "masked_share": round(12 / 18, 4),
        "first_broken_row": None,
        "problem": None,
    }


def test_a_broken_row_is_named_with_exit_code_1(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, {"text": 3})
    result = CliRunner().invoke(data_app, ["check", source, "--model", str(model), "-o", "json"])
    assert result.exit_code == 1
    report = json.loads(result.stdout)["data"]
    assert (report["sound"], report["rows"]) == (False, 2)
    assert report["first_broken_row"] == "line 3: text is of JSON type number; wants string"
    assert report["problem"] == report["first_broken_row"]
    assert result.stderr == f"error: {source}: line 3: text is of JSON type number; wants string\n"


@pytest.mark.parametrize("usable", [0, 1])
def test_fewer_rows_than_every_run_wants_are_a_problem(tmp_path: Path, model: Path, usable: int) -> None:
    source = write_lines(tmp_path / "a.jsonl", *([{"text": "abc"}] * usable), {"text": " "})
    result = CliRunner().invoke(data_app, ["check", source, "--model", str(model), "-o", "json"])
    assert result.exit_code == 1
    report = json.loads(result.stdout)["data"]
    problem = (
        f"{usable} of {usable + 1} rows hold something to learn within 128 tokens; "
        "wants at least 2, one to train on and one to hold out"
    )
    assert (report["sound"], report["first_broken_row"], report["problem"]) == (False, None, problem)
    assert result.stderr == f"error: {source}: {problem}\n"


def test_the_table_speaks_to_people(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "def"})
    result = CliRunner().invoke(data_app, ["check", source, "--model", str(model)])
    assert result.exit_code == 0, result.output
    assert "masked share" in result.stdout


def test_what_cannot_be_read_gives_one_line_and_exit_code_1(tmp_path: Path, model: Path) -> None:
    for arguments, problem in (
        (["check", str(tmp_path / "gone.jsonl"), "--model", str(model)], "cannot be read: No such file"),
        (["check", str(tmp_path / "a.csv"), "--model", str(model)], "suffix '.csv' is not known"),
        (["check", "stdlib:text", "--model", str(tmp_path / "gone")], "gone' is not a directory; it must hold"),
    ):
        result = CliRunner().invoke(data_app, arguments)
        assert result.exit_code == 1
        assert problem in result.stderr
        assert result.stderr.count("\n") == 1
