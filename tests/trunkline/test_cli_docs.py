"""docs/cli.md is what the commands themselves say."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from trunkline import cli_docs
from trunkline.cli import MOUNTS, commands

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def test_the_committed_page_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert cli_docs.main(["--check"]) == 0


def test_a_stale_page_is_told_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "cli.md").write_text("# Commands\n")
    assert cli_docs.main(["--check"]) == 1
    assert "docs/cli.md is stale" in capsys.readouterr().err
    assert cli_docs.main([]) == 0
    assert cli_docs.main(["--check"]) == 0


def test_the_page_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    narrow = cli_docs.page()
    monkeypatch.setenv("COLUMNS", "200")
    assert narrow == cli_docs.page()
    assert "\x1b" not in narrow


def test_every_command_and_option_is_on_the_page_with_its_meaning() -> None:
    page = cli_docs.page()
    for name in MOUNTS:
        assert f"## trunkline {name}\n" in page
    for name, command in commands():
        leaves = command.commands.values() if isinstance(command, click.Group) else [command]
        for leaf in leaves:
            for parameter in leaf.params:
                meaning = getattr(parameter, "help", None)
                assert meaning, f"{name}: {parameter.name} has no help"
                assert " ".join(meaning.split()) in page
