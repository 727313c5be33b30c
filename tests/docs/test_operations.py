"""docs/operations.md tells of every exit code and every class of error, each under the code that it really has."""

from __future__ import annotations

import re
from collections import defaultdict

from contract import errors
from contract.output import EXIT_INTERRUPTED
from tests.docs.pages import ROOT, Page

PAGE = Page(ROOT / "docs" / "operations.md")
_NAME = re.compile(r"`([A-Z]\w+Error)`")


def classes_by_code() -> dict[int, set[str]]:
    found: dict[int, set[str]] = defaultdict(set)
    for cls in vars(errors).values():
        if isinstance(cls, type) and issubclass(cls, errors.TrunklineError):
            found[cls.exit_code].add(cls.__name__)
    return found


def test_there_is_a_heading_for_each_exit_code_and_no_other() -> None:
    told = {int(code) for code in re.findall(r"^### Exit code (\d+)$", PAGE.prose(), re.MULTILINE)}
    assert told == {0, EXIT_INTERRUPTED, *classes_by_code()}


def test_each_class_of_error_stands_under_its_code() -> None:
    for code, names in classes_by_code().items():
        told = set(_NAME.findall(PAGE.section(f"### Exit code {code}")))
        assert told == names, f"exit code {code}"


def test_each_class_of_exit_code_1_has_a_cause_and_something_to_do() -> None:
    rows = [row for row in PAGE.section("### Exit code 1").splitlines() if row.startswith("| `")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert all(len(row) == 3 and all(row) for row in cells)
    assert {name for row in cells for name in _NAME.findall(row[0])} == classes_by_code()[1]
