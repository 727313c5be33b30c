"""What a hostile client does to a conversation: fields, sizes, numbers, chunks, order and bytes, drawn from a seed."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from contract import trunk_pb2 as pb
from contract.wire import chunk_frame
from tests.hostile.conversations import Conversation, Request, Served

INTEGERS = (0, 1, 2, 7, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
FLOATS = (0.0, -0.0, -1.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), 1e7, 0.999999999)
STRINGS = ("", "a", "../../etc/passwd", "\0", "ÿ" * 40, "😀" * 3000, "x" * 70_000, "float64", "identity", "int4-delta")
NUMBERS = tuple(struct.pack("<f", value) for value in (float("nan"), float("inf"), 3.4e38, -3.4e38, 1e-45))
_UNSIGNED_32 = {FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_INT32}
_INTEGERS = _UNSIGNED_32 | {FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_INT64}
_MOST_REPEATED = 3000

Mutation = Callable[[random.Random, list[Request]], None]


def hostile_frames(draw: random.Random, served: Served) -> list[bytes]:
    """One session's frames as they go over the wire: of a good conversation, changed once or a few times."""
    requests = Conversation(draw, served).requests
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        draw.choice(REQUEST_MUTATIONS)(draw, requests)
    frames = [frame for one in requests for frame in one.frames(draw.choice((64, 997, 4096, 1 << 19)))]
    if draw.random() < 0.4:
        draw.choice(FRAME_MUTATIONS)(draw, frames)
    return frames


def honest_frames(draw: random.Random, served: Served) -> list[bytes]:
    """One session's frames as they should be."""
    return [frame for one in Conversation(draw, served).requests for frame in one.frames(1 << 19)]


# ---- of requests ---------------------------------------------------------------------------------------------------


def change_field(draw: random.Random, requests: list[Request]) -> None:
    body = _body(draw.choice(requests).frame)
    _change(draw, body)


def change_hello(draw: random.Random, requests: list[Request]) -> None:
    _change(draw, _body(requests[0].frame))


def change_numbers(draw: random.Random, requests: list[Request]) -> None:
    """NaN, infinities and the largest numbers in a tensor; the bytes of other codecs become what they may."""
    carrying = [one for one in requests if one.data]
    if carrying:
        one = draw.choice(carrying)
        data = bytearray(one.data)
        for _ in range(draw.choice((1, 1, 5))):
            at = draw.randrange(len(data)) & ~3
            data[at : at + 4] = draw.choice(NUMBERS)[: len(data) - at]
        one.data = bytes(data)


