"""Who takes part."""

from __future__ import annotations

import pytest

from contract.config import ConfigValue, RunConfig
from contract.errors import QuorumError
from orchestrator.cohort import draw_cohort, wait_for_clients
from orchestrator.exchange import Exchange
from tests.orchestrator.fakes import FakeClock, FakeGrid, FakeNode

TEN = [str(number) for number in range(10)]


def config(**values: ConfigValue) -> RunConfig:
    return RunConfig.from_flower({key.replace("_", "-"): value for key, value in values.items()})


def waited(settings: RunConfig, connects: list[float], *, first: bool = True) -> tuple[list[str], float]:
    clock = FakeClock()
    nodes = {number: FakeNode(None, connects_after_s=after) for number, after in enumerate(connects)}
    found = wait_for_clients(Exchange(FakeGrid(clock, nodes), clock), settings, clock, first=first)
    return found, clock.now - 1000.0


def test_a_full_cohort_starts_at_once() -> None:
    assert waited(config(cohort_size=2), [0.0, 0.0, 50.0]) == (["0", "1"], 0.0)


def test_a_quorum_that_is_there_when_the_wait_ends_is_enough() -> None:
    found, seconds = waited(config(cohort_size=3, quorum=2, node_wait_s=10.0), [0.0, 4.0, 99.0])
    assert found == ["0", "1"]
    assert seconds == pytest.approx(10.0, abs=0.5)


def test_after_the_first_round_a_missing_site_delays_nothing() -> None:
    found, seconds = waited(config(cohort_size=3, quorum=2, node_wait_s=10.0), [0.0, 0.0, 99.0], first=False)
    assert (found, seconds) == (["0", "1"], 0.0)


def test_too_few_clients_end_the_wait_with_both_numbers() -> None:
    with pytest.raises(QuorumError, match=r"1 of 2 clients \(quorum\) connected within 10 s: start more SuperNodes"):
        waited(config(quorum=2, node_wait_s=10.0), [0.0, 99.0])


def test_without_a_cohort_size_sites_that_start_together_are_all_seen() -> None:
    found, seconds = waited(config(quorum=2), [0.0, 0.3, 0.9, 1.6, 60.0])
    assert found == ["0", "1", "2", "3"]
    assert seconds < 4.0


def test_sites_that_keep_coming_cannot_put_a_start_off_for_ever() -> None:
    found, seconds = waited(config(quorum=2, node_wait_s=10.0), [0.5 * number for number in range(100)])
    assert len(found) >= 20
    assert seconds < 11.0


def test_all_are_drawn_without_a_cohort_size() -> None:
    assert draw_cohort(TEN, (), config(), 1) == tuple(TEN)


def test_a_cohort_follows_from_seed_and_round_alone() -> None:
    settings = config(cohort_size=4)
    drawn = [draw_cohort(TEN, (), settings, number) for number in range(1, 30)]
    assert drawn == [draw_cohort(list(reversed(TEN)), (), settings, number) for number in range(1, 30)]
    assert {len(set(cohort)) for cohort in drawn} == {4}
    assert len(set(drawn)) > 10
    assert drawn[0] != draw_cohort(TEN, (), config(cohort_size=4, seed=1), 1)
    assert {node_id for cohort in drawn for node_id in cohort} == set(TEN)


def test_a_node_that_still_works_on_an_earlier_round_is_left_out_while_a_quorum_is_left() -> None:
    assert draw_cohort(["1", "2", "3"], {"2"}, config(quorum=2), 1) == ("1", "3")
    assert draw_cohort(["1", "2", "3"], {"2"}, config(quorum=3), 1) == ("1", "2", "3")
