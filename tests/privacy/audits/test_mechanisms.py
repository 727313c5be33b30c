"""The audit of every priced mechanism through the calls of its client, and of mutants with less noise than they claim.

Error rates, over fresh keys: an honest mechanism is accused in 0.3 % of audits (by the method in at most 5 %); noise
divided by 1.1 gets away in fewer than 0.15 % at epsilon 4 and 8 (0 of 2,000; test_two_point.py has the counts). The
keys here are fixed. TRUNKLINE_AUDIT_TRIALS=20 repeats every case with as many keys; without, each has one, and the
mutants are tried where they are hardest to catch or cheap.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from aggregation.noisy_sum import NoisySum, plan_noisy_sum
from contract import codec
from contract.config import RunConfig
from contract.errors import ConfigError
from privacy.audits.mechanisms import (
    OUTPUTS,
    Passage,
    Scores,
    audit_mechanisms,
    share_scores,
    sum_scores,
    unit_direction,
    wire_scores,
)
from privacy.audits.two_point import audit_gaussian
from privacy.gaussian import GaussianSum
from privacy.gaussian_curve import gaussian_allowance
from privacy.skellam import Codes, SkellamShare, skellam_event
from privacy.wire import Singles, WireDp
from tests.privacy.streams import QuietStream, stream_of

DELTA = 1e-5
SIZE = 1000
CLIP = 0.7
TRIALS = int(os.environ.get("TRUNKLINE_AUDIT_TRIALS", "1"))
ALL = [(name, eps) for name in ("skellam", "dp-sgd", "wire_forward", "wire_backward") for eps in (4.0, 8.0)]
MUTANTS = ALL if TRIALS > 1 else [("skellam", 4.0), ("dp-sgd", 4.0), ("wire_forward", 4.0), ("wire_backward", 8.0)]


def through_codec(value_BTD: Singles) -> Singles:
    header, data = codec.encode(torch.from_numpy(value_BTD), "identity")
    return codec.decode(header, memoryview(bytearray(data)), "identity").numpy()


def through_ring(noisy: NoisySum, codes: Codes) -> Codes:
    return noisy.encode(codes)[:-1].view(f"i{noisy.bits // 8}").astype(np.int64)


def noise_multiplier(epsilon: float, sensitivity: float) -> float:
    return sensitivity / float(gaussian_allowance(epsilon, DELTA)) ** 0.5


def scores_of(name: str, epsilon: float, divisor: float, seed: int) -> Scores:
    """Of a mechanism that claims `epsilon`, with its noise divided by `divisor`."""
    direction_d = unit_direction(stream_of(seed), SIZE)
    if name == "skellam":
        claimed = noise_multiplier(epsilon, 1.0)
        noisy = plan_noisy_sum(10, 1, CLIP, claimed)
        event = skellam_event(claimed / divisor, CLIP, noisy.scale, SIZE)
        share = SkellamShare(event, 1, stream_of(seed + 1))
        return share_scores(share, lambda codes: through_ring(noisy, codes), direction_d, OUTPUTS)
    stream = QuietStream(seed, divisor)
    if name == "dp-sgd":
        return sum_scores(GaussianSum(CLIP, noise_multiplier(epsilon, 1.0), stream), CLIP, direction_d, OUTPUTS)
    mechanism = WireDp(CLIP, CLIP / 100, noise_multiplier(epsilon, 2.0), 1, stream)
    return wire_scores(mechanism, name, through_codec, direction_d, OUTPUTS)  # type: ignore[arg-type]


def bounds(name: str, epsilon: float, divisor: float) -> list[float]:
    first_seed = round(100_000 * divisor + 1000 * epsilon)
    seeds = range(first_seed, first_seed + 2 * TRIALS, 2)
    return [audit_gaussian(*scores_of(name, epsilon, divisor, seed), DELTA) for seed in seeds]


@pytest.mark.timeout(120 * max(TRIALS, 3))
@pytest.mark.parametrize(("name", "epsilon"), ALL)
def test_an_honest_mechanism_costs_no_more_than_it_claims(name: str, epsilon: float) -> None:
    lower = bounds(name, epsilon, 1.0)
    accused = sum(bound > epsilon for bound in lower)
    print(f"{name} at epsilon {epsilon:g}: accused {accused} of {TRIALS}, bounds from {min(lower):.2f}")  # noqa: T201
    assert accused <= TRIALS // 20
    assert min(lower) > 0.88 * epsilon  # and the audit sees nearly all of it


@pytest.mark.timeout(120 * max(TRIALS, 3))
@pytest.mark.parametrize(("name", "epsilon"), MUTANTS)
def test_noise_divided_by_one_point_one_is_caught(name: str, epsilon: float) -> None:
    caught = sum(bound > epsilon for bound in bounds(name, epsilon, 1.1))
    print(f"{name} at epsilon {epsilon:g}: caught {caught} of {TRIALS}")  # noqa: T201
    assert caught >= TRIALS * 19 / 20


def config_of(**settings: str | float) -> RunConfig:
    return RunConfig.from_flower({name.replace("_", "-"): value for name, value in settings.items()})


def passage(noisy: NoisySum) -> Passage:
    return Passage(through_codec, lambda codes: through_ring(noisy, codes), noisy.scale)


CLIENT = config_of(dp="client", dp_clip=CLIP, dp_noise_multiplier=0.9, trunk_adapter="frozen")
EXAMPLE = config_of(
    dp="example",
    dp_clip=CLIP,
    dp_noise_multiplier=0.9,
    wire="dp",
    wire_noise_multiplier=1.8,
    metrics="off",
)


def test_a_run_is_audited_for_what_it_names() -> None:
    noisy = plan_noisy_sum(3, 1, CLIP, 0.9)
    found = {
        name: audit_mechanisms(config, passage(noisy), stream_of(9), size=SIZE, outputs=1000)
        for name, config in (("off", config_of()), ("client", CLIENT), ("example", EXAMPLE))
    }
    assert found["off"] == ()
    assert [(row.channel, row.mechanism) for row in found["client"]] == [("adapter_sum", "skellam")]
    assert [(row.channel, row.mechanism) for row in found["example"]] == [
        ("adapter_sum", "gaussian"),
        ("wire_forward", "gaussian"),
        ("wire_backward", "gaussian"),
    ]
    for row in (*found["client"], *found["example"]):
        assert row.holds
        assert row.outputs == 1000
        assert row.epsilon_claimed == pytest.approx(4.947, abs=0.001)
        assert row.epsilon_lower > 0.5 * row.epsilon_claimed


def test_what_comes_after_a_mechanism_is_audited_with_it() -> None:
    noisy = plan_noisy_sum(3, 1, CLIP, 0.9)

    deaf = Passage(np.zeros_like, np.zeros_like, noisy.scale)
    for config in (CLIENT, EXAMPLE):
        rows = audit_mechanisms(config, deaf, stream_of(10), size=SIZE, outputs=1000)
        passed = [row for row in rows if row.mechanism == "skellam" or row.channel != "adapter_sum"]
        assert [row.epsilon_lower for row in passed] == [0.0] * len(passed)


def test_a_result_that_costs_more_than_it_claims_does_not_hold() -> None:
    after = passage(plan_noisy_sum(3, 1, CLIP, 0.9))
    rows = audit_mechanisms(EXAMPLE, after, QuietStream(12, 2.0), size=SIZE, outputs=2000)
    assert not any(row.holds for row in rows)


def test_a_release_too_small_to_audit_is_refused() -> None:
    with pytest.raises(ConfigError, match="an audit's size is 7; it must be at least 8"):
        audit_mechanisms(EXAMPLE, passage(plan_noisy_sum(3, 1, CLIP, 0.9)), stream_of(11), size=7)
