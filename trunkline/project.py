"""`trunkline init`: a project to edit, which runs as it is."""

from __future__ import annotations

import json
import shlex
import textwrap
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from contract.config_schema import schema_rows
from contract.errors import ConfigError
from contract.output import OutputFormat, OutputOption, cli_errors, emit, talk
from contract.setting import ConfigValue
from trunkline.bundle import COMPONENTS

app = typer.Typer()

COMMENT_WIDTH = 100
SAMPLE_CLIENTS = 2
SAMPLE_SETTINGS: dict[str, ConfigValue] = {
    "data": "data/client-{partition}.jsonl",
    "max-length": 48,
    "num-rounds": 2,
    "quorum": SAMPLE_CLIENTS,
    "local-steps": 5,
    "per-device-train-batch-size": 4,
    "learning-rate": 5e-3,
}
"""What the sample sets apart from the defaults: small enough to be done in a minute."""


@app.command()
@cli_errors
def init(
    directory: Annotated[Path, typer.Argument(help="Where to write the project; must be empty or not there yet.")],
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Write a project to edit: settings with their meanings, sample data, a README."""
    written = write_project(directory)
    emit({"project": directory, "files": [str(path) for path in written]}, output)
    talk(f"try: trunkline run {shlex.quote(str(directory))} --simulate {SAMPLE_CLIENTS}")


def write_project(directory: Path) -> list[Path]:
    """Write the project into `directory` and answer its files. Raises ConfigError if there is something already."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is there and not empty; name a new directory")
    template = files("trunkline") / "template"
    texts = {"pyproject.toml": _pyproject(), "README.md": (template / "README.md").read_text(encoding="utf-8")}
    for number in range(SAMPLE_CLIENTS):
        name = f"client-{number}.jsonl"
        texts[f"data/{name}"] = (template / name).read_text(encoding="utf-8")
    try:
        for name, text in texts.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {directory}: {error.strerror}") from error
    return [directory / name for name in texts]


def _pyproject() -> str:
    components = "".join(f'{name} = "{target}"\n' for name, target in COMPONENTS.items())
    return (
        '[project]\nname = "my-trunkline-run"\nversion = "0.1.0"\ndescription = "A Trunkline run"\n'
        'license = "Apache-2.0"\ndependencies = []\n\n'
        '[tool.flwr.app]\npublisher = "me"\n'
        "# A bundle goes to every node: private text must not be in it.\n"
        f'fab-exclude = ["data/**"]\n\n[tool.flwr.app.components]\n{components}\n{_config_table()}'
    )


def _config_table() -> str:
    """Every setting with its meaning as a comment, the sample's values over the defaults."""
    from demo.settings import MODEL_DIR

    values = {**SAMPLE_SETTINGS, "model": str(MODEL_DIR)}
    lines = ["[tool.flwr.app.config]"]
    section = ""
    for row in schema_rows():
        if row.section != section:
            section = row.section
            lines.append(f"\n## {section}")
        value = values.get(row.key, row.default)
        lines += textwrap.wrap(
            row.meaning, COMMENT_WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
        lines.append(f"{row.key} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"
