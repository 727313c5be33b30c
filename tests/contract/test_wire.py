"""Frames by hand against the generated classes, and what two sides compare."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from contract import trunk_pb2 as pb
from contract import wire
from contract.errors import AgreementError, FrameError
from contract.records import CutLayers, LoraSpec, RoundKey


@given(data=st.binary(min_size=1, max_size=300))
@example(data=b"x" * 127)
@example(data=b"x" * 128)
@example(data=b"x" * 16384)
@example(data=b"x" * (1 << 21))
@settings(max_examples=60, deadline=None)
def test_chunk_frames_are_the_generated_classes_own_bytes(data: bytes) -> None:
    frame = wire.chunk_frame(memoryview(data))
    assert frame == pb.ClientFrame(chunk=pb.TensorChunk(data=data)).SerializeToString()
    assert frame == pb.ServerFrame(chunk=pb.TensorChunk(data=data)).SerializeToString()
    assert wire.chunk_data(frame) == data


@given(data=st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_never_pass_for_another_chunk_than_the_parser_sees(data: bytes) -> None:
    for frame in (data, b"\x3a" + data, b"\x3a" + bytes((len(data),)) + data):
        chunk = wire.chunk_data(frame)
        if chunk is None:
            continue
        assert pb.ClientFrame.FromString(frame).chunk.data == chunk


def test_other_frames_are_no_chunks() -> None:
    assert wire.chunk_data(b"") is None
    assert wire.chunk_data(pb.ClientFrame(step=pb.Step(lr=1.0)).SerializeToString()) is None
    assert wire.chunk_data(pb.ClientFrame(chunk=pb.TensorChunk()).SerializeToString()) is None


def test_chunks_are_cut_to_size_and_add_up() -> None:
    data = bytes(range(250)) * 10
    frames = list(wire.chunk_frames(memoryview(data), 1024))
    sizes = [len(pb.ServerFrame.FromString(frame).chunk.data) for frame in frames]
    assert sizes == [1024, 1024, 452]
    assert b"".join(bytes(wire.chunk_data(frame) or b"") for frame in frames) == data


def test_what_is_no_frame_is_refused() -> None:
    with pytest.raises(FrameError, match="5 bytes are not a ClientFrame"):
        wire.parse_client_frame(b"\xff\xff\xff\xff\xff")
    with pytest.raises(FrameError, match="a ServerFrame came without a body"):
        wire.parse_server_frame(b"")


def test_a_disagreement_names_every_field_and_both_sides() -> None:
    one = wire.model_agreement("abc", CutLayers(1, 1), "float32", "sdpa")
    wire.require_agreement(one, wire.model_agreement("abc", CutLayers(1, 1), "float32", "sdpa"))
    other = wire.model_agreement("abd", CutLayers(2, 1), "float32", "eager")
    other.peft_version = "0.1"
    with pytest.raises(AgreementError) as caught:
        wire.require_agreement(one, other)
    line = str(caught.value)
    assert "fingerprint is 'abc' at the client and 'abd' at the trunk" in line
    assert "head_layers is 1 at the client and 2 at the trunk" in line
    assert "attn_implementation is 'sdpa' at the client and 'eager' at the trunk" in line
    assert "peft_version is" in line
    assert "tail_layers" not in line
    assert "torch_version" not in line


def test_build_tags_are_no_version() -> None:
    assert all("+" not in version for version in wire.library_versions().values())
    assert wire.library_versions()["torch_version"].startswith("2.")


def test_records_come_back_in_one_order() -> None:
    spec = LoraSpec(
        rank=4,
        alpha=8.0,
        target_modules=("a.q", "b.q"),
        target_parameters=("a.experts.down", "b.experts.down"),
        rank_pattern={"a.q": 2, "b.q": 3},
        alpha_pattern={"b.q": 1.5},
        dropout=0.1,
        use_rslora=True,
    )
    assert wire.lora_from_wire(wire.lora_to_wire(spec)) == spec
    turned = wire.lora_to_wire(spec)
    del turned.target_modules[:]
    turned.target_modules.extend(["b.q", "a.q"])
    assert repr(wire.lora_from_wire(turned)) == repr(spec)
    key = RoundKey("20260101-000000-abcd", 3, 2)
    assert wire.round_from_wire(wire.round_to_wire(key)) == key
