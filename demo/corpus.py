"""The text that the demo's base model learned from: what the clients do not hold.

The help topics of `pydoc_data`, the standard library's modules outside every client's domain, and the library's tests
of those modules. `clients.stdlib_text` holds the clients' domains. All of it is read at run time from a Python
installation; none is copied into the repository.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from clients.stdlib_text import DOMAINS, Document, domain_of, read_modules, stdlib_root
from contract.errors import DataError

# Character tables and build settings: text that teaches nothing.
_TABLES = ("encodings", "stringprep", "_sysconfigdata")
_NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "pydoc_data", "lib-dynload"})


def pretraining_documents(root: Path | None = None) -> list[Document]:
    """Everything under `root` (default: the running interpreter's library) that is in no client's domain, by name.

    Raises DataError where `root` is no standard library with sources.
    """
    base = root or stdlib_root()
    if not (base / "pydoc_data" / "topics.py").is_file():
        raise DataError(f"{base}: holds no pydoc_data/topics.py; wants the directory of a Python standard library")
    documents = [*_topics(base), *_modules(base), *_tests(base)]
    return sorted(documents, key=lambda document: document.module)


def _topics(root: Path) -> Iterator[Document]:
    tree = ast.parse((root / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(statement.value).items()):
                yield Document(f"pydoc_data.topics:{name}", text)


def _modules(root: Path) -> Iterator[Document]:
    names = sorted(
        path.stem
        for path in root.iterdir()
        if path.name not in _NOT_THE_LIBRARY and (path.suffix == ".py" or (path.is_dir() and path.name.isidentifier()))
    )
    kept = [name for name in dict.fromkeys(names) if not name.startswith(_TABLES) and domain_of(name) is None]
    return read_modules(root, kept)


def _tests(root: Path) -> Iterator[Document]:
    held = tuple(f"test_{name.rpartition('.')[2].lower()}" for names in DOMAINS.values() for name in names)
    for path in sorted((root / "test").glob("test_*.py")):
        if not path.stem.startswith(held):
            yield from read_modules(root, [f"test.{path.stem}"])
