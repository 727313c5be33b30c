"""A replaced file is the old one or the new one, and a failure leaves nothing beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from contract.durable_file import replace_file


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
