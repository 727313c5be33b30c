"""Command lines in files that nothing here can run, held against the programs that they name."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import click

from trunkline.cli import commands

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
FLOWER_PROGRAMS = ("flower-superlink", "flower-supernode")


def faults(argv: Sequence[str]) -> list[str]:
    """What is wrong with a command line of ours or of Flower's: a command or an option that its program has not."""
    program, *words = argv
    name = Path(program).name
    if name == "trunkline":
        return _trunkline_faults(words)
    if name in FLOWER_PROGRAMS:
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        return [f"{name} has no option {option}" for option in options if option not in _flower_options(name)]
    return [f"{name} is no program that this knows"]


def is_ours(argv: Sequence[str]) -> bool:
    return Path(argv[0]).name in ("trunkline", *FLOWER_PROGRAMS)


def shell_commands(script: Path) -> list[list[str]]:
    """Every command of ours or of Flower's in a shell script, as words without their quotes."""
    text = re.sub(r"\\\n\s*", " ", script.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if not re.match(r"\s*(#|for |step |fail |echo )", line)]
    programs = "|".join(("trunkline", *FLOWER_PROGRAMS))
    found = re.findall(rf"(?<![\w/.-])(?:{programs}) [^|>;)&\n]*", "\n".join(lines))
    return [command.replace('"', "").replace("\\", "").split() for command in found]


def _trunkline_faults(words: Sequence[str]) -> list[str]:
    if not words or words[0].startswith("-"):
        return [] if set(words) <= {"--help", "-h", "--version", "--install-completion"} else [f"trunkline {words}"]
    command = _tree().get(words[0])
    path, rest = f"trunkline {words[0]}", list(words[1:])
    if isinstance(command, click.Group) and rest and rest[0] != "..." and not rest[0].startswith("-"):
        path, command, rest = f"{path} {rest[0]}", command.commands.get(rest[0]), rest[1:]
    if command is None:
        return [f"there is no command {path}"]
    known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
    told = [word.partition("=")[0] for word in rest if re.match(r"--?[A-Za-z]", word)]
    return [f"{path} has no option {option}" for option in told if option not in known]


@cache
def _tree() -> dict[str, click.Command]:
    return dict(commands())


@cache
def _flower_options(program: str) -> frozenset[str]:
    done = subprocess.run(
        [str(PROGRAMS / program), "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "FLWR_DISABLE_UPDATE_CHECK": "1"},
    )
    return frozenset(re.findall(r"(?<![\w-])--[a-z][a-z-]*", done.stdout))
