"""A project's settings with the place that each one comes from."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from contract.config import ConfigValue, RunConfig
from contract.errors import ConfigError

PROJECT_FILE = "pyproject.toml"
APP_SECTION = ("tool", "flwr", "app")
DEFAULT, OVERRIDE = "default", "--run-config"

_PAIR = re.compile(r"(?P<key>[A-Za-z0-9_.-]+)=(?P<value>'[^']*'|\"[^\"]*\"|\S+)")


@dataclass(frozen=True, slots=True)
class Setting:
    """`origin` is "default", "pyproject.toml" or "--run-config", the last of those that set it."""

    key: str
    value: ConfigValue
    origin: str


def resolve_settings(project: Path, overrides: Mapping[str, ConfigValue]) -> tuple[Setting, ...]:
    """Every setting of a run of `project` with `overrides`, in the order of the documentation.

    Raises ConfigError as the run itself would, or where `project` is no Flower project.
    """
    told = project_settings(project)
    merged = {**told, **overrides}
    resolved = RunConfig.from_flower(merged).to_flower()
    settings = []
    for key, value in resolved.items():
        origin = OVERRIDE if key in overrides else PROJECT_FILE if key in told else DEFAULT
        settings.append(Setting(key, value, origin))
    return tuple(settings)


def project_settings(project: Path) -> dict[str, ConfigValue]:
    """The table [tool.flwr.app.config] of a project directory."""
    table = app_section(project).get("config")
    if table is None:
        path = project / PROJECT_FILE
        raise ConfigError(f"{path} has no [tool.flwr.app.config]; name the directory of a Trunkline project")
    return dict(table)


def app_section(project: Path) -> dict[str, Any]:
    """The table [tool.flwr.app] of a project directory, empty where it has none; `config`, if there, is a table too.

    Raises ConfigError for a file that cannot be read or is not TOML, and where something else stands for a table.
    """
    path = project / PROJECT_FILE
    try:
        found: object = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}; name a project directory") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number too long, brackets too deep
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for depth, name in enumerate(APP_SECTION, start=1):
        found = _table(found, name, path, APP_SECTION[:depth])
    section = cast(dict[str, Any], found)
    if "config" in section:
        _table(section, "config", path, (*APP_SECTION, "config"))
    return section


def _table(parent: object, name: str, path: Path, place: Sequence[str]) -> dict[str, Any]:
    value = cast(dict[str, Any], parent).get(name, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {'.'.join(place)} is of type {type(value).__name__}; it must be a table")
    return value


def parse_overrides(overrides: Sequence[str]) -> dict[str, ConfigValue]:
    """`["num-rounds=5 model='a b'"]` as a mapping. A value that is not TOML is taken as text.

    Raises ConfigError naming what is not KEY=VALUE.
    """
    settings: dict[str, ConfigValue] = {}
    for text in overrides:
        rest = _PAIR.sub("", text).strip()
        if rest:
            raise ConfigError(f"--run-config has {rest!r}; it must be KEY=VALUE pairs parted by spaces")
        for pair in _PAIR.finditer(text):
            settings[pair["key"]] = _toml_value(pair["value"])
    return settings


def _toml_value(text: str) -> ConfigValue:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, str | bool | int | float) else text
