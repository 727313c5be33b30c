"""Markdown as these pages use it: their headings' anchors, their links, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").glob("*.md")])

OPEN = "..."
"""Stands for what a page leaves out of a command."""

_FENCE = re.compile(r"^( *)```.*?\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PROMPT = re.compile(r"^\s*(?:\$ )?(?=trunkline )")


@dataclass(frozen=True)
class Page:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    def prose(self) -> str:
        """The text without its blocks of code."""
        return _FENCE.sub("", self.path.read_text(encoding="utf-8"))

    def anchors(self) -> set[str]:
        """As GitHub makes them from headings."""
        headings = re.findall(r"^#+ (.+)$", self.prose(), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def links(self) -> list[str]:
        return _LINK.findall(self.prose())

    def section(self, heading: str) -> str:
        """What stands under `heading`, with its deeper headings, up to the next of its level."""
        level = heading.split(" ")[0]
        _, _, rest = self.path.read_text(encoding="utf-8").partition(f"\n{heading}\n")
        if not rest:
            raise LookupError(f"{self.name} has no heading {heading!r}")
        return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]

    def commands(self) -> list[list[str]]:
        """Every `trunkline ...` in a block of code or a span of it, as words; of a pipe or a list, the first part.

        One whose command is left open, such as `trunkline COMMAND --help`, is none.
        """
        text = self.path.read_text(encoding="utf-8")
        lines = [line for _, block in _FENCE.findall(text) for line in _joined(block).splitlines()]
        lines += [span.replace("\n", " ") for span in _SPAN.findall(self.prose())]
        told = [_words(line) for line in lines if _PROMPT.match(line)]
        return [words for words in told if len(words) == 1 or not (words[1].isupper() or words[1] == OPEN)]


def _joined(block: str) -> str:
    """Lines that end with a backslash, or leave a quote open, with what follows."""
    joined = re.sub(r"\\\n\s*", " ", block)
    lines: list[str] = []
    for line in joined.splitlines():
        if lines and _PROMPT.match(lines[-1]) and lines[-1].count("'") % 2:
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return "\n".join(lines)


def _words(line: str) -> list[str]:
    words = shlex.split(_PROMPT.sub("", line), comments=True)
    ends = [number for number, word in enumerate(words) if word in ("|", "&&", ";", ">", "2>", "||")]
    return words[: min(ends, default=len(words))]
