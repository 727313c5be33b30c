"""The window grows while it makes the client wait, finds back to the smallest that does not, and never overshoots."""

from __future__ import annotations

import pytest

from clients.window import FIRST_SIZE, Window


def sizes(window: Window, shares: list[float], most: int = 8) -> list[int]:
    found = []
    for share in shares:
        before = window.size
        assert window.observe(share * 3.0, 3.0, most) is (window.size != before)
        found.append(window.size)
    return found


def test_it_doubles_while_the_client_waits_and_stops_at_what_is_of_use() -> None:
    assert sizes(Window(), [0.5, 0.5, 0.5, 0.5]) == [4, 8, 8, 8]
    assert sizes(Window(), [0.5, 0.5, 0.5], most=5) == [4, 5, 5]


def test_it_stays_where_the_client_hardly_waits() -> None:
    assert sizes(Window(), [0.03] * 50) == [FIRST_SIZE] * 50


def test_it_shrinks_after_some_steps_without_a_wait() -> None:
    window = Window()
    assert sizes(window, [0.5, 0.5]) == [4, 8]
    assert sizes(window, [0.0] * 4) == [8, 8, 8, 7]
    assert sizes(window, [0.0, 0.0, 0.0, 0.03, 0.0, 0.0, 0.0]) == [7] * 7


def test_a_size_that_made_the_client_wait_is_not_tried_again_soon() -> None:
    window = Window()
    assert sizes(window, [0.5, 0.5, *[0.0] * 4, 0.2]) == [4, 8, 8, 8, 8, 7, 8]
    assert sizes(window, [0.0] * 31) == [8] * 31
    assert sizes(window, [0.0]) == [7]


@pytest.mark.parametrize("share", [0.0, 0.03, 1.0])
def test_it_is_never_smaller_than_two_nor_larger_than_asked_for(share: float) -> None:
    window = Window()
    assert all(FIRST_SIZE <= size <= 6 for size in sizes(window, [share] * 100, most=6))


def test_a_step_with_fewer_microbatches_does_not_shrink_it() -> None:
    window = Window()
    sizes(window, [0.5, 0.5])
    assert sizes(window, [0.5], most=3) == [8]


def test_a_step_of_no_length_says_nothing_of_a_wait() -> None:
    window = Window()
    assert not window.observe(0.0, 0.0, 8)
