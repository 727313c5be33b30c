"""The demo's private text: sources of the running interpreter's own standard library, one domain a client.

Read at run time from the installation (`sysconfig`'s stdlib directory); nothing is copied. Domains are disjoint by
module, and modules that a build of Python leaves out (Debian packages `tkinter`, `idlelib` and `test` apart) are passed
over: the other modules of the domain stay.

For more clients than domains, `NUMBER/COUNT` names the text of client NUMBER of COUNT: its own share of domain NUMBER
modulo 4. The shares of a domain are equally long, cut between lines, and have no text in common.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from contract.errors import DataError

DOMAINS: dict[str, tuple[str, ...]] = {
    "networking": (
        *("asyncio", "email", "ftplib", "http", "imaplib", "mailbox", "nntplib", "poplib", "selectors", "smtpd"),
        *("smtplib", "socket", "socketserver", "ssl", "telnetlib", "urllib", "webbrowser", "wsgiref", "xmlrpc"),
    ),
    "gui": (
        *("argparse", "cmd", "code", "curses", "getopt", "getpass", "idlelib", "optparse", "pydoc", "rlcompleter"),
        *("tkinter", "turtle", "turtledemo"),
    ),
    "text": (
        *("configparser", "csv", "difflib", "formatter", "gettext", "html", "json", "lib2to3", "locale", "plistlib"),
        *("pprint", "re", "reprlib", "shlex", "string", "textwrap", "tokenize", "tomllib", "xml"),
    ),
    "testing": (
        *("bdb", "cProfile", "doctest", "pdb", "profile", "pstats", "timeit", "trace", "traceback", "tracemalloc"),
        *("unittest", "test.libregrtest", "test.support"),
    ),
}

# A domain's share of text: enough for a demo's rounds, little enough to be tokenised in a second at every start.
_DOMAIN_CHARACTERS = 600_000
_SMALLEST_SHARE_CHARACTERS = 8_000
"""About twenty rows of 128 tokens: enough to learn from and to hold some out."""
_FOLDERS_LEFT_OUT = frozenset({"test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True, slots=True)
class Document:
    """One source file; `module` is its dotted name."""

    module: str
    text: str


def stdlib_root() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def domain_name(name: str) -> str:
    """The domain called `name`; a number n (a simulation's partition) means domain n modulo their count.

    Raises DataError for any other name.
    """
    if name.isascii() and name.isdigit():
        return tuple(DOMAINS)[int(name) % len(DOMAINS)]
    if name not in DOMAINS:
        raise DataError(f"stdlib:{name}: no such domain; wants one of {', '.join(DOMAINS)}, or a partition number")
    return name


def domain_documents(name: str, root: Path | None = None) -> list[Document]:
    """The documents of domain `name`, in an order drawn from their names, up to about 600,000 characters.

    For `NUMBER/COUNT` those of one client's share. Raises DataError for an unknown domain or share, where `root` holds
    none of the domain's modules, and where COUNT clients are too many for the text.
    """
    if "/" in name:
        return _share_documents(name, root or stdlib_root())
    domain = domain_name(name)
    base = root or stdlib_root()
    documents = list(read_modules(base, DOMAINS[domain]))
    if not documents:
        raise DataError(
            f"stdlib:{domain}: none of its modules has a source file under {base}; "
            "wants a Python with its standard library's sources"
        )
    documents.sort(key=lambda document: hashlib.sha256(document.module.encode()).digest())
    chosen: list[Document] = []
    characters = 0
    for document in documents:
        if characters >= _DOMAIN_CHARACTERS:
            break
        chosen.append(Document(document.module, document.text[: _DOMAIN_CHARACTERS - characters]))
        characters += len(chosen[-1].text)
    return chosen


def _share_documents(name: str, root: Path) -> list[Document]:
    """What client NUMBER of COUNT holds, for `name` NUMBER/COUNT: the lines that begin in its share of its domain."""
    client, clients = _client_of(name)
    documents = domain_documents(str(client), root)
    if clients > _most_clients(_characters(documents), client % len(DOMAINS)):
        most = min(
            _most_clients(_characters(domain_documents(domain, root)), place) for place, domain in enumerate(DOMAINS)
        )
        raise DataError(f"stdlib:{name}: the text is too little for {clients} clients; it is enough for {most}")
    share, shares = client // len(DOMAINS), _clients_of_domain(clients, client % len(DOMAINS))
    return _cut(documents, share, shares)


def _client_of(name: str) -> tuple[int, int]:
    number, _, count = name.partition("/")
    if not all(part.isascii() and part.isdigit() for part in (number, count)) or int(number) >= int(count):
        raise DataError(
            f"stdlib:{name}: no such share; wants NUMBER/COUNT, COUNT the clients and NUMBER one of them, from 0"
        )
    return int(number), int(count)


def _clients_of_domain(clients: int, place: int) -> int:
    """How many of `clients` have the domain at `place`."""
    return len(range(place, clients, len(DOMAINS)))


def _most_clients(characters: int, place: int) -> int:
    """How many clients there may be in all where the domain at `place` has so much text."""
    return place + len(DOMAINS) * (characters // _SMALLEST_SHARE_CHARACTERS)


def _characters(documents: Iterable[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _cut(documents: Sequence[Document], share: int, shares: int) -> list[Document]:
    """The lines that begin in part `share` of `shares` equal parts of all characters."""
    characters, position = _characters(documents), 0
    kept: list[Document] = []
    for document in documents:
        lines = []
        for line in document.text.splitlines(keepends=True):
            if position * shares // characters == share:
                lines.append(line)
            position += len(line)
        if lines:
            kept.append(Document(document.module, "".join(lines)))
    return kept


def domain_of(module: str) -> str | None:
    """The client domain that dotted `module` belongs to, if any."""
    for domain, roots in DOMAINS.items():
        if any(module == root or module.startswith(f"{root}.") for root in roots):
            return domain
    return None


def read_modules(root: Path, modules: Iterable[str]) -> Iterator[Document]:
    """The source files of dotted top-level `modules` and all below them that `root` holds, in the order of their names.

    Test packages inside a module are left out.
    """
    for module in modules:
        place = root.joinpath(*module.split("."))
        source = place.with_suffix(".py")
        paths = [source] if source.is_file() else []
        paths += sorted(
            path for path in place.rglob("*.py") if not _FOLDERS_LEFT_OUT & set(path.relative_to(place).parts)
        )
        for path in paths:
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            # Python's sources are UTF-8 but for a few odd ones in its own tests.
            text = path.read_bytes().decode("utf-8", errors="replace")
            if text.strip():
                yield Document(name, text)
