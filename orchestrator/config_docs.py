"""Writes what is generated from the settings' schema: docs/configuration.md and the defaults in pyproject.toml.

`python -m orchestrator.config_docs` writes both, `--check` exits 1 if either is stale.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

from contract.config_schema import schema_rows
from contract.setting import ConfigValue

PAGE = Path("docs/configuration.md")
PROJECT = Path("pyproject.toml")
DEFAULTS_HEADER = "[tool.flwr.app.config]\n"

INTRODUCTION = """# Configuration

Every setting of a run, generated from `contract/config.py` by `python -m orchestrator.config_docs`.

Defaults stand in `[tool.flwr.app.config]` in pyproject.toml. Override any of them for one run:

```
trunkline run --run-config 'num-rounds=5 learning-rate=1e-3'
flwr run . --run-config 'num-rounds=5 learning-rate=1e-3'
```

`trunkline config show` prints the settings of a project, `--resolved` with the origin of each one. An unknown key, a
wrong type or an impossible combination stops the run before anything is sent, with the key's name.

What differs between sites is no setting of the run: each client takes `model`, `data`, `trunk-address`, what it insists
on and more from its own SuperNode's `--node-config`; [deployment.md](deployment.md) lists the keys.
"""


def page() -> str:
    """The text of docs/configuration.md."""
    parts = [INTRODUCTION]
    for section, rows in groupby(schema_rows(), key=lambda row: row.section):
        parts.append(f"\n## {section}\n\n| key | takes | default | meaning |\n|---|---|---|---|\n")
        parts += [f"| `{row.key}` | {row.type} | `{_toml(row.default)}` | {row.meaning} |\n" for row in rows]
    return "".join(parts)


def defaults() -> str:
    """The table `[tool.flwr.app.config]` with every default; Flower lets a run override only keys that stand there."""
    return DEFAULTS_HEADER + "".join(f"{row.key} = {_toml(row.default)}\n" for row in schema_rows())


def with_defaults(project_toml: str) -> str:
    """`project_toml` with its table of defaults, which must be its last one, replaced."""
    before, _, _ = project_toml.partition(DEFAULTS_HEADER)
    return before + defaults()


def _toml(value: ConfigValue) -> str:
    return json.dumps(value)


def main(arguments: list[str]) -> int:
    """Write both files into the current directory; with `--check` only compare, and answer 1 if one is stale."""
    stale = False
    for path, wanted in ((PAGE, page()), (PROJECT, with_defaults(PROJECT.read_text("utf-8")))):
        if path.exists() and path.read_text("utf-8") == wanted:
            continue
        if "--check" in arguments:
            sys.stderr.write(f"{path} is stale: run python -m orchestrator.config_docs\n")
            stale = True
        else:
            path.write_text(wanted, "utf-8")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
