"""What a run says of its channels: never an epsilon for who sees one that nothing prices."""

from __future__ import annotations

import pytest

from contract.config import ConfigValue, RunConfig
from contract.privacy_records import ADVERSARIES, CHANNELS
from privacy.coverage import (
    ASSUMPTIONS,
    IN_WORDS,
    READS_TEXT,
    adjacency_in_words,
    coverage,
    told_privacy,
    uncovered,
    withheld,
    withheld_by_rows,
)
from privacy.plan import round_releases

OFF: dict[str, ConfigValue] = {}
CLIENT: dict[str, ConfigValue] = {"dp": "client", "trunk-adapter": "frozen"}
EXAMPLE: dict[str, ConfigValue] = {"dp": "example", "trunk-adapter": "frozen"}
WIRE: dict[str, ConfigValue] = {**EXAMPLE, "wire": "dp", "metrics": "off"}
TRAINED: dict[str, ConfigValue] = {**WIRE, "trunk-adapter": "trained"}
EMPIRICAL: dict[str, ConfigValue] = {"wire": "empirical", "wire-noise": 0.5}


def config(base: dict[str, ConfigValue], **changed: ConfigValue) -> RunConfig:
    return RunConfig.from_flower({**base, **{name.replace("_", "-"): value for name, value in changed.items()}})


@pytest.mark.parametrize(
    ("base", "ways"),
    [
        (OFF, ("unpriced", "unpriced", "unpriced", "unpriced", "unpriced")),
        (CLIENT, ("unpriced", "unpriced", "not sent", "priced", "unpriced")),
        ({**EXAMPLE, "metrics": "off"}, ("unpriced", "unpriced", "not sent", "priced", "not sent")),
        (EMPIRICAL, ("unpriced", "unpriced", "unpriced", "unpriced", "unpriced")),
        (WIRE, ("priced", "priced", "not sent", "priced", "not sent")),
        (TRAINED, ("priced", "priced", "post-processing of the wire", "priced", "not sent")),
    ],
)
def test_every_channel_is_told_once(base: dict[str, ConfigValue], ways: tuple[str, ...]) -> None:
    found = coverage(config(base))
    assert tuple(one.channel for one in found) == CHANNELS
    assert tuple(one.how for one in found) == ways


@pytest.mark.parametrize("base", [OFF, CLIENT, EXAMPLE, EMPIRICAL, WIRE, TRAINED])
def test_what_is_called_priced_is_charged_to_exactly_those_who_see_it(base: dict[str, ConfigValue]) -> None:
    of = config(base)
    charged = {one.channel: set(one.views) for one in round_releases(of, scale=1024.0, size=10)}
    assert charged == {one.channel: set(one.seen_by) for one in coverage(of) if one.how == "priced"}


@pytest.mark.parametrize(
    ("base", "holder", "orchestrator", "trunk"),
    [
        (OFF, "dp is off", "dp is off", READS_TEXT),
        (EMPIRICAL, "dp is off", "dp is off", "is measured by `trunkline audit run`"),
        (CLIENT, None, "totals of losses and counts have no noise", READS_TEXT),
        ({**CLIENT, "metrics": "off"}, None, None, READS_TEXT),
        ({**EXAMPLE, **EMPIRICAL}, None, "totals of losses", "is measured by `trunkline audit run`"),
        (WIRE, None, None, None),
        (TRAINED, None, None, None),
    ],
)
def test_an_epsilon_is_withheld_from_whoever_sees_an_unpriced_channel(
    base: dict[str, ConfigValue], holder: str | None, orchestrator: str | None, trunk: str | None
) -> None:
    for adversary, why in zip(ADVERSARIES, (holder, orchestrator, trunk), strict=True):
        found = withheld(config(base), adversary)
        assert (found is None) == (why is None), adversary
        assert why is None or why in (found or "")


@pytest.mark.parametrize(
    ("base", "orchestrator", "trunk"),
    [
        (CLIENT, "whether losses and counts were told", "was not charged for"),
        (EXAMPLE, "whether losses and counts were told", "was not charged for"),
        (WIRE, None, None),
        (TRAINED, None, None),
    ],
)
def test_where_only_charges_are_known_what_they_leave_open_is_withheld(
    base: dict[str, ConfigValue], orchestrator: str | None, trunk: str | None
) -> None:
    releases = round_releases(config(base), scale=1024.0, size=10)
    for adversary, why in zip(ADVERSARIES, (None, orchestrator, trunk), strict=True):
        found = withheld_by_rows(releases, adversary)
        assert (found is None) == (why is None), adversary
        assert why is None or why in (found or "")


