"""Each attack at the wire succeeds in clear and falls to guessing under noise; neither is left to chance here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from clients.audits.enumeration import Enumeration
from clients.audits.findings import CONTROL, Attack, Finding
from clients.audits.wire_bench import AuditRows, WireBench
from clients.data import IGNORED, TokenRow
from contract.config import ConfigValue, RunConfig
from tests.clients.audits.test_tap import DP, fixed
from tests.contract.families import VOCAB

WIRE: tuple[Attack, ...] = ("enumeration", "inversion", "labels")


def rows_of(count: int, seed: int, prompt: int = 0) -> list[TokenRow]:
    """Text in which some words are common, of two lengths; its first tokens are no labels."""
    draw = np.random.default_rng(seed)
    chances = 1.0 / np.arange(4, VOCAB + 1)
    rows = []
    for number in range(count):
        tokens_T = draw.choice(np.arange(3, VOCAB), size=(20, 32)[number % 2], p=chances / chances.sum()).astype(
            np.int32
        )
        labels_T = np.where(np.arange(len(tokens_T)) < prompt, IGNORED, tokens_T).astype(np.int32)
        rows.append(TokenRow(number, tokens_T, labels_T, False))
    return rows


@pytest.fixture(scope="module")
def bench(llama_dir: Path) -> WireBench:
    rows = AuditRows(audited=rows_of(16, seed=1, prompt=4), fitted=rows_of(200, seed=2), judged=rows_of(32, seed=3))
    return WireBench(llama_dir, RunConfig(), rows, seed=0, tell=lambda line: None, mechanism_of=fixed)


def found_in(
    bench: WireBench, mode: str, settings: dict[str, ConfigValue], attacks: Sequence[Attack] = WIRE, passes: int = 1
) -> dict[tuple[str, str], Finding]:
    found = bench.run(mode, RunConfig.from_flower(settings), passes, attacks)
    return {(one.attack, one.variant.partition(":")[0]): one for one in found}


def test_everything_is_read_in_clear(bench: WireBench) -> None:
    found = found_in(bench, CONTROL, {})
    assert {attack for attack, _ in found} == set(WIRE)
    for (attack, variant), one in found.items():
        assert one.works, (attack, variant, one.value)
        assert one.value.value >= (0.95 if attack == "enumeration" else 0.8)
        assert one.above.lower > 0.5
    assert found["enumeration", "nearest state"].trials == 16 * 26
    assert found["labels", "alone"].trials == 16 * 22


def test_noise_of_epsilon_8_leaves_nothing_above_guessing(bench: WireBench) -> None:
    settings: dict[str, ConfigValue] = {**DP, "wire-noise-multiplier": 1.7, "wire-clip-forward": 0.5}
    for one in found_in(bench, "dp", settings).values():
        assert one.least is None
        assert one.above.lower <= 0.02, one
        assert one.above.value <= 0.06, one


def test_little_noise_is_seen_through_and_more_passes_see_further(bench: WireBench) -> None:
    """What the Bayesian attack is for: where the nearest state is often another token's, frequency helps."""
    noisy: dict[str, ConfigValue] = {"wire": "empirical", "wire-noise": 2.0}
    once = found_in(bench, "noise", noisy, ["enumeration", "inversion"])
    assert once["enumeration", "nearest state"].above.lower > 0.1
    assert once["enumeration", "with a prior"].value.value > once["enumeration", "nearest state"].value.value
    often = found_in(bench, "noise", noisy, ["enumeration", "inversion"], passes=9)
    for attack, one in often.items():
        assert one.value.value > once[attack].value.value


@pytest.mark.parametrize("mask", ["random", "top-k"])
def test_a_masked_gradient_still_tells_labels(mask: str, bench: WireBench) -> None:
    settings: dict[str, ConfigValue] = {"wire": "empirical", "gradient-mask": mask, "gradient-mask-keep": 0.3}
    for one in found_in(bench, "mask", settings, ["labels"]).values():
        assert one.above.lower > 0.2, one


def test_tokens_that_the_shortlist_lacks_are_found_among_all(bench: WireBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clients.audits.enumeration._SHORTLIST", 1)
    tried: list[int] = []
    every = Enumeration._all_distances

    def counted(self: Enumeration, *arguments: object) -> object:
        tried.append(1)
        return every(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Enumeration, "_all_distances", counted)
    found = found_in(bench, CONTROL, {}, ["enumeration"])
    assert found["enumeration", "nearest state"].value.value >= 0.99
    assert tried


def test_a_broken_attack_is_told(bench: WireBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if noise had got into the control: what fails there must not pass for privacy."""
    found = found_in(bench, CONTROL, {**DP, "wire-noise-multiplier": 5.0})
    assert not any(one.works for one in found.values())
