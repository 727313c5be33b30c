"""The live table says what SQL says, as plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from sqlalchemy import event

from contract.config import RunConfig
from storage import schema
from storage.records import RoundCommit
from storage.store import Store, open_store
from trunkline.live import Standing, display, read_standing, round_table, wire_size

RUN, FLOWER = "20260101-000000-abcd", "77"
NODES = ("11", "22", "33")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(f"sqlite:///{tmp_path}/runs.db")
    yield store
    store.close()


def begin(store: Store) -> None:
    config = RunConfig.from_flower({"num-rounds": 2, "local-steps": 10})
    store.create_run(RUN, FLOWER, config.to_flower(), "simulation", "f" * 64)
    store.add_adapter_version(RUN, 0, "a" * 64, "b" * 64)


def play_first_round(store: Store) -> None:
    attempt = store.open_round(RUN, 1, NODES)
    store.record_progress(
        RUN, 1, attempt, phase="training", replies=2, steps=25, tokens=500, received_bytes=1500, sent_bytes=2000
    )
    for node in NODES[:2]:
        store.record_participation(RUN, 1, attempt, node, "trained", metrics={"train_loss": 2.5})
    store.record_participation(RUN, 1, attempt, NODES[2], "failed", "out of memory")
    store.record_metrics(RUN, 0, None, {"eval_loss": 3.25})
    store.commit_round(
        RoundCommit(RUN, 1, attempt, "c" * 64, "d" * 64, 600, NODES[:2], 4.0, metrics={"train_loss": 2.5})
    )


def standing(store: Store) -> Standing:
    found = read_standing(store, FLOWER)
    assert found is not None
    return found


def test_a_run_that_sql_does_not_know_stands_nowhere(store: Store) -> None:
    assert read_standing(store, FLOWER) is None


def test_a_committed_round_is_a_line_with_its_numbers(store: Store) -> None:
    begin(store)
    play_first_round(store)
    start, first = standing(store).lines
    assert (start.number, start.held_out_loss) == (0, 3.25)
    assert (first.replied, first.asked, first.train_loss, first.committed) == (2, 3, 2.5, True)
    assert (first.tokens_per_s, first.seconds, first.wire_bytes) == (150.0, 4.0, 3500)
    assert first.held_out_loss is None, "nobody has judged this adapter yet"


def test_the_next_round_brings_the_held_out_loss_of_the_one_before(store: Store) -> None:
    begin(store)
    play_first_round(store)
    store.open_round(RUN, 2, NODES)
    store.record_metrics(RUN, 1, None, {"eval_loss": 3.0})
    lines = standing(store).lines
    assert [line.held_out_loss for line in lines] == [3.25, 3.0, None]
    assert not lines[-1].committed


def test_progress_counts_committed_rounds_and_the_open_ones_steps(store: Store) -> None:
    begin(store)
    assert standing(store).share == 0.0
    play_first_round(store)
    assert standing(store).share == 0.5
    attempt = store.open_round(RUN, 2, NODES)
    store.record_progress(
        RUN, 2, attempt, phase="training", replies=0, steps=15, tokens=300, received_bytes=9, sent_bytes=9
    )
    assert standing(store).share == pytest.approx((1 + 15 / 30) / 2)
    store.finish_run(RUN, "finished")
    assert standing(store).share == 1.0


def test_an_aborted_attempt_gives_way_to_the_next(store: Store) -> None:
    begin(store)
    attempt = store.open_round(RUN, 1, NODES)
    store.abort_round(RUN, 1, attempt, "no quorum")
    store.open_round(RUN, 1, NODES[:2])
    assert [(line.number, line.asked) for line in standing(store).lines] == [(1, 2)]


def test_a_look_reads_no_client_by_client_however_many_there_are(store: Store) -> None:
    begin(store)
    play_first_round(store)
    store.record_metrics(RUN, 1, None, {"eval_loss": 3.0})
    for node in NODES:
        store.record_metrics(RUN, 1, node, {"eval_loss": 3.0})
    read: list[tuple[object, ...]] = []

    def note(row: schema.Metric | schema.Participation, _: object) -> None:
        read.append((row.number, row.name) if isinstance(row, schema.Metric) else ("participation",))

    kinds = (schema.Metric, schema.Participation)
    for kind in kinds:
        event.listen(kind, "load", note)
    try:
        standing(store)
    finally:
        for kind in kinds:
            event.remove(kind, "load", note)
    assert sorted(read) == [(0, "eval_loss"), (1, "eval_loss"), (1, "train_loss")]


def test_without_a_terminal_each_thing_is_said_once(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    begin(store)
    play_first_round(store)
    with display() as show:
        for _ in range(3):
            show(standing(store))
    assert capsys.readouterr().err.splitlines() == [
        f"run {RUN}",
        "before round 1: held-out loss 3.250",
        "round 1/2: 3 clients asked",
        "round 1/2: 2/3 replied, train loss 2.500, 150 tokens/s, 4 kB on the wire, 4.0 s",
    ]


def test_the_table_shows_every_line(store: Store) -> None:
    begin(store)
    play_first_round(store)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(round_table(standing(store)))
    rows = [line.split() for line in capture.get().splitlines()]
    assert rows[1] == ["start", "3.250"]
    assert rows[2] == ["1", "2/3", "2.500", "150", "4", "kB", "4.0"]
    assert "50 % of 2 rounds" in capture.get()


@pytest.mark.parametrize(("size", "said"), [(0, "0 B"), (999, "999 B"), (1_500, "2 kB"), (2_500_000, "2.5 MB")])
def test_sizes_are_for_people(size: int, said: str) -> None:
    assert wire_size(size) == said
