"""The staged app holds the code and the settings, and nothing that a site keeps to itself."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest

from contract.config import RunConfig
from contract.errors import ConfigError
from trunkline.bundle import CODE_PACKAGES, parse_overrides, project_config, stage_app
from trunkline.project import write_project


def test_overrides_are_toml_values_and_bare_words_are_text() -> None:
    assert parse_overrides(["num-rounds=5 learning-rate=1e-3", "use-rslora=true model='a b' data=/c/d.jsonl"]) == {
        "num-rounds": 5,
        "learning-rate": 1e-3,
        "use-rslora": True,
        "model": "a b",
        "data": "/c/d.jsonl",
    }


@pytest.mark.parametrize("text", ["num-rounds", "num-rounds = 3", "num-rounds=3 and more"])
def test_what_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be KEY=VALUE pairs"):
        parse_overrides([text])


def test_the_projects_relative_paths_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(tmp_path / "my project")
    monkeypatch.chdir("/")
    config = project_config(tmp_path / "my project", ["num-rounds=7"])
    assert config.data == str(tmp_path / "my project" / "data" / "client-{partition}.jsonl")
    assert config.num_rounds == 7


def test_a_project_may_keep_a_scheme_or_a_hub_id(tmp_path: Path) -> None:
    write_project(tmp_path / "p")
    config = project_config(tmp_path / "p", ["data='stdlib:{partition}' model=some/hub-id"])
    assert (config.data, config.model) == ("stdlib:{partition}", "some/hub-id")


def test_an_app_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.flwr.app.components]\nserverapp = "mine:app"\n')
    with pytest.raises(ConfigError, match="`trunkline run` runs"):
        project_config(tmp_path, [])


def test_a_broken_project_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool")
    with pytest.raises(ConfigError, match=r"pyproject.toml is not valid TOML"):
        project_config(tmp_path, [])


COMPONENTS = '[tool.flwr.app.components]\nserverapp = "orchestrator.app:app"\nclientapp = "clients.app:app"\n'


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("tool = 3", "tool is of type int; it must be a table"),
        ("[tool]\nflwr = []", "tool.flwr is of type list; it must be a table"),
        ("[tool.flwr]\napp = 3", "tool.flwr.app is of type int; it must be a table"),
        ("[tool.flwr.app]\nconfig = 3\n" + COMPONENTS, "tool.flwr.app.config is of type int; it must be a table"),
        ("[tool.flwr.app]\ncomponents = 3", "components] is 3; `trunkline run` runs"),
        ("[tool.flwr.app.config]\nmodel = {a = 1}\n" + COMPONENTS, "model is {'a': 1}; it must be text"),
    ],
)
def test_a_project_file_with_something_else_where_a_table_belongs_is_named(
    tmp_path: Path, content: str, problem: str
) -> None:
    (tmp_path / "pyproject.toml").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(problem)):
        project_config(tmp_path, [])


def test_a_project_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    write_project(tmp_path / "p")
    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ConfigError, match="cannot read .*pyproject.toml: Permission denied"):
        project_config(tmp_path / "p", [])


def test_the_staged_settings_read_back_unchanged(tmp_path: Path) -> None:
    config = RunConfig.from_flower({"model": 'with "quotes" and \\ and ü', "learning-rate": 1e-5, "use-rslora": True})
    app = stage_app(config, tmp_path / "a path with spaces")
    staged = tomllib.loads((app / "pyproject.toml").read_text())
    assert RunConfig.from_flower(staged["tool"]["flwr"]["app"]["config"]) == config


def test_the_bundle_is_code_only_and_small(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    app = stage_app(RunConfig(), tmp_path / "a path with spaces")
    files = [path.relative_to(app) for path in app.rglob("*") if path.is_file()]
    assert {path.parts[0] for path in files} == {*CODE_PACKAGES, "pyproject.toml"}
    assert {path.suffix for path in files} == {".py", ".toml"}
    load_and_validate(app / "pyproject.toml")
    assert len(build_fab_from_disk(app)) < 2 * 2**20, "Flower refuses ten"
    assert not [path for path in files if path.name.startswith("test_")], "flwr would leave it out"


def test_nothing_of_the_bundle_is_a_link(tmp_path: Path) -> None:
    app = stage_app(RunConfig(), tmp_path)
    assert not [path for path in app.rglob("*") if path.is_symlink()], os.fspath(app)
