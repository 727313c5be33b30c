"""What both ends of `trunk.proto` must agree on beyond the messages: sizes, names, and records as messages.

A tensor's bytes are by far most of the traffic, so chunk frames are written and read here without the copies that the
protobuf runtime makes. The bytes are those of `ClientFrame(chunk=...)` and `ServerFrame(chunk=...)`, so that a peer
which uses the generated classes for everything still understands them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import DecodeError

from contract import trunk_pb2 as pb
from contract.errors import AgreementError, FrameError
from contract.records import CutLayers, LoraSpec, RoundKey

PROTOCOL = 2
CHUNK_BYTES = 1 << 19
"""Two chunks of half a MiB cross a loopback a fourth faster than one of a MiB, and eight smaller ones slower again."""
MAX_MESSAGE_BYTES = 4 << 20
SLOWEST_BYTES_S = 1 << 16
"""What a link must carry, 0.5 Mbit/s: a tensor that comes more slowly would hold who waits for it for hours."""
LONGEST_GRACE_S = 86_400.0
"""What open sessions may be given before a drained trunk cuts them off."""
ERROR_KEY = "trunkline-error"
SESSION_METHOD = "/trunkline.v1.Trunk/Session"

_CHUNK_TAG = 0x3A  # field 7, length-delimited: `chunk` in ClientFrame and ServerFrame alike
_DATA_TAG = 0x0A  # field 1, length-delimited: TensorChunk.data
_Frame = TypeVar("_Frame", pb.ClientFrame, pb.ServerFrame)


def message_limits() -> list[tuple[str, int]]:
    """gRPC options that bound one message, for channels and servers alike."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at` and the index behind it; (-1, at) when it is not one of at most four bytes."""
    value = shift = 0
    for index in range(at, min(at + 4, len(data))):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, index + 1
        shift += 7
    return -1, at


def chunk_frame(data: memoryview) -> bytes:
    """A serialised ClientFrame or ServerFrame that carries `data` (bytes) as its chunk; one copy."""
    inner = bytes((_DATA_TAG,)) + _varint(len(data))
    return b"".join((bytes((_CHUNK_TAG,)), _varint(len(inner) + len(data)), inner, data))


def chunk_frames(data: memoryview, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """`data` (bytes) as serialised chunk frames of at most `chunk_bytes` of it each."""
    for start in range(0, len(data), chunk_bytes):
        yield chunk_frame(data[start : start + chunk_bytes])


def chunk_data(frame: bytes) -> memoryview | None:
    """The data of a serialised chunk frame, not copied; None when `frame` is another frame or oddly encoded."""
    if not frame or frame[0] != _CHUNK_TAG:
        return None
    outer, at = _read_varint(frame, 1)
    if outer != len(frame) - at or outer < 2 or frame[at] != _DATA_TAG:
        return None
    inner, at = _read_varint(frame, at + 1)
    if inner != len(frame) - at:
        return None
    return memoryview(frame)[at:]


def parse_client_frame(frame: bytes) -> pb.ClientFrame:
    """Raise FrameError when `frame` is not a ClientFrame with a body."""
    return _parsed(pb.ClientFrame(), frame)


def parse_server_frame(frame: bytes) -> pb.ServerFrame:
    """Raise FrameError when `frame` is not a ServerFrame with a body."""
    return _parsed(pb.ServerFrame(), frame)


def _parsed(message: _Frame, frame: bytes) -> _Frame:
    name = type(message).__name__
    try:
        message.ParseFromString(frame)
    except DecodeError:
        raise FrameError(f"{len(frame)} bytes are not a {name}") from None
    if message.WhichOneof("body") is None:
        raise FrameError(f"a {name} came without a body; the sender may speak a newer protocol than {PROTOCOL}")
    return message


def library_versions() -> dict[str, str]:
    """Versions that change results, without build tags: a CPU build and a CUDA build of one release agree."""
    return {
        f"{name}_version": importlib.metadata.version(name).partition("+")[0]
        for name in ("torch", "transformers", "peft")
    }


def model_agreement(fingerprint: str, cut: CutLayers, dtype: str, attn_implementation: str) -> pb.ModelAgreement:
    """What this process holds, for a hello or a description; library versions are its own."""
    return pb.ModelAgreement(
        fingerprint=fingerprint,
        head_layers=cut.head,
        tail_layers=cut.tail,
        dtype=dtype,
        attn_implementation=attn_implementation,
        **library_versions(),
    )


def require_agreement(client: pb.ModelAgreement, trunk: pb.ModelAgreement) -> None:
    """Raise AgreementError that names every field which differs, with both sides' values."""
    if found := differences(client, "the client", trunk, "the trunk"):
        raise AgreementError("; ".join(found))


def differences(one: pb.ModelAgreement, where: str, other: pb.ModelAgreement, elsewhere: str) -> list[str]:
    """Each field that differs, with the values here and there."""
    return [
        f"{name} is {getattr(one, name)!r} at {where} and {getattr(other, name)!r} at {elsewhere}"
        for name in (field.name for field in pb.ModelAgreement.DESCRIPTOR.fields)
        if getattr(one, name) != getattr(other, name)
    ]


def lora_to_wire(spec: LoraSpec) -> pb.Lora:
    return pb.Lora(
        rank=spec.rank,
        alpha=spec.alpha,
        target_modules=spec.target_modules,
        target_parameters=spec.target_parameters,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        dropout=spec.dropout,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
    )


def lora_from_wire(lora: pb.Lora) -> LoraSpec:
    """The spec in its one order: equal structures make equal specs."""
    return LoraSpec(
        rank=lora.rank,
        alpha=lora.alpha,
        target_modules=tuple(sorted(lora.target_modules)),
        target_parameters=tuple(sorted(lora.target_parameters)),
        rank_pattern=dict(sorted(lora.rank_pattern.items())),
        alpha_pattern=dict(sorted(lora.alpha_pattern.items())),
        dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def round_to_wire(key: RoundKey) -> pb.RoundId:
    return pb.RoundId(run=key.run, round=key.round, attempt=key.attempt)


def round_from_wire(round_id: pb.RoundId) -> RoundKey:
    return RoundKey(round_id.run, round_id.round, round_id.attempt)
