"""Tensors as bytes and back, and what is refused before memory is taken."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import codec
from contract.errors import FrameError, FrameTooLargeError, NonFiniteError
from contract.trunk_pb2 import TensorHeader

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
LARGEST_ERROR = {"identity": 0.0, "bf16": 0.0, "fp16": 2.0**-11, "int8": 0.5001 / 127}
"""Of one value, over the largest of its token; the tensors here are of values that bf16 holds."""
DTYPES = st.sampled_from(sorted(codec.DTYPES))


def random_tensor(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(codec.DTYPES[dtype])


def header(
    shape: tuple[int, ...] = (2, 3, 8),
    dtype: str = "float32",
    size_bytes: int | None = None,
    codec_name: str = "identity",
) -> TensorHeader:
    size = math.prod(shape) * codec.DTYPES["float32"].itemsize if size_bytes is None else size_bytes
    return TensorHeader(dtype=dtype, shape=shape, size_bytes=size, codec=codec_name)


def check(announced: TensorHeader, **changes: Any) -> None:
    codec.check_header(
        announced,
        **{"codecs": ("identity", "bf16"), "hidden_size": 8, "max_tokens": 16, "what": "forward.hidden", **changes},
    )


@given(shape=SHAPES, dtype=DTYPES, seed=st.integers(0, 99), chunk=st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_identity_gives_every_bit_back_in_chunks_of_any_size(
    shape: tuple[int, ...], dtype: str, seed: int, chunk: int
) -> None:
    tensor = random_tensor(shape, dtype, seed)
    announced, data = codec.encode(tensor, "identity")
    check(announced, hidden_size=shape[2], max_tokens=shape[0] * shape[1], shape=shape, dtypes=(dtype,))
    assembler = codec.Assembler(announced.size_bytes, "hidden")
    for start in range(0, len(data), chunk):
        assert not assembler.complete
        assembler.add(bytes(data[start : start + chunk]))
    back = codec.decode(announced, assembler.data())
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


@given(shape=SHAPES, dtype=DTYPES, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_bf16_rounds_to_bfloat16_once_and_keeps_the_dtype(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    tensor = random_tensor(shape, dtype, seed)
    announced, data = codec.encode(tensor, "bf16")
    check(announced, hidden_size=shape[2], max_tokens=shape[0] * shape[1])
    assert len(data) == 2 * tensor.numel()
    back = codec.decode(announced, bytearray(data))  # type: ignore[arg-type]
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor.to(torch.bfloat16).to(tensor.dtype))


def test_identity_shares_memory_and_needs_no_contiguous_tensor() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    announced, data = codec.encode(tensor, "identity")
    tensor[0, 0, 0] = 7.0
    assert codec.decode(announced, data)[0, 0, 0] == 7.0
    turned = tensor.transpose(0, 1)
    announced, data = codec.encode(turned, "identity")
    assert torch.equal(codec.decode(announced, data), turned)


def test_a_tensor_with_a_gradient_is_encoded() -> None:
    tensor = torch.ones(1, 2, 3, requires_grad=True) * 2
    announced, data = codec.encode(tensor, "identity")
    assert torch.equal(codec.decode(announced, data), torch.full((1, 2, 3), 2.0))


@pytest.mark.parametrize(
    ("announced", "changes", "error", "line"),
    [
        (header(dtype="int64"), {}, FrameError, "dtype is 'int64'"),
        (header(dtype="float16"), {"dtypes": ("float32",)}, FrameError, "dtype is 'float16'; it must be float32"),
        (header((2, 8)), {}, FrameError, r"shape is \[2, 8\]; it must be \[B, T, 8\]"),
        (header((2, 3, 9)), {}, FrameError, r"shape is \[2, 3, 9\]"),
        (header((0, 3, 8)), {}, FrameError, r"shape is \[0, 3, 8\]"),
        (header((4, 5, 8)), {}, FrameTooLargeError, "4 x 5 tokens are over the limit of 16"),
        (header((2, 3, 8)), {"shape": (3, 2, 8)}, FrameError, r"shape is \[2, 3, 8\]; it must be \[3, 2, 8\]"),
        (header(size_bytes=191), {}, FrameError, "size_bytes is 191; .* takes 192"),
        (header(size_bytes=1 << 60), {}, FrameError, "size_bytes is 1152921504606846976; .* takes 192"),
        (header(codec_name="bf16"), {}, FrameError, "size_bytes is 192; .* takes 96"),
        (
            header(codec_name="bf16"),
            {"codecs": ("identity",)},
            FrameError,
            "codec is 'bf16'; this session agreed on identity",
        ),
        (TensorHeader(codec="identity"), {}, FrameError, "dtype is ''"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(
    announced: TensorHeader, changes: dict[str, Any], error: type[FrameError], line: str
) -> None:
    with pytest.raises(error, match=f"^forward.hidden: {line}"):
        check(announced, **changes)


def test_a_fitting_header_is_accepted() -> None:
    check(header())
    check(header(size_bytes=96, codec_name="bf16"))


def test_more_data_than_announced_is_refused() -> None:
    assembler = codec.Assembler(4, "hidden")
    with pytest.raises(FrameTooLargeError, match="hidden: 5 bytes came; its header announced 4"):
        assembler.add(b"12345")


def test_less_data_than_announced_is_refused() -> None:
    assembler = codec.Assembler(4, "hidden")
    assembler.add(b"123")
    with pytest.raises(FrameError, match="hidden: truncated at byte 3 of 4"):
        assembler.data()
    with pytest.raises(FrameError, match="a tensor has 3 bytes; its header says 192"):
        codec.decode(header(), memoryview(b"123"))


def test_an_empty_chunk_is_refused_so_that_a_transfer_always_moves() -> None:
    with pytest.raises(FrameError, match="an empty chunk at byte 0 of 4"):
        codec.Assembler(4, "hidden").add(b"")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_non_finite_position_is_named(bad: float) -> None:
    tensor = torch.zeros(2, 3, 4)
    codec.require_finite(tensor, "grad")
    tensor[1, 2, 0] = bad
    with pytest.raises(NonFiniteError, match=r"grad: a NaN or an infinity at \[B, T\] = \[1, 2\]"):
        codec.require_finite(tensor, "grad")


def test_opposite_infinities_do_not_cancel_and_huge_numbers_are_no_infinity() -> None:
    with pytest.raises(NonFiniteError):
        codec.require_finite(torch.tensor([[[math.inf, -math.inf]]]), "grad")
    codec.require_finite(torch.full((1, 1, 4), 3e38), "grad")


@given(batch=st.integers(1, 5), tokens=st.integers(1, 19), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_masks_come_back(batch: int, tokens: int, seed: int) -> None:
    mask = torch.randint(0, 2, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(codec.unpack_mask(codec.pack_mask(mask), batch, tokens), mask)
    assert torch.equal(codec.unpack_mask(codec.pack_mask(mask.bool()), batch, tokens), mask)


def test_a_mask_that_is_no_mask_is_refused() -> None:
    with pytest.raises(FrameError, match=r"attention_mask of shape \[2, 1, 3, 3\]"):
        codec.pack_mask(torch.zeros(2, 1, 3, 3))
    with pytest.raises(FrameError, match="hold only 0 and 1"):
        codec.pack_mask(torch.tensor([[0.0, -1e9]]))
    with pytest.raises(FrameError, match="attention_mask_bits has 1 bytes; 3 x 3 bits take 2"):
        codec.unpack_mask(b"x", 3, 3)


def test_positions_come_back_for_one_row_or_for_all() -> None:
    one, every = torch.arange(3)[None], torch.tensor([[0, 1, 2], [0, 0, 1]])
    assert torch.equal(codec.unpack_positions(codec.pack_positions(one), 2, 3) + 0, one)  # type: ignore[operator]
    assert torch.equal(codec.unpack_positions(codec.pack_positions(every), 2, 3) + 0, every)  # type: ignore[operator]
    assert codec.unpack_positions([], 2, 3) is None
    with pytest.raises(FrameError, match="position_ids has 4 values; it must have none, 3 or 6"):
        codec.unpack_positions([1, 2, 3, 4], 2, 3)


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(FrameError, match=r"dtype is torch.int64"):
        codec.encode(torch.zeros(1, 1, 1, dtype=torch.int64), "identity")


@given(batch=st.integers(1, 4), tokens=st.integers(1, 7), seed=st.integers(0, 99), name=st.sampled_from(codec.CODECS))
@settings(max_examples=60, deadline=None)
def test_padding_behind_a_row_is_not_sent_and_comes_back_as_zeros(
    batch: int, tokens: int, seed: int, name: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 2, (batch, tokens), generator=generator)
    tensor = torch.randn(batch, tokens, 3, generator=generator).bfloat16().float()
    announced, data = codec.encode(tensor, name, mask)
    assert len(data) == codec.encoded_bytes(codec.sent_positions(mask, tensor.shape), 3, "float32", name)
    lengths = [max((place + 1 for place in range(tokens) if row[place]), default=0) for row in mask]
    assert codec.sent_positions(mask, tensor.shape) == sum(lengths)
    check(announced, codecs=codec.CODECS, hidden_size=3, max_tokens=batch * tokens, mask_BT=mask)
    back = codec.decode(announced, memoryview(bytearray(data)), mask)
    for row, length in enumerate(lengths):
        step = tensor[row, :length].abs().amax(-1, keepdim=True) * LARGEST_ERROR[name]
        assert bool(((back[row, :length] - tensor[row, :length]).abs() <= step).all())
        assert not back[row, length:].any()


def test_a_tensor_with_padding_is_no_tensor_without_its_mask() -> None:
    mask = torch.tensor([[1, 1, 0]])
    announced, data = codec.encode(torch.ones(1, 3, 8), "identity", mask)
    with pytest.raises(FrameError, match="size_bytes is 64; .* takes 96"):
        check(announced)
    with pytest.raises(FrameError, match="came with 2 positions, and no mask says which"):
        codec.decode(announced, memoryview(bytearray(data)))


def test_a_loss_on_padding_is_refused_and_one_before_it_is_not() -> None:
    mask = torch.tensor([[0, 1, 1, 0]])
    grad = torch.zeros(1, 4, 2)
    grad[0, 0] = 1.0
    codec.require_no_loss_on_padding(grad, mask)
    codec.require_no_loss_on_padding(torch.ones(1, 4, 2), None)
    grad[0, 3] = 1.0
    with pytest.raises(FrameError, match="their labels must be -100"):
        codec.require_no_loss_on_padding(grad, mask)


@given(shape=SHAPES, dtype=DTYPES, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_fp16_rounds_to_float16_once_and_keeps_the_dtype(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    tensor = random_tensor(shape, dtype, seed)
    announced, data = codec.encode(tensor, "fp16")
    check(announced, codecs=("fp16",), hidden_size=shape[2], max_tokens=shape[0] * shape[1])
    assert len(data) == 2 * tensor.numel()
    back = codec.decode(announced, memoryview(bytearray(data)))
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor.to(torch.float16).to(tensor.dtype))


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("fp16", 65520.0, "a value of 65520 does not fit the codec fp16, whose largest is 65504: use another codec"),
        ("bf16", 3.4e38, "does not fit the codec bf16, whose largest is 3.38953e.38"),
        ("fp16", math.nan, "a value of nan does not fit"),
        ("int8", math.inf, "a NaN or an infinity cannot be quantised"),
        ("int8", math.nan, "a NaN or an infinity cannot be quantised"),
    ],
)
def test_what_a_codec_cannot_hold_is_refused_and_no_infinity_is_made(name: str, value: float, line: str) -> None:
    tensor = torch.ones(1, 2, 16)
    tensor[0, 1, 3] = value
    with pytest.raises(NonFiniteError, match=line):
        codec.encode(tensor, name)


def test_what_just_fits_fp16_is_sent() -> None:
    tensor = torch.full((1, 2, 4), 65519.0)
    announced, data = codec.encode(tensor, "fp16")
    assert torch.equal(codec.decode(announced, memoryview(bytearray(data))), torch.full((1, 2, 4), 65504.0))
