"""Tensors as bytes and back. Nothing is allocated for a peer's tensor before its header was checked.

Padding is never sent. Codecs: `identity` sends the tensor's own bytes (little-endian, row major) and is exact; `bf16`
and `fp16` round to these types on the wire and give the tensor its dtype back on arrival; `int8` quantises each token
(`contract.quantize`). A value that its codec cannot hold is refused where it is encoded: no infinity is sent for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from contract import quantize
from contract.errors import FrameError, FrameTooLargeError, NonFiniteError
from contract.records import DELTA_CODEC
from contract.trunk_pb2 import TensorHeader

CODECS = ("identity", "bf16", "fp16", "int8")
"""From the least lossy to the smallest, but that bf16 and fp16 lose differently: fp16 has 3 more bits, and overflows
above 65504 and loses below 6e-8."""
SESSION_CODECS = (*CODECS, DELTA_CODEC)
"""Of a session: `contract.delta` has the last, which needs what both ends keep, and is for activations alone."""
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """Raise FrameError for a dtype that has no name on the wire."""
    if dtype not in _NAMES:
        raise FrameError(f"a tensor's dtype is {dtype}; the wire takes {', '.join(DTYPES)}")
    return _NAMES[dtype]


def _wire_dtype(dtype: str, codec: str) -> torch.dtype:
    return _ROUNDED.get(codec, DTYPES[dtype])


def encoded_bytes(positions: int, hidden_size: int, dtype: str, codec: str, outlier_channels: int = 0) -> int:
    """The size of [positions, hidden_size] of `dtype` on the wire by `codec`, one of CODECS."""
    if codec == "int8":
        return quantize.size_bytes(positions, hidden_size, outlier_channels)
    return positions * hidden_size * _wire_dtype(dtype, codec).itemsize


def delta_bytes(lengths: Sequence[int], hidden_size: int, differences: Sequence[bool], outlier_channels: int) -> int:
    """The size by int4-delta of rows of these lengths. Raises FrameError where there is not one difference a row."""
    if len(differences) != len(lengths):
        raise FrameError(f"forward.differences has {len(differences)} values; the batch has {len(lengths)} rows")
    differing = sum(itertools.compress(lengths, differences))
    full = quantize.size_bytes(sum(lengths) - differing, hidden_size, outlier_channels)
    return full + differing * (4 + math.ceil(hidden_size / 2))


def sizes(header: TensorHeader, mask_BT: Tensor | None) -> dict[str, int]:
    """What the tensor that `header` announces takes by each codec, outlier channels aside; all of it as differences."""
    positions, hidden_size = sent_positions(mask_BT, header.shape), header.shape[-1]
    found = {name: encoded_bytes(positions, hidden_size, header.dtype, name) for name in CODECS}
    return found | {DELTA_CODEC: delta_bytes([positions], hidden_size, [True], 0)}


def _sent_BT(mask_BT: Tensor) -> Tensor:
    """True up to each row's last 1: what comes after it is padding that nothing attends to and no loss counts.

    Padding on the left is sent: the position before the first token predicts it, in a loss over the whole row.
    """
    return mask_BT.flip(1).cummax(1).values.flip(1).to(torch.bool)


def sent_lengths(mask_BT: Tensor | None, shape: Sequence[int]) -> list[int]:
    """How many positions of each row are sent; all of them without a mask."""
    if mask_BT is None:
        return [shape[1]] * shape[0]
    lengths: list[int] = _sent_BT(mask_BT).sum(1).tolist()
    return lengths


def sent_positions(mask_BT: Tensor | None, shape: Sequence[int]) -> int:
    """N: how many of the B * T positions are sent; all of them without a mask."""
    return math.prod(shape[:2]) if mask_BT is None else int(_sent_BT(mask_BT).sum())


def encode(tensor_BTD: Tensor, codec: str, mask_BT: Tensor | None = None) -> tuple[TensorHeader, memoryview]:
    """The header of `tensor_BTD` and the bytes of its positions up to each row's last 1 in `mask_BT`.

    The bytes share the tensor's memory where no conversion was needed. Raises NonFiniteError for a value that the codec
    cannot hold; `identity` holds all.
    """
    name, outlier_channels = dtype_name(tensor_BTD.dtype), 0
    values_ND = _sent(tensor_BTD.detach(), mask_BT)
    if codec == "int8":
        wire, outlier_channels = quantize.pack(values_ND.to(torch.float32))
    else:
        wire = values_ND.to("cpu", _wire_dtype(name, codec)).contiguous()
        if codec in _ROUNDED:
            _require_held(wire, values_ND, codec)
    data = wire.view(-1).view(torch.uint8).numpy().data
    header = TensorHeader(
        dtype=name,
        shape=list(tensor_BTD.shape),
        size_bytes=len(data),
        codec=codec,
        outlier_channels=outlier_channels,
    )
    return header, data


def _require_held(wire_ND: Tensor, values_ND: Tensor, codec: str) -> None:
    if _is_finite(wire_ND):
        return
    raise NonFiniteError(
        f"a value of {float(values_ND.abs().max()):.6g} does not fit the codec {codec}, whose largest is "
        f"{torch.finfo(wire_ND.dtype).max:.6g}: use another codec"
    )


def decode(header: TensorHeader, data: memoryview, mask_BT: Tensor | None = None) -> Tensor:
    """The [B, T, D] tensor that a checked `header` and all of its `data` (writable) make, zeros where nothing was sent.

    It shares the memory of `data` if it can. Raises FrameError when `data` is not as long as the header says, or, for
    `int8`, holds what no encoder writes.
    """
    if len(data) != header.size_bytes:
        raise FrameError(f"a tensor has {len(data)} bytes; its header says {header.size_bytes}")
    shape, dtype = list(header.shape), DTYPES[header.dtype]
    if not data:
        return torch.zeros(shape, dtype=dtype)
    values_ND = _values(header, data, mask_BT).to(dtype)
    if len(values_ND) == shape[0] * shape[1]:
        return values_ND.view(shape)
    if mask_BT is None:
        raise FrameError(f"a tensor of {shape} came with {len(values_ND)} positions, and no mask says which")
    tensor_BTD = torch.zeros(shape, dtype=dtype)
    tensor_BTD[_sent_BT(mask_BT)] = values_ND
    return tensor_BTD


def _values(header: TensorHeader, data: memoryview, mask_BT: Tensor | None) -> Tensor:
    """[N, D] in the type that the codec gives."""
    if header.codec == "int8":
        positions = sent_positions(mask_BT, header.shape)
        return quantize.unpack(data, positions, header.shape[-1], header.outlier_channels)
    wire_dtype = _wire_dtype(header.dtype, header.codec)
    return torch.frombuffer(data, dtype=wire_dtype).view(-1, header.shape[-1])


def _sent(tensor_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """[N, D], row major."""
    batch, tokens, hidden = tensor_BTD.shape
    if mask_BT is None or sent_positions(mask_BT, tensor_BTD.shape) == batch * tokens:
        return tensor_BTD.reshape(-1, hidden)
    return tensor_BTD[_sent_BT(mask_BT).to(tensor_BTD.device)]


def require_no_loss_on_padding(grad_BTD: Tensor, mask_BT: Tensor | None) -> None:
    """Raise FrameError for a gradient behind a row's last 1 in `mask_BT`: such positions are not sent."""
    if mask_BT is None or sent_positions(mask_BT, grad_BTD.shape) == math.prod(grad_BTD.shape[:2]):
        return
    if bool(grad_BTD[~_sent_BT(mask_BT).to(grad_BTD.device)].any()):
        raise FrameError(
            "the loss counts positions behind a row's last token, where attention_mask is 0: they are padding and are "
            "not sent to the trunk, so that their labels must be -100"
        )


