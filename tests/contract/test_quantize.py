"""int8 per token with outlier channels kept apart: how far off it may be, its exact size, and what is refused."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import codec, quantize
from contract.errors import FrameError, NonFiniteError
from contract.trunk_pb2 import TensorHeader

HIDDEN = 64
APART = (3, 17, 40)


def gaussian(positions: int, seed: int, hidden: int = HIDDEN) -> torch.Tensor:
    return torch.randn(positions, hidden, generator=torch.Generator().manual_seed(seed))


def with_outliers(positions: int = 8, seed: int = 0) -> torch.Tensor:
    values_ND = gaussian(positions, seed)
    values_ND[:, list(APART)] += 60
    return values_ND


def there_and_back(values_ND: torch.Tensor) -> tuple[torch.Tensor, int]:
    data, apart = quantize.pack(values_ND)
    assert len(data) == quantize.size_bytes(*values_ND.shape, apart)
    return quantize.unpack(data.numpy().data, *values_ND.shape, apart), apart


@given(
    positions=st.integers(1, 9),
    hidden=st.integers(1, 70),
    seed=st.integers(0, 999),
    magnitude=st.sampled_from([1e-30, 1e-6, 1.0, 1e30]),
    outliers=st.integers(0, 6),
)
@settings(max_examples=150, deadline=None)
def test_no_value_is_off_by_more_than_half_a_level_of_its_own_scale(
    positions: int, hidden: int, seed: int, magnitude: float, outliers: int
) -> None:
    values_ND = gaussian(positions, seed, hidden) * magnitude
    values_ND[:, : min(outliers, hidden)] *= 60
    back_ND, apart = there_and_back(values_ND)
    assert apart <= hidden // 16
    level_N1 = values_ND.abs().amax(1, keepdim=True) / 127
    assert bool(((back_ND - values_ND).abs() <= 0.5001 * level_N1).all())


@given(positions=st.integers(4, 12), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_planted_outliers_are_kept_apart_and_spoil_no_other_channel(positions: int, seed: int) -> None:
    values_ND = with_outliers(positions, seed)
    back_ND, apart = there_and_back(values_ND)
    assert apart == len(APART)
    others = [channel for channel in range(HIDDEN) if channel not in APART]
    error_ND = (back_ND - values_ND).abs()
    level_N1 = values_ND[:, others].abs().amax(1, keepdim=True) / 127
    fine_N1 = values_ND[:, list(APART)].abs().amax(1, keepdim=True) / 32639
    assert bool((error_ND[:, others] <= 0.5001 * level_N1).all())
    assert bool((error_ND[:, list(APART)] <= 0.51 * fine_N1).all())


def test_outliers_show_even_where_tokens_differ_by_orders_of_magnitude() -> None:
    values_ND = with_outliers(16)
    values_ND[3] *= 1e6
    values_ND[4] *= 1e-6
    assert there_and_back(values_ND)[1] == len(APART)


def test_at_most_a_sixteenth_of_the_channels_is_kept_apart() -> None:
    values_ND = gaussian(8, 0)
    values_ND[:, :20] *= 60
    assert there_and_back(values_ND)[1] == HIDDEN // 16


def test_rounding_is_half_to_even_and_the_same_every_time() -> None:
    values_ND = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    back_ND, _ = there_and_back(values_ND)
    assert back_ND.tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -126.0]]
    assert torch.equal(quantize.pack(with_outliers())[0], quantize.pack(with_outliers())[0])


def test_zeros_and_what_float32_can_barely_hold_come_back_as_they_can() -> None:
    values_ND = torch.zeros(3, HIDDEN)
    values_ND[1, 5] = 1e-45
    values_ND[2] = 1.0
    back_ND, _ = there_and_back(values_ND)
    assert not back_ND[:2].any()
    assert torch.allclose(back_ND[2], values_ND[2], rtol=1e-6)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 8 + 2])
def test_a_forged_scale_that_is_no_number_is_refused(scale: float, place: int) -> None:
    data, apart = quantize.pack(with_outliers())
    forged = bytearray(data.numpy())
    struct.pack_into("<f", forged, 4 * place, scale)
    with pytest.raises(NonFiniteError, match="scale is a NaN or an infinity"):
        quantize.unpack(memoryview(forged), 8, HIDDEN, apart)


def test_a_negative_scale_is_refused() -> None:
    data, apart = quantize.pack(with_outliers())
    forged = bytearray(data.numpy())
    struct.pack_into("<f", forged, 0, -1.0)
    with pytest.raises(FrameError, match="scale is negative"):
        quantize.unpack(memoryview(forged), 8, HIDDEN, apart)


@pytest.mark.parametrize("channels", [(17, 3, 40), (3, 3, 40), (3, 17, HIDDEN), (3, 17, 2**31), (2**32 - 1, 3, 17)])
def test_forged_channels_are_refused(channels: tuple[int, int, int]) -> None:
    data, apart = quantize.pack(with_outliers())
    forged = bytearray(data.numpy())
    struct.pack_into("<3I", forged, 2 * 4 * 8, *channels)
    with pytest.raises(FrameError, match="must ascend, each once, from 0 to 63"):
        quantize.unpack(memoryview(forged), 8, HIDDEN, apart)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_bytes_of_the_right_size_decode_or_are_refused(data: st.DataObject) -> None:
    positions, apart = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2))
    size = quantize.size_bytes(positions, 32, apart)
    forged = data.draw(st.binary(min_size=size, max_size=size))
    try:
        back_ND = quantize.unpack(memoryview(bytearray(forged)), positions, 32, apart)
    except FrameError:
        return
    assert back_ND.shape == (positions, 32)


def announced(size_bytes: int, outlier_channels: int, codec_name: str = "int8") -> TensorHeader:
    return TensorHeader(
        dtype="float32",
        shape=(2, 4, HIDDEN),
        size_bytes=size_bytes,
        codec=codec_name,
        outlier_channels=outlier_channels,
    )


def check(header: TensorHeader, mask_BT: torch.Tensor | None = None) -> None:
    codec.check_header(
        header, codecs=codec.CODECS, hidden_size=HIDDEN, max_tokens=16, what="forward.hidden", mask_BT=mask_BT
    )


@pytest.mark.parametrize(
    ("header", "line"),
    [
        (announced(8 * 68, 1), "size_bytes is 544; .* by codec int8 takes 588"),
        (announced(8 * 68 + 1, 0), "size_bytes is 545; .* takes 544"),
        (announced(8 * 68, 5), "outlier_channels is 5; codec int8 keeps at most 4 of 64 apart"),
        (announced(8 * 68, 2**32 - 1), "outlier_channels is 4294967295"),
        (announced(8 * 64 * 4, 1, "identity"), "outlier_channels is 1; codec identity keeps at most 0 of 64 apart"),
    ],
)
def test_a_header_whose_size_is_another_is_refused_before_memory_is_taken(header: TensorHeader, line: str) -> None:
    with pytest.raises(FrameError, match=f"^forward.hidden: {line}"):
        check(header)


@given(seed=st.integers(0, 999), outliers=st.booleans(), dtype=st.sampled_from(sorted(codec.DTYPES)))
@settings(max_examples=40, deadline=None)
def test_a_padded_batch_by_int8_passes_the_check_and_padding_is_not_sent(seed: int, outliers: bool, dtype: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.randint(0, 2, (2, 4), generator=generator)
    values_ND = with_outliers(8, seed) if outliers else gaussian(8, seed)
    tensor_BTD = values_ND.view(2, 4, HIDDEN).to(codec.DTYPES[dtype])
    header, data = codec.encode(tensor_BTD, "int8", mask_BT)
    check(header, mask_BT)
    positions = codec.sent_positions(mask_BT, tensor_BTD.shape)
    assert len(data) == codec.encoded_bytes(positions, HIDDEN, dtype, "int8", header.outlier_channels)
    back_BTD = codec.decode(header, memoryview(bytearray(data)), mask_BT)
    assert back_BTD.dtype == tensor_BTD.dtype
    sent_BT = mask_BT.flip(1).cummax(1).values.flip(1).bool()
    assert not back_BTD[~sent_BT].any()
    spread = (back_BTD - tensor_BTD)[sent_BT].float().abs().amax() if positions else torch.zeros(())
    assert float(spread) <= 0.012 * float(tensor_BTD.float().abs().max())


def test_a_truncated_payload_is_refused() -> None:
    header, data = codec.encode(with_outliers().view(2, 4, HIDDEN), "int8")
    with pytest.raises(FrameError, match=f"a tensor has {len(data) - 1} bytes; its header says {len(data)}"):
        codec.decode(header, memoryview(bytearray(data))[:-1])
