import ast
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from contract.errors import BudgetError, ConfigError, FrameError, NonFiniteError
from privacy.wire import Empirical, Off, WireDp, WireMechanism
from tests.privacy.streams import SilentStream, stream_of

PRIVACY = Path(__file__).parents[2] / "privacy"


def hidden(batch: int = 2, tokens: int = 50, width: int = 40, size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((batch, tokens, width)) * size).astype(np.float32)


def test_off_lets_the_very_value_pass_and_has_no_price() -> None:
    mechanism: WireMechanism = Off()
    value_BTD = hidden()
    assert mechanism.forward(value_BTD, [0, 1]) is value_BTD
    assert mechanism.backward(value_BTD, [0, 1]) is value_BTD
    assert not mechanism.events


def test_off_says_in_words_what_the_server_can_read() -> None:
    assert Off().summary == "wire privacy is off: the server can read the text"


def test_the_seam_needs_no_framework() -> None:
    allowed = {"__future__", "collections", "typing", "numpy", "contract", "privacy"}
    for name in ("wire", "masking", "gaussian"):
        tree = ast.parse((PRIVACY / f"{name}.py").read_text(encoding="utf-8"))
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert {module.split(".")[0] for module in imported} <= allowed | {"math"}


def test_empirical_noise_is_gaussian_and_in_proportion_to_each_row() -> None:
    value_BTD = hidden(batch=2, tokens=500, width=500)
    value_BTD[1] *= 100.0
    mechanism = Empirical(0.5, "none", 1.0, stream_of(1))
    for passed_BTD in (mechanism.forward(value_BTD, [0, 1]), mechanism.backward(value_BTD, [0, 1])):
        assert passed_BTD.dtype == np.float32
        for passed_TD, value_TD in zip(passed_BTD, value_BTD, strict=True):
            sigma = 0.5 * np.sqrt(np.mean(np.square(value_TD, dtype=np.float64)))
            noise = (passed_TD.astype(np.float64) - value_TD).reshape(-1) / sigma
            assert stats.kstest(noise, "norm").pvalue > 1e-4
            assert abs(noise.var() - 1.0) < 0.01


@pytest.mark.parametrize("mask", ["random", "top-k"])
def test_empirical_masks_the_gradient_only_and_leaves_exact_zeros_without_noise(mask: str) -> None:
    value_BTD = hidden()
    mechanism = Empirical(0.5, mask, 0.1, stream_of(2))  # type: ignore[arg-type]
    assert (mechanism.forward(value_BTD, [0, 1]) != 0.0).all()
    passed_BTD = mechanism.backward(value_BTD, [0, 1])
    assert ((passed_BTD != 0.0).sum(axis=(1, 2)) == 200).all()


def test_empirical_noise_is_not_fed_back() -> None:
    mechanism = Empirical(1000.0, "top-k", 0.5, stream_of(3))
    value_BTD = hidden(batch=1)
    first_BTD = mechanism.backward(value_BTD, [0])
    quiet_BTD = mechanism.backward(np.zeros_like(value_BTD), [0])
    held_BTD = np.where(first_BTD == 0.0, value_BTD, 0.0)
    assert np.array_equal(quiet_BTD, held_BTD)


def test_empirical_says_what_it_does_and_that_it_has_no_epsilon() -> None:
    both = Empirical(0.5, "top-k", 0.1, stream_of(4))
    assert "noise of 0.5 times a row's root mean square is added and the largest 0.1 of each gradient's" in both.summary
    assert "no epsilon" in both.summary and "`trunkline audit run`" in both.summary  # noqa: PT018
    assert "noise" not in Empirical(0.0, "random", 0.1, stream_of(4)).summary.split(";")[0]
    assert not both.events


