"""A project's settings with the place that each one comes from."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from contract.config import ConfigValue, RunConfig
from contract.errors import ConfigError

PROJECT_FILE = "pyproject.toml"
DEFAULT, OVERRIDE = "default", "--run-config"


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
    path = project / PROJECT_FILE
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a project directory") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    table = content.get("tool", {}).get("flwr", {}).get("app", {}).get("config")
    if not isinstance(table, dict):
        raise ConfigError(f"{path} has no [tool.flwr.app.config]; name the directory of a Trunkline project")
    return dict(table)


def parse_overrides(texts: list[str]) -> dict[str, ConfigValue]:
    """What `--run-config` says, read as Flower reads it. Raises ConfigError where it is not `key=value ...`."""
    import click
    from flwr.common.config import parse_config_args

    try:
        return dict(parse_config_args(texts))
    except (click.ClickException, ValueError, OSError) as error:
        told = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise ConfigError(f"--run-config {' '.join(texts)!r} cannot be read: {' '.join(told.split())}") from error
