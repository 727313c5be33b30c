"""Commands speak in one envelope, and their errors in one line with the documented exit code."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import typer
from typer.testing import CliRunner

from contract import errors
from contract.output import OutputFormat, OutputOption, cli_errors, emit


@dataclass
class Row:
    name: str
    loss: float
    note: str | None = None


ROWS = [Row("first", 1.5), Row("second [bold]", math.nan, "late")]


def printed(fmt: OutputFormat, data: object, capsys: pytest.CaptureFixture[str]) -> str:
    emit(data, fmt)
    return capsys.readouterr().out


def test_json_is_one_envelope_and_a_nan_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    body = json.loads(printed(OutputFormat.JSON, ROWS, capsys))
    assert body["schema_version"] == 1
    assert body["status"] == "ok"
    assert body["data"][1] == {"name": "second [bold]", "loss": None, "note": "late"}


def test_a_title_is_taken_literally(capsys: pytest.CaptureFixture[str]) -> None:
    emit(ROWS[:1], title="rows[/bold].jsonl")
    assert "rows[/bold].jsonl" in capsys.readouterr().out


def test_jsonl_is_one_envelope_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(OutputFormat.JSONL, ROWS, capsys).splitlines()
    assert [json.loads(line)["data"]["name"] for line in lines] == ["first", "second [bold]"]


def test_a_table_keeps_markup_in_values_and_long_lines_whole(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    out = printed(OutputFormat.TABLE, [*ROWS, Row(long, 2.0)], capsys)
    assert "second [bold]" in out
    assert long in out
    assert out.splitlines()[0].split() == ["name", "loss", "note"]


def test_one_object_is_a_list_of_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(OutputFormat.TABLE, {"run": "r1", "rounds": 3, "done": True}, capsys)
    assert [line.split() for line in out.splitlines()] == [["run", "r1"], ["rounds", "3"], ["done", "yes"]]


def test_something_that_is_not_data_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot print a object"):
        emit(object(), OutputFormat.JSON)


def app_raising(error: BaseException) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @cli_errors
    def command(output: OutputOption = OutputFormat.TABLE) -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RoundError("no quorum"), 1),
        (errors.ConfigError("no such key"), 2),
        (errors.ConnectionFailedError("nobody there"), 3),
        (errors.DeadlineError("too long"), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_decides_the_exit_code(error: BaseException, code: int) -> None:
    assert CliRunner().invoke(app_raising(error)).exit_code == code


def test_an_error_is_one_line_on_stderr_and_an_envelope_under_json() -> None:
    result = CliRunner().invoke(app_raising(errors.ConfigError("rank is 0;\nit must be 1 or more")), ["-o", "json"])
    assert result.stderr == "error: rank is 0; it must be 1 or more\n"
    body = json.loads(result.stdout)
    assert body["status"] == "error"
    assert body["error"] == {"type": "ConfigError", "message": "rank is 0; it must be 1 or more", "exit_code": 2}