def test_dp_clips_a_row_as_one_vector_and_adds_noise_of_the_told_size() -> None:
    mechanism = WireDp(2.0, 0.01, 5.0, 1, stream_of(5))
    for channel, one_way, clip in (
        ("wire_forward", mechanism.forward, 2.0),
        ("wire_backward", mechanism.backward, 0.01),
    ):
        value_BTD = hidden(batch=1, tokens=1000, width=1000)
        passed_BTD = one_way(value_BTD, [0])
        event = mechanism.events[channel]  # type: ignore[index]
        assert (event.number("clip"), event.number("noise_multiplier")) == (clip, 5.0)
        clipped_BTD = value_BTD * (clip / np.linalg.norm(value_BTD.astype(np.float64)))
        noise = (passed_BTD - clipped_BTD).reshape(-1).astype(np.float64) / (5.0 * clip)
        assert passed_BTD.dtype == np.float32
        assert stats.kstest(noise, "norm").pvalue > 1e-4
        assert abs(noise.var() - 1.0) < 0.01


def test_dp_keeps_what_a_row_says_where_the_noise_is_small() -> None:
    mechanism = WireDp(1.0, 1.0, 1e-6, 1, stream_of(6))
    value_BTD = hidden(size=1e-3)
    assert np.allclose(mechanism.forward(value_BTD, [0, 1]), value_BTD, atol=6e-6)


def test_a_row_is_sent_each_way_as_often_as_was_priced_and_no_more() -> None:
    mechanism = WireDp(1.0, 1.0, 1.0, 2, stream_of(7))
    value_BTD = hidden()
    mechanism.forward(value_BTD, [3, 4])
    mechanism.forward(value_BTD, [4, 5])
    mechanism.backward(value_BTD, [4, 4])
    with pytest.raises(BudgetError, match="head cut: row 4 would be sent 3 times in this round; wire-releases .* 2"):
        mechanism.forward(value_BTD, [3, 4])
    with pytest.raises(BudgetError, match="tail cut: row 4"):
        mechanism.backward(value_BTD, [5, 4])
    mechanism.forward(value_BTD, [3, 5])


def test_a_refused_batch_draws_nothing_and_counts_nothing() -> None:
    mechanism = WireDp(1.0, 1.0, 1.0, 1, SilentStream())
    with pytest.raises(BudgetError, match="row 8 would be sent 2 times"):
        mechanism.forward(hidden(batch=3), [1, 8, 8])
    bad_BTD = hidden()
    bad_BTD[1, 2, 3] = np.nan
    for one_way in (mechanism.forward, mechanism.backward):
        with pytest.raises(NonFiniteError, match=r"at the (head|tail) cut: a NaN or an infinity at \[1, 2, 3\]"):
            one_way(bad_BTD, [1, 8])
        with pytest.raises(AssertionError, match="were drawn"):  # neither refusal was counted as a release
            one_way(hidden(), [1, 8])


def test_a_release_that_failed_under_way_stays_counted() -> None:
    mechanism = WireDp(1.0, 1.0, 1.0, 1, SilentStream())
    with pytest.raises(AssertionError, match="were drawn"):
        mechanism.forward(hidden(), [1, 2])
    with pytest.raises(BudgetError):
        mechanism.forward(hidden(), [2, 3])


@pytest.mark.parametrize("kind", ["empirical", "dp"])
def test_values_that_are_not_finite_and_unnumbered_rows_are_refused(kind: str) -> None:
    stream = SilentStream()
    mechanism: WireMechanism = (
        WireDp(1.0, 1.0, 1.0, 9, stream) if kind == "dp" else Empirical(1.0, "random", 0.5, stream)
    )
    infinite_BTD = hidden()
    infinite_BTD[0, 0, 0] = np.inf
    for one_way in (mechanism.forward, mechanism.backward):
        with pytest.raises(NonFiniteError):
            one_way(infinite_BTD, [0, 1])
        with pytest.raises(FrameError, match="a batch of 2 rows came with 1 row numbers"):
            one_way(hidden(), [0])


def test_dp_says_what_is_clipped_and_noised_and_when_epsilon_is_told() -> None:
    summary = WireDp(1.0, 0.01, 5.0, 3, stream_of(8)).summary
    for words in ("clipped to 1 and its gradient to 0.01", "noise of 5 times", "at most 3 times a round", "epsilon"):
        assert words in summary


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf")])
def test_empirical_noise_that_is_no_number_is_refused(noise: float) -> None:
    with pytest.raises(ConfigError, match="wire-noise is"):
        Empirical(noise, "none", 1.0, stream_of(9))
