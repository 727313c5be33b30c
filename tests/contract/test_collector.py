"""Imports run without collections, and leave the collector as it was."""

from __future__ import annotations

import gc

import pytest

from contract import collector


def test_nothing_is_collected_within_and_the_collector_goes_on_afterwards() -> None:
    with collector.paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), collector.paused():
        raise ImportError("no such module")
    assert gc.isenabled()


def test_who_had_turned_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        with collector.paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
