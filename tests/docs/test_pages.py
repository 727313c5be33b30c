"""What the pages point at is there: other pages, their headings, files, and the commands that they tell to run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.command_lines import faults
from tests.docs.pages import PAGES, ROOT, Page


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_its_links_lead_somewhere(path: Path) -> None:
    page = Page(path)
    lost = []
    for link in page.links():
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        place = (path.parent / target).resolve() if target else path
        if not place.exists() or (anchor and anchor not in Page(place).anchors()):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_its_commands_are_there(path: Path) -> None:
    assert [fault for command in Page(path).commands() for fault in faults(command)] == []


def test_links_and_commands_are_found_where_they_are_wrong(tmp_path: Path) -> None:
    text = (
        "# A Page: of `code`\n\nSee [this](#a-page-of-code), [that](gone.md).\nRun `trunkline runs list --las`.\n\n"
        "```\n$ trunkline runs lst | jq\ntrunkline run my-run -c 'a=1\n  b=2' --superlnk x\n"
        "trunkline runs show --last  # --comment\n```\n"
    )
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    page = Page(path)
    assert page.links() == ["#a-page-of-code", "gone.md"]
    assert page.anchors() == {"a-page-of-code"}
    assert [fault for command in page.commands() for fault in faults(command)] == [
        "there is no command trunkline runs lst",
        "trunkline run has no option --superlnk",
        "trunkline runs list has no option --las",
    ]


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in Page(ROOT / "README.md").links()}
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    assert pages - linked == set()
