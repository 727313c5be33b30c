"""Who decides: the name that is kept beside what an operator changed."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

from contract.errors import ConfigError
from contract.privacy_records import chosen_by_person

OperatorOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Who decides this, for the record; default: your login name.")
]


def operator_name(given: str | None) -> str:
    """The name given, or the login's. Raises ConfigError where there is none."""
    name = given
    if name is None:
        try:
            name = getpass.getuser()
        except (OSError, KeyError, ImportError) as error:
            raise ConfigError("this login has no name; say who you are with --operator") from error
    if not name.strip():
        raise ConfigError("--operator is empty; say who decides this, for the record")
    if not chosen_by_person(name.strip()):
        raise ConfigError(f"--operator is {name.strip()!r}, which stands for settings; say which person decides this")
    return name.strip()
