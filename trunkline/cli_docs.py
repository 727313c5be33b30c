"""Writes docs/cli.md from the commands themselves.

`python -m trunkline.cli_docs` writes it into the current directory, `--check` exits 1 if it is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import click

from contract.errors import TrunklineError
from contract.output import EXIT_INTERRUPTED
from trunkline.cli import commands

PAGE = Path("docs/cli.md")

INTRODUCTION = """# Commands

Every command and option, generated from the program by `python -m trunkline.cli_docs`. `trunkline COMMAND --help` tells
the same in a terminal. `trunkline --install-completion` sets up completion for your shell.

- Data goes to stdout, talk to stderr, so that `trunkline ... -o json | jq` sees data only.
- `-o table` is for people; a table that is piped is not folded. `-o json` prints one line,
  `{"schema_version": 1, "status": "ok", "data": ...}`; `-o jsonl` prints such a line for every row of a list.
- An error is one line on stderr, `error: REASON`. With `-o json` or `-o jsonl` stdout then has
  `{"schema_version": 1, "status": "error", "error": {"type": ..., "message": ..., "exit_code": ...}}`.
- Wrong usage (an unknown command or option, a value of the wrong kind) is told on stderr alone, in a few lines that
  begin with `Usage:`, with exit code 2; stdout stays empty, also with `-o json`.
- A check that fails is no error: `data check`, `doctor`, `adapter verify` and `budget verify` then print what they
  found, in an envelope with status `ok`, and exit with 1. What failed is in its data: `sound` of `data check`, `ok` of
  `adapter verify` and `budget verify`, a `result` of `FAIL` among the findings of `doctor`.
- What destroys something asks first, and is refused where there is no terminal unless `--yes` is given; `--dry-run`
  only says what it would do. What changes something is kept in the audit log (`db log`) with who decided it: your login
  name, or `--operator NAME`.
- `--watch` shows a list anew whenever it changes, until Ctrl-C (exit code 130). Without a terminal, or with `-o json`
  or `-o jsonl`, each line of stdout is then the whole list in an envelope.
- `--last` names the newest run.
- `NO_COLOR=1` turns colours off; so does a pipe.
- `TRUNKLINE_HOME` and `TRUNKLINE_DATABASE_URL` say where runs are kept: see [deployment](deployment.md).

## Exit codes

| code | meaning | when |
|---|---|---|
| 0 | ok | also `trunk serve` and `dashboard` that were told to end |
| 1 | failed | every error that is not named below; a check that fails; a run that failed or was stopped |
"""

CODE_MEANINGS = {2: "usage or configuration", 3: "connection or authentication", 4: "timeout"}


def page() -> str:
    """The text of docs/cli.md."""
    parts = [INTRODUCTION, *_code_rows()]
    parts += [text for name, command in commands() for text in _chapter(f"trunkline {name}", command)]
    return "".join(parts)


def _code_rows() -> Iterator[str]:
    classes: list[type[TrunklineError]] = [TrunklineError]
    for cls in classes:
        classes.extend(cls.__subclasses__())
    for code, meaning in CODE_MEANINGS.items():
        names = ", ".join(f"`{cls.__name__}`" for cls in classes if cls.exit_code == code)
        yield f"| {code} | {meaning} | {names} |\n"
    yield f"| {EXIT_INTERRUPTED} | interrupted | Ctrl-C; for `demo` and `run` also SIGTERM, SIGHUP without `nohup` |\n"


def _chapter(path: str, command: click.Command) -> Iterator[str]:
    if isinstance(command, click.Group):
        yield f"\n## {path}\n\n{_help(command)}\n"
        for name, child in command.commands.items():
            yield from _command(f"{path} {name}", child, "###")
    else:
        yield from _command(path, command, "##")


def _command(path: str, command: click.Command, level: str) -> Iterator[str]:
    arguments = [one for one in command.params if isinstance(one, click.Argument)]
    options = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
    usage = " ".join([path, *(_placeholder(one) for one in arguments), "[OPTIONS]"])
    yield f"\n{level} {path}\n\n{_help(command)}\n\n```\n{usage}\n```\n\n"
    yield "| argument or option | takes | default | meaning |\n|---|---|---|---|\n"
    for parameter in (*arguments, *options):
        name = _placeholder(parameter) if isinstance(parameter, click.Argument) else ", ".join(parameter.opts)
        cells = (f"`{name}`", _takes(parameter), _default(parameter), _cell(getattr(parameter, "help", None) or ""))
        yield f"| {' | '.join(cells)} |\n"


def _help(command: click.Command) -> str:
    return " ".join((command.help or "").split())


def _placeholder(argument: click.Argument) -> str:
    name = (argument.metavar or (argument.name or "").upper()).strip("[]")
    return name if argument.required else f"[{name}]"


def _takes(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return ""
    kind = parameter.type
    if isinstance(kind, click.Choice):
        words = " or ".join(f"`{_plain(choice)}`" for choice in kind.choices)
    elif isinstance(kind, click.IntRange | click.FloatRange):
        words = "a whole number" if isinstance(kind, click.IntRange) else "a number"
        words += "" if kind.min is None else f", >= {kind.min:g}"
    elif isinstance(kind, click.Path):
        words = "a path"
    else:
        words = _cell(parameter.metavar) if parameter.metavar and "[" not in parameter.metavar else "text"
    return f"{words}; repeatable" if parameter.multiple else words


def _default(parameter: click.Parameter) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or value is False or value == () or callable(value):
        return ""
    return f"`{_plain(value)}`"


def _plain(value: object) -> str:
    return str(value.value if isinstance(value, Enum) else value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Write the page into the current directory; with `--check` only compare, and answer 1 if it is stale."""
    text = page()
    if PAGE.exists() and PAGE.read_text("utf-8") == text:
        return 0
    if "--check" in arguments:
        sys.stderr.write(f"{PAGE} is stale: run python -m trunkline.cli_docs\n")
        return 1
    PAGE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
