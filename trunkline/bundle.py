"""The Flower app of a run: this installation's code and the project's settings, staged in a directory of their own.

`flwr build` takes a root folder of letters, digits and hyphens only, and bundles every `.json` and `.jsonl` that it
finds, a site's private text included. A staged copy holds the code and one pyproject.toml, nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from contract.config import ConfigValue, RunConfig
from contract.errors import ConfigError
from orchestrator.settings import PROJECT_FILE, app_section, parse_overrides

APP_NAME = "trunkline"
CODE_PACKAGES = ("contract", "aggregation", "privacy", "storage", "clients", "orchestrator", "demo")
COMPONENTS = {"serverapp": "orchestrator.app:app", "clientapp": "clients.app:app"}


def project_config(project: Path, overrides: Sequence[str]) -> RunConfig:
    """The settings in `project`'s pyproject.toml with `overrides` (each as `flwr run --run-config` takes it) on top.

    A relative `model` or `data` is taken from the project's directory. Raises ConfigError for a project that is not
    a Trunkline app and for any setting that RunConfig refuses.
    """
    path = project / PROJECT_FILE
    if not path.is_file():
        raise ConfigError(f"no pyproject.toml in {project}; `trunkline init DIR` writes a project to start from")
    app = app_section(project)
    components = app.get("components")
    if components != COMPONENTS:
        raise ConfigError(
            f"{path}: [tool.flwr.app.components] is {components!r}; `trunkline run` runs {COMPONENTS!r} "
            "(an app of your own runs by `flwr run`)"
        )
    settings: dict[str, ConfigValue] = {**app.get("config", {}), **parse_overrides(overrides)}
    for key in ("model", "data"):
        settings[key] = _from_project(project, settings.get(key, ""))
    return RunConfig.from_flower(settings)


def stage_app(config: RunConfig, directory: Path) -> Path:
    """Write the app into `directory`/trunkline, which must not exist yet, and answer that path."""
    app = directory / APP_NAME
    app.mkdir(parents=True)
    for package in CODE_PACKAGES:
        source = _package_dir(package)
        shutil.copytree(source, app / package, ignore=_all_but_python)
    (app / "pyproject.toml").write_text(_staged_pyproject(config), encoding="utf-8")
    return app


def toml_config(config: RunConfig) -> str:
    """The settings as lines of a TOML table."""
    # A JSON string, number or boolean is a TOML one too.
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.to_flower().items())


def _staged_pyproject(config: RunConfig) -> str:
    from trunkline import __version__

    components = "".join(f"{name} = {json.dumps(target)}\n" for name, target in COMPONENTS.items())
    return (
        f'[project]\nname = "{APP_NAME}"\nversion = "{__version__}"\nlicense = "Apache-2.0"\n'
        f'description = "A Trunkline run"\ndependencies = []\n\n[tool.flwr.app]\npublisher = "{APP_NAME}"\n\n'
        f"[tool.flwr.app.components]\n{components}\n[tool.flwr.app.config]\n{toml_config(config)}"
    )


def _from_project(project: Path, value: ConfigValue) -> ConfigValue:
    """A path made absolute; a scheme such as `stdlib:` and a hub id that is no directory here stay as they are."""
    if not isinstance(value, str) or not value or ":" in value:
        return value
    placed = project / Path(value).expanduser()
    exists = placed.exists() or "{partition}" in value and placed.parent.exists()
    return str(placed.absolute()) if exists else value


def _package_dir(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    locations = list(spec.submodule_search_locations or []) if spec else []
    if not locations:
        raise ConfigError(f"this installation has no package {package!r}; install trunkline again")
    return Path(locations[0])


def _all_but_python(directory: str, names: list[str]) -> set[str]:
    """What `copytree` leaves out: everything but Python sources and the folders that hold them, and the audits.

    Attacks on what a run sends are no part of a run.
    """
    here = Path(directory)
    return {
        name
        for name in names
        if name in ("__pycache__", "audits") or not (name.endswith(".py") or any((here / name).glob("**/*.py")))
    }
