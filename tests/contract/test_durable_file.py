"""A replaced file is the old one or the new one, and a failure leaves nothing beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from contract.durable_file import PARTIAL_PREFIX, create_file, remove_partials, replace_file, settle_file


def test_a_file_is_made_and_replaced_whole_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for data in (b"old" * 1000, b"new"):
        replace_file(path, data)
        assert path.read_bytes() == data
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    replace_file(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_a_new_file_is_made_whole_and_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "key"
    create_file(path, b"first")
    with pytest.raises(FileExistsError):
        create_file(path, b"second")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for there in (tmp_path / "link", tmp_path / "link" / "..", Path()):
        with pytest.raises(OSError, match="File exists|No such file"):
            create_file(there, b"second")
    assert path.read_bytes() == b"first"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_nlink == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["key", "link"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_new_file_that_is_not_durable_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The first fsync is the file's, the second its directory's."""
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        create_file(tmp_path / "key", b"a secret")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_program_wrote_takes_its_place_whole(tmp_path: Path) -> None:
    path, partial = tmp_path / "copy", tmp_path / f"{PARTIAL_PREFIX}1"
    path.write_bytes(b"old")
    partial.write_bytes(b"new")
    settle_file(partial, path)
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_what_was_half_written_long_ago_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "rounds" / "1"
    folder.mkdir(parents=True)
    old, young, whole = folder / f"{PARTIAL_PREFIX}old", folder / f"{PARTIAL_PREFIX}young", folder / "whole"
    for path in (old, young, whole):
        path.write_bytes(b"data")
    for path in (old, whole):
        os.utime(path, (0, 0))
    assert remove_partials(tmp_path, older_than_s=60.0) == 1
    assert sorted(folder.iterdir()) == [young, whole]