def change_bytes(draw: random.Random, requests: list[Request]) -> None:
    carrying = [one for one in requests if one.data]
    if carrying:
        one = draw.choice(carrying)
        data = bytearray(one.data)
        for _ in range(draw.choice((1, 8, 64))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        one.data = bytes(data)


def resize(draw: random.Random, requests: list[Request]) -> None:
    """Less data than was announced, or more."""
    carrying = [one for one in requests if one.data]
    if carrying:
        one = draw.choice(carrying)
        one.data = draw.choice((one.data[: draw.randrange(len(one.data))], one.data + b"x", one.data * 2))


def reshape(draw: random.Random, requests: list[Request]) -> None:
    """A tensor of another shape, dtype or codec, of the size that its header says."""
    headers = [(one, header) for one in requests if (header := _header(one)) is not None]
    if headers:
        one, header = draw.choice(headers)
        change = draw.choice(("shape", "dtype", "codec", "outliers", "size"))
        if change == "shape":
            shape = list(header.shape)
            shape[draw.randrange(len(shape))] = draw.choice((0, 1, 2, 33, 1 << 20, (1 << 32) - 1))
            del header.shape[:]
            header.shape.extend(shape)
        elif change == "dtype":
            header.dtype = draw.choice(("float32", "bfloat16", "float16", "float64", ""))
        elif change == "codec":
            header.codec = draw.choice(("identity", "bf16", "fp16", "int8", "int4-delta", "zip"))
        elif change == "outliers":
            header.outlier_channels = draw.choice((1, 2, 3, 1 << 31))
        else:
            header.size_bytes = draw.choice((0, 1, 1 << 20, 1 << 50, (1 << 64) - 1))
            return
        size = 1
        for length in header.shape:
            size *= length
        size *= 4 if header.dtype == "float32" else 2
        if draw.random() < 0.7 and size <= 1 << 20:
            header.size_bytes, one.data = size, draw.randbytes(size)


def change_structure(draw: random.Random, requests: list[Request]) -> None:
    """A LoRA that fits the trunk in part."""
    lora = requests[0].frame.hello.lora
    change = draw.choice(("rank", "twice", "fewer", "pattern", "dora", "dropout", "alpha", "seed"))
    if change == "rank":
        lora.rank = draw.choice((0, 1, 16, 32, 33, (1 << 32) - 1))
    elif change == "twice" and lora.target_modules:
        lora.target_modules.append(draw.choice(list(lora.target_modules)))
    elif change == "fewer" and lora.target_modules:
        del lora.target_modules[draw.randrange(len(lora.target_modules)) :]
    elif change == "pattern" and lora.target_modules:
        name = draw.choice((lora.target_modules[0], "(a+)+$", "[", "x" * 1000))
        lora.rank_pattern[name] = draw.choice((1, 8, 1 << 31))
        lora.alpha_pattern[name] = draw.choice(FLOATS)
    elif change == "dora":
        lora.use_dora = True
    elif change == "dropout":
        lora.dropout = draw.choice((*FLOATS, 0.5))
    elif change == "alpha":
        lora.alpha = draw.choice((*FLOATS, 1e5, -3.0))
    else:
        requests[0].frame.hello.seed = draw.randrange(1 << 64)


def reorder(draw: random.Random, requests: list[Request]) -> None:
    change = draw.choice(("swap", "drop", "twice", "hello", "late"))
    at = draw.randrange(len(requests))
    if change == "swap":
        other = draw.randrange(len(requests))
        requests[at], requests[other] = requests[other], requests[at]
    elif change == "drop" and len(requests) > 1:
        del requests[at]
    elif change == "twice":
        requests.insert(draw.randrange(len(requests) + 1), _copy(requests[at]))
    elif change == "hello":
        requests.insert(at, _copy(requests[0]))
    else:
        requests.extend(_copy(one) for one in requests[at:][:3])


def microbatches(draw: random.Random, requests: list[Request]) -> None:
    """Numbers that are taken, gone, or dropped while they are needed."""
    for one in requests:
        body = _body(one.frame)
        if isinstance(body, pb.Forward | pb.Backward) and draw.random() < 0.4:
            body.microbatch = draw.choice((0, 1, 2, (1 << 64) - 1))
        if isinstance(body, pb.Forward) and draw.random() < 0.3:
            body.dropped.extend(draw.choice(([1], [1, 2, 3], list(range(5000)), [(1 << 64) - 1] * 30)))
        if isinstance(body, pb.Forward) and draw.random() < 0.2:
            body.need_grad = False


def samples(draw: random.Random, requests: list[Request]) -> None:
    """Places of int4-delta that are taken, unknown or far too many."""
    forwards = [one.frame.forward for one in requests if one.frame.WhichOneof("body") == "forward"]
    if forwards:
        forward = draw.choice(forwards)
        del forward.samples[:], forward.differences[:]
        rows = forward.hidden.shape[0] if forward.hidden.shape else 1
        forward.samples.extend(draw.choice(([1] * rows, range(rows), [7] * 4000, [])))
        forward.differences.extend(draw.choice(([True] * rows, [False] * rows, [True])))
        forward.forgotten.extend(draw.choice(([], [1], [5, 5], list(range(4000)))))


REQUEST_MUTATIONS: Sequence[Mutation] = (
    change_field,
    change_field,
    change_hello,
    change_numbers,
    change_bytes,
    resize,
    reshape,
    change_structure,
    reorder,
    microbatches,
    samples,
)


# ---- of serialised frames ------------------------------------------------------------------------------------------


def truncate(draw: random.Random, frames: list[bytes]) -> None:
    at = draw.randrange(len(frames))
    frames[at] = frames[at][: draw.randrange(len(frames[at]) + 1)]


def garble(draw: random.Random, frames: list[bytes]) -> None:
    at = draw.randrange(len(frames))
    data = bytearray(frames[at] or b"\0")
    for _ in range(draw.choice((1, 3, 30))):
        data[draw.randrange(len(data))] = draw.randrange(256)
    frames[at] = bytes(data)


def noise(draw: random.Random, frames: list[bytes]) -> None:
    frames.insert(draw.randrange(len(frames) + 1), draw.randbytes(draw.choice((0, 1, 7, 300, 9000))))


def unknown_fields(draw: random.Random, frames: list[bytes]) -> None:
    """Bytes of a newer protocol, or of nothing, behind a good frame."""
    at = draw.randrange(len(frames))
    frames[at] += draw.choice(
        (b"\xa2\x06\x03abc", b"\xa0\x06\x01", b"\x3a\x00", b"\x3a\x02\x0a\x00", b"\x0a\xff\xff\xff\x0f")
    )


def odd_chunks(draw: random.Random, frames: list[bytes]) -> None:
    """Chunks that are empty, that lie of their length, or that nobody asked for."""
    odd = (
        chunk_frame(memoryview(b"")),
        chunk_frame(memoryview(draw.randbytes(50))),
        b"\x3a\x85\x80\x80\x00\x0a\x03abc",  # the same number in more bytes than it needs
        b"\x3a\x05\x0a\xff\xff\xff\x7f",
        b"\x3a\x04\x0a\x02ab\x3a\x04\x0a\x02cd",
    )
    frames.insert(draw.randrange(len(frames) + 1), draw.choice(odd))


def shuffle(draw: random.Random, frames: list[bytes]) -> None:
    tail = frames[1:]
    draw.shuffle(tail)
    frames[1:] = tail


def large(draw: random.Random, frames: list[bytes]) -> None:
    """A frame far over what a frame may have."""
    forward = pb.Forward(dropped=range(draw.choice((50_000, 200_000))))
    frames.insert(draw.randrange(len(frames) + 1), pb.ClientFrame(forward=forward).SerializeToString())


FRAME_MUTATIONS = (truncate, truncate, garble, garble, noise, unknown_fields, odd_chunks, shuffle, large)


# ---- of messages ---------------------------------------------------------------------------------------------------


def _body(frame: pb.ClientFrame) -> Any:
    return getattr(frame, str(frame.WhichOneof("body")))


def _header(one: Request) -> Any:
    body = _body(one.frame)
    if isinstance(body, pb.Forward):
        return body.hidden
    return body.grad if isinstance(body, pb.Backward) else None


def _copy(one: Request) -> Request:
    frame = pb.ClientFrame()
    frame.CopyFrom(one.frame)
    return Request(frame, one.data)


def _change(draw: random.Random, message: Message) -> None:
    """Give one field of `message`, or of one that lies in it, a value that hurts."""
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = draw.choice(fields)
    if draw.random() < 0.15:
        message.ClearField(field.name)
    elif _is_map(field):
        _change_map(draw, getattr(message, field.name), field)
    elif field.is_repeated:
        _change_list(draw, getattr(message, field.name), field)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        _change(draw, getattr(message, field.name))
    else:
        setattr(message, field.name, _value(draw, field))


def _is_map(field: FieldDescriptor) -> bool:
    return field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.GetOptions().map_entry


def _change_map(draw: random.Random, values: Any, field: FieldDescriptor) -> None:
    kind = field.message_type.fields_by_name["value"]
    for _ in range(draw.choice((1, 5, 500))):
        values[f"{draw.choice(STRINGS)[:50]}{draw.randrange(1000)}"] = _value(draw, kind)


def _change_list(draw: random.Random, values: Any, field: FieldDescriptor) -> None:
    count = draw.choice((1, 2, 17, _MOST_REPEATED))
    if field.type == FieldDescriptor.TYPE_STRING and count > 17:
        values.extend(["x"] * count)
        return
    value = _value(draw, field)
    values.extend([value] * (1 if isinstance(value, str) and len(value) > 1000 else count))


def _value(draw: random.Random, field: FieldDescriptor) -> Any:
    if field.type == FieldDescriptor.TYPE_BOOL:
        return draw.random() < 0.5
    if field.type in _INTEGERS:
        most = (1 << 32) - 1 if field.type in _UNSIGNED_32 else (1 << 64) - 1
        return min(draw.choice((*INTEGERS, draw.randrange(1 << 32))), most)
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return draw.choice(FLOATS)
    if field.type == FieldDescriptor.TYPE_STRING:
        return draw.choice(STRINGS)
    return draw.randbytes(draw.choice((0, 1, 40, 5000)))
