import numpy as np
import pytest

from contract.errors import ConfigError
from privacy.masking import Mask, RowMask
from tests.privacy.streams import stream_of


def gradient(seed: int, batch: int = 3, tokens: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, tokens, 5)).astype(np.float32)


@pytest.mark.parametrize("mask", ["random", "top-k"])
def test_every_row_sends_its_share_of_values_and_the_others_are_exact_zeros(mask: Mask) -> None:
    grad_BTD = gradient(0)
    masked_BTD, sent_BTD = RowMask(mask, 0.25, stream_of(1)).apply(grad_BTD, [4, 5, 6])
    assert (sent_BTD.sum(axis=(1, 2)) == 5).all()
    assert np.array_equal(masked_BTD[sent_BTD], grad_BTD[sent_BTD])
    assert (masked_BTD[~sent_BTD] == 0.0).all()
    assert masked_BTD.dtype == np.float32


def test_top_k_sends_the_largest_values_of_each_row() -> None:
    grad_BTD = gradient(1)
    _, sent_BTD = RowMask("top-k", 0.25, stream_of(1)).apply(grad_BTD, [0, 1, 2])
    for grad_TD, sent_TD in zip(np.abs(grad_BTD), sent_BTD, strict=True):
        assert grad_TD[sent_TD].min() > grad_TD[~sent_TD].max()


def test_a_random_mask_is_another_one_each_time_and_takes_every_place_alike() -> None:
    mask = RowMask("random", 0.3, stream_of(2))
    ones_BTD = np.ones((500, 4, 5), dtype=np.float32)
    _, sent_BTD = mask.apply(ones_BTD, range(500))
    often_TD = sent_BTD.mean(axis=0)
    assert np.abs(often_TD - 0.3).max() < 4.5 * np.sqrt(0.3 * 0.7 / 500)


@pytest.mark.parametrize("mask", ["random", "top-k"])
def test_what_is_held_back_comes_with_the_same_rows_next_gradient(mask: Mask) -> None:
    row_mask = RowMask(mask, 0.2, stream_of(3))
    first_BTD, _ = row_mask.apply(gradient(2), [7, 8, 9])
    second_BTD, sent_BTD = row_mask.apply(np.zeros((1, 4, 5), dtype=np.float32), [8])
    held_TD = gradient(2)[1] - first_BTD[1]
    assert np.array_equal(second_BTD[0], np.where(sent_BTD[0], held_TD, 0.0))
    total_BTD = first_BTD[1:2] + second_BTD
    for _ in range(20):
        total_BTD = total_BTD + row_mask.apply(np.zeros((1, 4, 5), dtype=np.float32), [8])[0]
    if mask == "top-k":
        assert np.array_equal(total_BTD[0], gradient(2)[1])


def test_a_row_in_a_batch_of_another_length_takes_its_first_positions() -> None:
    row_mask = RowMask("top-k", 0.05, stream_of(4))
    grad_BTD = np.arange(1.0, 21.0, dtype=np.float32).reshape(1, 4, 5)
    row_mask.apply(grad_BTD, [1])
    shorter_BTD, _ = row_mask.apply(np.zeros((1, 2, 5), dtype=np.float32), [1])
    assert shorter_BTD.max() == 10.0
    longer_BTD, _ = row_mask.apply(np.zeros((1, 6, 5), dtype=np.float32), [1])
    assert longer_BTD.max() == 9.0


def test_memory_is_bounded_and_the_row_that_came_longest_ago_loses_its_residual() -> None:
    row_mask = RowMask("top-k", 0.05, stream_of(5), residual_bytes=2 * 20 * 4)
    for row in (1, 2, 1, 3):
        row_mask.apply(gradient(row, batch=1), [row])
    nothing_BTD = np.zeros((1, 4, 5), dtype=np.float32)
    assert not row_mask.apply(nothing_BTD, [2])[0].any()
    assert row_mask.apply(nothing_BTD, [1])[0].any()
    assert row_mask.apply(nothing_BTD, [3])[0].any()


def test_keeping_all_changes_nothing_and_holds_nothing_back() -> None:
    for mask in (RowMask("none", 0.1, stream_of(6)), RowMask("top-k", 1.0, stream_of(6))):
        masked_BTD, sent_BTD = mask.apply(gradient(3), [0, 1, 2])
        assert np.array_equal(masked_BTD, gradient(3))
        assert sent_BTD.all()


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(keep: float) -> None:
    with pytest.raises(ConfigError, match="gradient-mask-keep is"):
        RowMask("random", keep, stream_of(7))