def test_every_epsilon_is_told_with_its_adversary_and_what_it_hides() -> None:
    told = told_privacy(config(EXAMPLE), {"holder": 3.2, "orchestrator": 3.2})
    assert told == [
        "epsilon 3.2 at delta 1e-05 for who holds the released adapter (one row of a client's text, absent or present)",
        "the orchestrator and the other clients: no epsilon: totals of losses and counts have no noise",
        "the trunk: no epsilon: the server can read the text",
    ]
    told = told_privacy(config(WIRE), {"holder": 1.0, "orchestrator": 1.0, "trunk": 7.99993})
    assert told[2] == "epsilon 8 at delta 1e-05 for the trunk (one row of a client's text, or another in its place)"
    assert "all of a client's text, absent or present" in told_privacy(config(CLIENT), {})[0]
    assert adjacency_in_words(config(CLIENT), "orchestrator") == "all of a client's text, absent or present"


@pytest.mark.parametrize("base", [OFF, CLIENT, EXAMPLE])
def test_with_the_wire_off_the_summary_says_that_the_server_can_read_the_text(base: dict[str, ConfigValue]) -> None:
    assert "the server can read the text" in "\n".join(told_privacy(config(base), {}))


def test_lengths_are_uncovered_unless_they_are_all_the_same() -> None:
    assert any("how long each row is: the trunk" in line for line in uncovered(config(OFF)))
    assert any("in steps of 32 tokens" in line for line in uncovered(config(WIRE, wire_length_bucket=32)))
    padded = {"wire_length_bucket": 128, "max_length": 128}
    assert not any("how long each row is" in line for line in uncovered(config(WIRE, **padded)))
    assert any("padding can be told from text" in line for line in uncovered(config(OFF, **padded)))


def test_what_ghost_norms_assume_is_said() -> None:
    assert any("ghost norms" in line for line in uncovered(config(EXAMPLE, dp_gradients="ghost")))
    assert not any("ghost norms" in line for line in uncovered(config(EXAMPLE)))


def test_what_is_never_covered_is_listed_always() -> None:
    for base in (OFF, CLIENT, WIRE):
        text = "\n".join(uncovered(config(base)))
        for line in ("batch sizes", "timing", "who takes part", "failure"):
            assert line in text
    assert any("Poisson draws independent" in line for line in uncovered(config(EXAMPLE)))


def test_assumptions_are_told_with_every_epsilon() -> None:
    assert not any("assumed" in line for line in uncovered(config(OFF)))
    for base in (CLIENT, EXAMPLE, WIRE):
        assert {f"assumed: {line}" for line in ASSUMPTIONS} <= set(uncovered(config(base)))
    assert any("not chosen by the losses" in line for line in uncovered(config(EXAMPLE)))
    assert not any("not chosen by the losses" in line for line in uncovered(config(WIRE)))
    assert any("the trunk answers each client from that client alone" in line for line in uncovered(config(CLIENT)))
    assert any("at most 3 of a sum's clients" in line for line in uncovered(config(CLIENT, dp_colluders=3)))


@pytest.mark.parametrize(
    ("base", "rests_on_it"), [(CLIENT, False), (EXAMPLE, True), ({**EXAMPLE, **EMPIRICAL}, True), (WIRE, True)]
)
def test_a_row_priced_by_its_own_gradient_rests_on_a_trunk_that_does_not_mix_rows(
    base: dict[str, ConfigValue], rests_on_it: bool
) -> None:
    line = "assumed: the trunk computes rows apart and keeps no memory between batches: one that mixes them "
    assert any(told.startswith(line) for told in uncovered(config(base))) == rests_on_it


def test_where_everybody_pays_for_the_noised_rows_the_trunk_may_mix_them() -> None:
    """Then all that a row can do by way of the trunk is post-processing of what was charged, draw and all."""
    for release in round_releases(config(TRAINED), scale=None, size=10):
        assert set(release.views) == set(ADVERSARIES)
        assert {view.sampling_rate for view in release.views.values()} == {"1"}
    assert not any("computes rows apart" in line for line in uncovered(config(TRAINED)))


def test_adversaries_have_names_in_words() -> None:
    assert tuple(IN_WORDS) == ADVERSARIES
