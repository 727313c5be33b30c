"""However many ask, a page is made once, and no more often than what it costs allows."""

from __future__ import annotations

import threading

import pytest

from contract.errors import StorageError
from trunkline.pages.shelf import FRESH_S, MOST_FRESH_S, MOST_KEPT, Page, Shelf


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_page_is_kept_while_it_is_fresh_and_then_made_anew() -> None:
    clock, made = Clock(), iter(["one", "two", "three"])
    shelf = Shelf(clock)

    def ask() -> bytes:
        return shelf.page("runs", lambda: Page.of(next(made))).body

    assert (ask(), ask()) == (b"one", b"one")
    clock.now += FRESH_S + 0.1
    assert ask() == b"two"


@pytest.mark.parametrize(("took_s", "kept_s"), [(0.5, 2.0), (60.0, MOST_FRESH_S)])
def test_a_page_that_took_long_is_kept_longer(took_s: float, kept_s: float) -> None:
    clock, times = Clock(), []
    shelf = Shelf(clock)

    def make() -> Page:
        times.append(clock.now)
        clock.now += took_s
        return Page.of("page")

    shelf.page("run", make)
    clock.now += kept_s - 0.1
    shelf.page("run", make)
    assert len(times) == 1
    clock.now += 0.2
    shelf.page("run", make)
    assert len(times) == 2


def test_what_many_ask_for_at_once_is_made_once() -> None:
    shelf, made, begun = Shelf(), [], threading.Event()

    def make() -> Page:
        begun.wait(10)
        made.append(1)
        return Page.of("page")

    askers = [threading.Thread(target=shelf.page, args=("run", make)) for _ in range(8)]
    for asker in askers:
        asker.start()
    begun.set()
    for asker in askers:
        asker.join(30)
    assert made == [1]


def test_no_more_pages_are_kept_than_there_may_be_and_a_problem_is_not_kept() -> None:
    clock = Clock()
    shelf = Shelf(clock)
    for number in range(3 * MOST_KEPT):
        shelf.page(f"run {number}", lambda: Page.of("page"))
    assert len(shelf._kept) == MOST_KEPT
    shelf.page("problem", lambda: Page.of("why", 503))
    assert shelf.page("problem", lambda: Page.of("well")).body == b"well"


def test_an_error_goes_to_who_asked_and_spoils_nothing() -> None:
    shelf = Shelf()

    def fail() -> Page:
        raise StorageError("no")

    with pytest.raises(StorageError):
        shelf.page("run", fail)
    assert shelf.page("run", lambda: Page.of("page")).status == 200


def test_the_tag_changes_with_the_page() -> None:
    assert Page.of("a").tag == Page.of("a").tag != Page.of("b").tag
