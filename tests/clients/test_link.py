"""What `auto` picks on simulated links, and that named codecs are what the trunk must take."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.link import AUTO_CODECS, DECISION_EVERY, FIRST_DECISION, CodecPolicy, Direction, Exchange, WireCodecs
from contract.codec import CODECS
from contract.errors import AgreementError, ConfigError, ConnectionFailedError

SIZES = {"identity": 1_048_576, "bf16": 524_288, "fp16": 524_288, "int8": 264_192}
MBIT = 1e6 / 8
AUTO = WireCodecs("auto", "auto")


@dataclass
class Link:
    """A link on which microbatches go `in_flight` at once, or alone when asked: `rate` in bytes a second each way."""

    rate: float
    round_trip_s: float = 0.02
    client_s: float = 0.05
    trunk_s: float = 0.05
    in_flight: int = 1
    now_s: float = 0.0

    def train(self, policy: CodecPolicy, microbatches: int) -> None:
        for _ in range(microbatches):
            if self.in_flight > 1 and not policy.wanted_alone:
                for began in [policy.begins() for _ in range(self.in_flight)]:
                    policy.ends(began, "backward", crowded)
                continue
            for direction in ("forward", "backward"):
                self.now_s += self.client_s / 2
                size = SIZES[getattr(policy.now, direction)]
                started_s = self.now_s
                answered_s = started_s + self.round_trip_s + size / self.rate + self.trunk_s / 2
                self.now_s = answered_s + size / self.rate
                exchange = Exchange(SIZES, size, size, started_s, answered_s, self.now_s, self.trunk_s / 2)
                tell(policy, direction, exchange)  # type: ignore[arg-type]

    def policy(self, asked: WireCodecs = AUTO, accepted: tuple[str, ...] = CODECS) -> CodecPolicy:
        return CodecPolicy(asked, accepted, lambda: self.round_trip_s)


def crowded() -> Exchange:
    raise AssertionError("an exchange beside others tells nothing of the link")


def tell(policy: CodecPolicy, direction: Direction, exchange: Exchange) -> None:
    policy.ends(policy.begins(), direction, lambda: exchange)


@pytest.mark.parametrize(
    ("mbit", "picked"),
    [(20_000, "identity"), (5000, "identity"), (2500, "bf16"), (1200, "int8"), (100, "int8"), (5, "int8")],
)
def test_one_by_one_the_least_lossy_codec_that_adds_no_more_than_5_percent_is_picked(mbit: int, picked: str) -> None:
    link = Link(mbit * MBIT)
    policy = link.policy()
    link.train(policy, 80)
    assert policy.now == WireCodecs(picked, picked)


@pytest.mark.parametrize(
    ("mbit", "picked"), [(1000, "identity"), (500, "identity"), (200, "bf16"), (100, "int8"), (5, "int8")]
)
def test_bytes_that_are_hidden_behind_work_cost_nothing(mbit: int, picked: str) -> None:
    link = Link(mbit * MBIT, in_flight=16)
    policy = link.policy()
    link.train(policy, 200)
    assert policy.now == WireCodecs(picked, picked)


def test_a_long_round_trip_alone_is_no_reason_to_lose_bits() -> None:
    link = Link(10_000 * MBIT, round_trip_s=0.3)
    policy = link.policy()
    link.train(policy, 80)
    assert policy.now == WireCodecs("identity", "identity")


def test_it_begins_without_loss_and_follows_a_link_that_changes_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    link = Link(20_000 * MBIT)
    policy = link.policy()
    assert policy.now.forward == "identity"
    with caplog.at_level(logging.INFO, "trunkline.clients"):
        link.train(policy, 80)
        assert policy.now.forward == "identity"
        link.rate = 5 * MBIT
        link.train(policy, 3 * DECISION_EVERY)
        assert policy.now.forward == "int8"
        link.rate = 20_000 * MBIT
        link.train(policy, 3 * DECISION_EVERY)
        assert policy.now.forward == "identity"
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "codec auto: int8 after identity: " in told
    assert all(part in told for part in ("Mbit/s up", "round trip 20 ms", "here and 50 ms at the trunk"))
    assert "codec auto: identity after int8" in told


def test_a_link_at_the_limit_does_not_change_codecs_all_the_time() -> None:
    link = Link(3600 * MBIT)
    policy = link.policy()
    seen = []
    for turn in range(60):
        link.rate = (3600 + (150 if turn % 2 else -150)) * MBIT
        link.train(policy, 2 * DECISION_EVERY)
        seen.append(policy.now)
    assert sum(a != b for a, b in zip(seen, seen[1:], strict=False)) <= 1


@given(
    mbit=st.floats(0.1, 1e5),
    round_trip_s=st.floats(0, 1),
    client_s=st.floats(0, 2),
    trunk_s=st.floats(0, 2),
    in_flight=st.integers(1, 16),
)
@settings(max_examples=80, deadline=None)
def test_a_faster_link_is_never_given_a_lossier_codec(
    mbit: float, round_trip_s: float, client_s: float, trunk_s: float, in_flight: int
) -> None:
    picked = []
    for factor in (1, 4):
        link = Link(factor * mbit * MBIT, round_trip_s, client_s, trunk_s, in_flight)
        policy = link.policy()
        link.train(policy, 80)
        picked.append(AUTO_CODECS.index(policy.now.forward))
    assert picked[1] <= picked[0]


def test_microbatches_are_wanted_alone_at_first_and_now_and_then_but_only_by_auto() -> None:
    link = Link(5 * MBIT, in_flight=4)
    policy = link.policy()
    assert policy.wanted_alone == FIRST_DECISION
    link.train(policy, 1)
    assert policy.wanted_alone == FIRST_DECISION - 1
    wanted = []
    for _ in range(3 * DECISION_EVERY):
        link.train(policy, 1)
        wanted.append(policy.wanted_alone)
    assert 1 <= sum(wanted) <= 3 * 4 + 1
    assert CodecPolicy(WireCodecs(), CODECS, never).wanted_alone == 0


def test_auto_for_one_direction_leaves_the_other_as_it_is_named() -> None:
    link = Link(5 * MBIT)
    policy = link.policy(WireCodecs("auto", "fp16"))
    link.train(policy, 8)
    assert policy.now == WireCodecs("int8", "fp16")


def test_auto_picks_only_what_the_trunk_takes() -> None:
    link = Link(5 * MBIT)
    policy = link.policy(accepted=("identity", "bf16"))
    link.train(policy, 8)
    assert policy.now == WireCodecs("bf16", "bf16")


def never() -> float:
    raise AssertionError("a named codec needs no measurement")


def test_named_codecs_stay_and_nothing_is_measured_for_them() -> None:
    policy = CodecPolicy(WireCodecs("bf16", "int8"), CODECS, never)
    Link(1.0).train(policy, 20)
    assert policy.now == WireCodecs("bf16", "int8")


@pytest.mark.parametrize("held_s", [math.nan, math.inf, -1.0, 1e300])
def test_a_trunk_that_lies_about_its_time_breaks_nothing(held_s: float) -> None:
    policy = CodecPolicy(AUTO, CODECS, lambda: 0.0)
    for number in range(20):
        exchange = Exchange(SIZES, 100, 100, number, number + 0.1, number + 0.2, held_s)
        tell(policy, "forward", exchange)
        tell(policy, "backward", exchange)
    assert policy.now.forward in AUTO_CODECS


def test_a_round_trip_that_cannot_be_measured_ends_no_training() -> None:
    def fails() -> float:
        raise ConnectionFailedError("nothing answers")

    link = Link(5 * MBIT)
    policy = CodecPolicy(AUTO, CODECS, fails)
    link.train(policy, 8)
    assert policy.now.forward == "int8"


def test_a_gradient_that_is_not_asked_for_counts_in_one_direction_only() -> None:
    policy = CodecPolicy(AUTO, CODECS, lambda: 0.0)
    for number in range(20):
        forward = Exchange(SIZES, 100, 100, number, number + 0.1, number + 0.1, 0.1)
        tell(policy, "forward", forward)
        tell(policy, "backward", Exchange(SIZES, 100, 0, number + 0.5, number + 0.6, number + 0.6, 0.1))
    assert policy.now.forward == "identity"


@pytest.mark.parametrize(
    ("asked", "offered"),
    [
        (WireCodecs(), ["identity"]),
        (WireCodecs("int8", "bf16"), ["int8", "bf16"]),
        (WireCodecs("auto", "auto"), ["identity", "bf16", "int8"]),
        (WireCodecs("fp16", "auto"), ["fp16", "identity", "bf16", "int8"]),
    ],
)
def test_a_hello_offers_what_may_be_used(asked: WireCodecs, offered: list[str]) -> None:
    assert asked.offered() == offered


@pytest.mark.parametrize(
    ("asked", "accepted", "told"),
    [
        (WireCodecs("int8", "bf16"), ["bf16"], "are int8, bf16; of those the trunk at host:1 takes bf16"),
        (
            WireCodecs("identity", "int8"),
            ["identity"],
            "are identity, int8; of those the trunk at .* takes identity",
        ),
        (AUTO, [], "are identity, bf16, int8; of those the trunk at host:1 takes none"),
        (
            WireCodecs("fp16", "auto"),
            ["fp16"],
            "are fp16, identity, bf16, int8; of those .* takes fp16",
        ),
    ],
)
def test_a_trunk_that_does_not_take_them_is_told_with_both_lists(
    asked: WireCodecs, accepted: list[str], told: str
) -> None:
    with pytest.raises(AgreementError, match=told):
        asked.require_accepted(accepted, "host:1")


def test_auto_goes_on_with_a_trunk_that_knows_less() -> None:
    AUTO.require_accepted(["identity"], "host:1")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: WireCodecs.named("zip", "same", CODECS),
            "codec is 'zip'; it must be one of identity, bf16",
        ),
        (lambda: WireCodecs.named("bf16", "zip", CODECS), "codec-backward is 'zip'; it must be one of"),
        (lambda: WireCodecs.named("same", "bf16", CODECS), "codec is 'same'"),
    ],
)
def test_an_unknown_name_is_refused(make: Callable[[], WireCodecs], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make()
    assert WireCodecs.named("int8", "same", CODECS) == WireCodecs("int8", "int8")
