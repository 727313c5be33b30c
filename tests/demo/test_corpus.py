"""Whose text is whose: the clients' domains and what the base model learned from."""

from __future__ import annotations

from pathlib import Path

import pytest

from clients.stdlib_text import DOMAINS, domain_documents, domain_name, domain_of, stdlib_root
from contract.errors import DataError
from demo.corpus import pretraining_documents


def library(root: Path, *modules: str) -> Path:
    """A standard library of our own with these modules, each a line that says its name."""
    for module in modules:
        path = root.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""This is {module}."""\n')
    return root


def test_every_domain_of_this_python_holds_enough_text_for_a_demo() -> None:
    for name in DOMAINS:
        documents = domain_documents(name)
        assert 100_000 < sum(len(document.text) for document in documents) <= 600_000
        assert {domain_of(document.module) for document in documents} == {name}


def test_domains_and_pretraining_share_no_module() -> None:
    held = [document.module for name in DOMAINS for document in domain_documents(name)]
    learned = [document.module for document in pretraining_documents()]
    assert len(set(held)) == len(held)
    assert len(set(learned)) == len(learned)
    assert not set(held) & set(learned)
    assert not [module for module in learned if domain_of(module)]
    assert {"subprocess", "pydoc_data.topics:with"} <= set(learned)


def test_the_base_model_learns_no_test_of_a_clients_module(tmp_path: Path) -> None:
    root = library(tmp_path, "abc", "test.test_abc", "test.test_socket", "test.test_tkinter", "encodings.cp437")
    (root / "pydoc_data").mkdir()
    (root / "pydoc_data" / "topics.py").write_text("topics = {'with': 'The with statement.', 'if': 'The if one.'}\n")
    documents = {document.module: document.text for document in pretraining_documents(root)}
    assert list(documents) == ["abc", "pydoc_data.topics:if", "pydoc_data.topics:with", "test.test_abc"]
    assert documents["pydoc_data.topics:with"] == "The with statement."


def test_modules_that_a_python_lacks_are_passed_over(tmp_path: Path) -> None:
    root = library(tmp_path, "cmd", "curses.panel", "curses.test.test_panel", "socket", "cmdline")
    assert {document.module for document in domain_documents("gui", root)} == {"cmd", "curses.panel"}
    with pytest.raises(DataError, match="stdlib:testing: none of its modules has a source file under .*; wants a Pyth"):
        domain_documents("testing", root)


def test_a_domain_is_cut_to_size_in_the_same_order_everywhere(tmp_path: Path) -> None:
    root = library(tmp_path, *(f"asyncio.part{i}" for i in range(9)))
    for path in root.rglob("*.py"):
        path.write_text(path.stem * 20_000)
    first, again = domain_documents("networking", root), domain_documents("networking", root)
    assert first == again
    assert sum(len(document.text) for document in first) == 600_000
    assert [document.module for document in first] != sorted(document.module for document in first)


def test_a_partition_number_names_a_domain() -> None:
    assert [domain_name(str(number)) for number in range(5)] == [*DOMAINS, "networking"]
    with pytest.raises(DataError, match="stdlib:-1: no such domain"):
        domain_name("-1")


def test_what_is_no_standard_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pydoc_data/topics.py; wants the directory of a Python standard"):
        pretraining_documents(tmp_path)
    assert (stdlib_root() / "os.py").is_file()
