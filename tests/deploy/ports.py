"""Which ports the deployment page tells of."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT, Page


def documented_ports() -> set[int]:
    """The first column of the table of ports."""
    section = Page(ROOT / "docs" / "deployment.md").section("## What runs where")
    return {int(port) for port in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}