def check_header(
    header: TensorHeader,
    *,
    codecs: Collection[str],
    hidden_size: int,
    max_tokens: int,
    what: str,
    mask_BT: Tensor | None = None,
    dtypes: Collection[str] = tuple(DTYPES),
    shape: Sequence[int] | None = None,
    differences: Sequence[bool] | None = None,
) -> None:
    """Raise FrameError unless `header` announces a [B, T, hidden_size] tensor of one of `dtypes` that fits.

    With `shape` the tensor must have exactly that shape. `differences`: which of its rows go as such, by int4-delta.
    FrameTooLargeError: B * T is over `max_tokens`.
    """
    if header.codec not in codecs:
        raise FrameError(f"{what}: codec is {header.codec!r}; this session agreed on {' or '.join(codecs)}")
    if header.dtype not in dtypes:
        raise FrameError(f"{what}: dtype is {header.dtype!r}; it must be {' or '.join(sorted(dtypes))}")
    got = tuple(header.shape)
    if shape is not None and got != tuple(shape):
        raise FrameError(f"{what}: shape is {list(got)}; it must be {list(shape)}")
    if len(got) != 3 or got[2] != hidden_size or min(got) < 1:
        raise FrameError(f"{what}: shape is {list(got)}; it must be [B, T, {hidden_size}] with B and T at least 1")
    if got[0] * got[1] > max_tokens:
        raise FrameTooLargeError(f"{what}: {got[0]} x {got[1]} tokens are over the limit of {max_tokens}")
    most_outliers = quantize.outlier_limit(hidden_size) if header.codec in ("int8", DELTA_CODEC) else 0
    if header.outlier_channels > most_outliers:
        raise FrameError(
            f"{what}: outlier_channels is {header.outlier_channels}; codec {header.codec} keeps at most "
            f"{most_outliers} of {hidden_size} apart"
        )
    if header.codec == DELTA_CODEC:
        size_bytes = delta_bytes(sent_lengths(mask_BT, got), hidden_size, differences or (), header.outlier_channels)
    else:
        positions = sent_positions(mask_BT, got)
        size_bytes = encoded_bytes(positions, hidden_size, header.dtype, header.codec, header.outlier_channels)
    if header.size_bytes != size_bytes:
        raise FrameError(
            f"{what}: size_bytes is {header.size_bytes}; {list(got)} {header.dtype} by codec {header.codec} takes "
            f"{size_bytes}"
        )


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise NonFiniteError that names the first [B, T] position which holds a NaN or an infinity."""
    if _is_finite(tensor):
        return
    position = [int(index) for index in (~torch.isfinite(tensor)).nonzero()[0][:-1]]
    raise NonFiniteError(f"{what}: a NaN or an infinity at [B, T] = {position}")


def _is_finite(tensor: Tensor) -> bool:
    # One bad element spoils the sum: a finite sum is proof, an infinite one may be an overflow.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


class Assembler:
    """Collects the chunks of one announced object; `size_bytes` must have been checked against a limit before."""

    def __init__(self, size_bytes: int, what: str) -> None:
        self._what = what
        self._view = np.empty(size_bytes, np.uint8).data
        self._filled = 0

    @property
    def complete(self) -> bool:
        return self._filled == len(self._view)

    def add(self, chunk: memoryview | bytes) -> None:
        """Raises FrameTooLargeError when more comes than was announced, FrameError when a chunk is empty."""
        end = self._filled + len(chunk)
        if not chunk:
            raise FrameError(f"{self._what}: an empty chunk at byte {self._filled} of {len(self._view)}")
        if end > len(self._view):
            raise FrameTooLargeError(f"{self._what}: {end} bytes came; its header announced {len(self._view)}")
        self._view[self._filled : end] = chunk
        self._filled = end

    def data(self) -> memoryview:
        """All of it, writable. Raises FrameError when it is truncated."""
        if not self.complete:
            raise FrameError(f"{self._what}: truncated at byte {self._filled} of {len(self._view)}")
        return self._view


def pack_mask(mask_BT: Tensor) -> bytes:
    """A 0/1 attention mask as B * T bits. Raises FrameError for any other mask, such as a 4-D one."""
    if mask_BT.dim() != 2 or not ((mask_BT == 0) | (mask_BT == 1)).all():
        raise FrameError(f"attention_mask of shape {list(mask_BT.shape)}: it must be [B, T] and hold only 0 and 1")
    return np.packbits(mask_BT.detach().to("cpu", torch.bool).numpy().reshape(-1)).tobytes()


def unpack_mask(bits: bytes, batch: int, tokens: int) -> Tensor:
    """The int64 mask_BT that `pack_mask` packed. Raises FrameError when the number of bits is another."""
    count = batch * tokens
    if len(bits) != (count + 7) // 8:
        raise FrameError(f"attention_mask_bits has {len(bits)} bytes; {batch} x {tokens} bits take {(count + 7) // 8}")
    flat = np.unpackbits(np.frombuffer(bits, np.uint8), count=count)
    return torch.from_numpy(flat.reshape(batch, tokens).astype(np.int64))


def pack_positions(position_ids: Tensor) -> list[int]:
    """position_ids of shape [T], [1, T] or [B, T], row major."""
    return [int(value) for value in position_ids.detach().reshape(-1).tolist()]


def unpack_positions(values: Sequence[int], batch: int, tokens: int) -> Tensor | None:
    """int64 [1, T] or [B, T], None for no values. Raises FrameError for any other count."""
    if not values:
        return None
    if len(values) not in (tokens, batch * tokens):
        raise FrameError(f"position_ids has {len(values)} values; it must have none, {tokens} or {batch * tokens}")
    return torch.tensor(list(values), dtype=torch.int64).view(-1, tokens)
