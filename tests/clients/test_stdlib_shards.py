"""A domain of the standard library shared among more clients than there are domains."""

from __future__ import annotations

from pathlib import Path

import pytest

from clients.data import load_dataset, load_tokenizer
from clients.stdlib_text import DOMAINS, domain_documents, domain_name, domain_of
from contract.errors import DataError
from demo.settings import MODEL_DIR

ROOTS = ("asyncio", "tkinter", "xml", "unittest")
"""A module of each domain, in their order."""


def library(root: Path, lines: int) -> Path:
    """A standard library with two modules in each domain of `lines` lines of 10 characters each, no line twice."""
    for top in ROOTS:
        for module in ("first", "second"):
            path = root / top / f"{module}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{top[:2]}{module[0]}{line:06d}\n" for line in range(lines)))
    return root


def text(name: str, root: Path | None = None) -> str:
    return "".join(document.text for document in domain_documents(name, root))


@pytest.mark.parametrize("clients", [1, 4, 7, 100])
def test_the_shares_of_a_domain_are_all_of_its_text_and_nothing_twice(clients: int) -> None:
    shared: dict[str, str] = dict.fromkeys(DOMAINS, "")
    for client in range(clients):
        documents = domain_documents(f"{client}/{clients}")
        assert {domain_of(document.module) for document in documents} == {domain_name(str(client))}
        shared[domain_name(str(client))] += "".join(document.text for document in documents)
    assert shared == {name: text(name) if place < clients else "" for place, name in enumerate(DOMAINS)}


def test_shares_are_as_equal_as_their_lines_let_them_be(tmp_path: Path) -> None:
    root = library(tmp_path, 1500)
    lengths = [len(text(f"{client}/10", root)) for client in range(10)]
    assert lengths == [10_000, 10_000, 15_000, 15_000] * 2 + [10_000, 10_000]
    assert all(line.endswith("\n") for client in range(10) for line in text(f"{client}/10", root).splitlines(True))


def test_a_hundred_clients_have_rows_enough_to_learn_from_and_to_hold_out() -> None:
    tokenizer = load_tokenizer(MODEL_DIR)
    for client in (0, 1, 2, 3, 99):
        site = load_dataset(f"stdlib:{client}/100", tokenizer, 128, 0.1, 0)
        assert len(site.train_rows) > 30
        assert site.heldout_rows


def test_too_many_clients_are_told_how_many_fit(tmp_path: Path) -> None:
    root = library(tmp_path, 800)
    path = root / "xml" / "second.py"
    path.write_text(path.read_text()[:500])
    assert text("2/6", root)
    for name, clients in (("2/7", 7), ("0/9", 9)):
        with pytest.raises(
            DataError, match=f"^stdlib:{name}: the text is too little for {clients} clients; it is enough for 6$"
        ):
            domain_documents(name, root)


@pytest.mark.parametrize("name", ["4/4", "0/0", "-1/4", "text/4", "1/", "/4", "1/4/4", "1/x", "²/4"])
def test_what_names_no_share_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"^stdlib:{name}: no such share; wants NUMBER/COUNT, COUNT the clients and"):
        domain_documents(name)
