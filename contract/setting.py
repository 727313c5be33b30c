"""One setting of a run: its key as a user writes it, its meaning, and what it takes, in words."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import Field

ConfigValue = str | int | float | bool
"""What Flower can carry as a run config's value."""

_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_LIMIT_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def wanted(annotation: object, metadata: list[object]) -> str:
    """What a field takes, in words: `a whole number, >= 1`."""
    if get_origin(annotation) is Literal:
        return " or ".join(str(choice) for choice in get_args(annotation))
    words = [_TYPE_NAMES[annotation]] if isinstance(annotation, type) else []
    for limit in metadata:
        words += [f"{sign} {getattr(limit, kind)}" for kind, sign in _LIMIT_SIGNS.items() if hasattr(limit, kind)]
    return ", ".join(words)


def key_of(name: str) -> str:
    """The key that a user writes for the field `name`."""
    return name.replace("_", "-")


def setting(default: ConfigValue, section: str, meaning: str, **limits: Any) -> Any:
    """A field of the settings, in a section of the documentation; `limits` are pydantic's."""
    # Any, as of pydantic's own Field: the annotation beside each setting is what counts.
    return Field(default, description=meaning, json_schema_extra={"section": section}, **limits)
