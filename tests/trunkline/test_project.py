"""`trunkline init` writes a project that is valid as it is and explains every setting."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from contract.config import RunConfig
from contract.config_schema import schema_rows
from contract.errors import ConfigError
from trunkline.project import SAMPLE_CLIENTS, write_project


def test_every_setting_is_there_with_its_meaning(tmp_path: Path) -> None:
    write_project(tmp_path)
    text = (tmp_path / "pyproject.toml").read_text()
    config = RunConfig.from_flower(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])
    assert config.quorum <= SAMPLE_CLIENTS
    prose = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))
    for row in schema_rows():
        assert f"\n{row.key} = " in text
        assert row.meaning in prose
    assert max(map(len, text.splitlines())) <= 120


def test_the_samples_are_rows_of_text_one_file_a_client(tmp_path: Path) -> None:
    write_project(tmp_path)
    for number in range(SAMPLE_CLIENTS):
        lines = (tmp_path / "data" / f"client-{number}.jsonl").read_text().splitlines()
        assert len(lines) >= 20
        assert all(set(json.loads(line)) == {"text"} for line in lines)


def test_flower_takes_the_project_as_an_app_and_leaves_the_data_out(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    project = tmp_path / "project"
    write_project(project)
    load_and_validate(project / "pyproject.toml")
    assert b"client-0.jsonl" not in build_fab_from_disk(project)


@pytest.mark.parametrize("there", ["file", "full directory"])
def test_what_is_there_is_not_overwritten(tmp_path: Path, there: str) -> None:
    target = tmp_path / "target"
    if there == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="is there and not empty"):
        write_project(target)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_project(tmp_path / "file" / "below")
