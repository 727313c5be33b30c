import ast
from pathlib import Path

import numpy as np

from privacy.mechanism import Off, WireMechanism


def test_off_lets_the_very_value_pass_and_charges_nothing() -> None:
    mechanism: WireMechanism = Off()
    value = np.arange(3.0)
    out, event = mechanism.apply(value)
    assert out is value
    assert event is None


def test_off_says_in_words_what_the_server_can_read() -> None:
    assert Off().summary == "wire privacy is off: the server can read the text"


def test_the_seam_needs_no_framework() -> None:
    tree = ast.parse((Path(__file__).parents[2] / "privacy" / "mechanism.py").read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"__future__", "collections.abc", "dataclasses", "typing"}
