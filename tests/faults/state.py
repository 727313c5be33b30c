"""A trunk's state directory, looked at from outside: all that may be believed is whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def half_written(state: Path) -> list[str]:
    """Files that are not what their names promise, and what two trunks in turn left behind of activations."""
    wrong = []
    for path in sorted(state.rglob("*.safetensors")):
        if hashlib.sha256(path.read_bytes()).hexdigest() != path.stem and not path.parent.name.startswith("spill-"):
            wrong.append(f"{path.relative_to(state)} does not hash to its name")
    for path in sorted(state.rglob("*.json")):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            wrong.append(f"{path.relative_to(state)} is no JSON: {error}")
    spills = list(state.glob("spill-*"))
    if len(spills) > 1:  # the one that served last was killed, too, and its folder awaits the next
        wrong.append(f"{len(spills)} trunks left what they had put aside")
    return wrong
