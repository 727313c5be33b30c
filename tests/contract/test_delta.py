"""int4-delta: two ends that never drift, errors that shrink, exact sizes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import codec
from contract.delta import Cut, SampleCache, Samples, place_bytes
from contract.errors import FrameError, NonFiniteError
from contract.records import DELTA_CODEC
from contract.trunk_pb2 import TensorHeader

HIDDEN = 33
ROOM = 1 << 20
FIRST, AGAIN = Samples((1, 2, 0), (False, False, False)), Samples((1, 2, 0), (True, True, False))
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
LENGTHS = [4, 2, 3]


class Ends:
    """A sender and a receiver with a cache each."""

    def __init__(self, room: int = ROOM) -> None:
        self.sender, self.receiver = SampleCache(room, HIDDEN), SampleCache(room, HIDDEN)

    def cross(self, tensor_BTD: torch.Tensor, samples: Samples, cut: Cut = "head") -> tuple[torch.Tensor, int]:
        lengths = codec.sent_lengths(MASK, tensor_BTD.shape)
        for end in (self.sender, self.receiver):
            end.admit(samples, lengths)
        header, data = self.sender.encode(cut, tensor_BTD, MASK, samples)
        check(header, samples)
        back_BTD = self.receiver.decode(cut, header, memoryview(bytearray(data)), MASK, samples)
        return back_BTD, len(data)

    def same(self) -> bool:
        kept, others = self.sender._kept, self.receiver._kept
        return kept.keys() == others.keys() and all(torch.equal(kept[key], others[key]) for key in kept)


def check(header: TensorHeader, samples: Samples, **changes: Any) -> None:
    allowed = {"codecs": (DELTA_CODEC,), "hidden_size": HIDDEN, "max_tokens": 12, "what": "forward.hidden"}
    codec.check_header(header, mask_BT=MASK, differences=samples.differences, **{**allowed, **changes})  # type: ignore[arg-type]


def hidden(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 4, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_a_sample_goes_as_int8_first_and_in_half_the_bytes_again() -> None:
    ends = Ends()
    _, first = ends.cross(hidden(0), FIRST)
    _, again = ends.cross(hidden(0), AGAIN)
    assert first == codec.encoded_bytes(9, HIDDEN, "float32", "int8")
    assert again == 6 * (4 + 17) + codec.encoded_bytes(3, HIDDEN, "float32", "int8")


@given(
    seed=st.integers(0, 999), drift=st.floats(0, 3), passes=st.integers(1, 6), dtype=st.sampled_from(list(codec.DTYPES))
)
@settings(max_examples=40, deadline=None)
def test_both_ends_stay_the_same_to_the_bit_and_no_value_is_off_by_more_than_its_step(
    seed: int, drift: float, passes: int, dtype: str
) -> None:
    ends = Ends()
    values_BTD = hidden(seed, codec.DTYPES[dtype])
    before_BTD, _ = ends.cross(values_BTD, FIRST)
    for number in range(passes):
        values_BTD = (values_BTD + drift * hidden(seed + number + 1)).to(codec.DTYPES[dtype])
        back_BTD, _ = ends.cross(values_BTD, AGAIN)
        assert ends.same()
        change = (values_BTD.float() - before_BTD.float()).abs().amax(-1, keepdim=True)
        step = change * 0.51 / 7 + back_BTD.float().abs().amax() * 2.0**-6
        off_BTD = (back_BTD.float() - values_BTD.float()).abs()
        assert bool((off_BTD[:2] <= step[:2])[MASK[:2].bool()].all())
        assert not back_BTD[~MASK.bool()].any()
        before_BTD = back_BTD


def test_what_one_difference_misses_the_next_one_sends() -> None:
    ends = Ends()
    ends.cross(hidden(0), FIRST)
    errors = []
    for _ in range(4):
        back_BTD, _ = ends.cross(hidden(1), AGAIN)
        errors.append(float((back_BTD - hidden(1))[:1].norm() / hidden(1)[:1].norm()))
    assert errors[0] > 0.05
    assert errors[1] < 0.2 * errors[0]
    assert errors[3] < 0.003


def test_the_two_cuts_are_kept_apart() -> None:
    ends = Ends()
    ends.cross(hidden(0), FIRST)
    ends.sender.encode("tail", hidden(5), MASK, FIRST)
    back_BTD, _ = ends.cross(hidden(0), AGAIN)
    assert float((back_BTD - hidden(0))[0].abs().max()) < 0.03


@pytest.mark.parametrize(
    ("samples", "line"),
    [
        (Samples((1, 2), (False, False, False)), "2 places and 3 differences; the batch has 3 rows"),
        (Samples((1, 2, 0), (False, False)), "3 places and 2 differences"),
        (Samples((), ()), "0 places and 0 differences"),
        (Samples((7, 7, 0), (False, False, False)), "names a place twice"),
        (Samples((1, 2, 0), (False, False, True)), "a row without a place"),
        (Samples((1, 2, 9), (False, False, True)), "a row of 3 positions at place 9, where nothing is kept"),
        (Samples((2, 1, 0), (True, True, False)), "a row of 4 positions at place 2, where 2 is kept"),
        (Samples((2, 0, 0), (False, False, False)), "place 2 is taken by a row of another length"),
        (Samples((1, 2, 0), (True, True, False), (1,)), "a row of 4 positions at place 1, where nothing is kept"),
        (Samples((1, 2, 0), (True, True, False), (3,)), "a place twice, or one that nothing is kept at"),
        (Samples((0, 0, 0), (False, False, False), (1, 1)), "a place twice, or one that nothing is kept at"),
    ],
)
def test_misuse_is_refused_and_changes_nothing(samples: Samples, line: str) -> None:
    ends = Ends()
    ends.cross(hidden(0), FIRST)
    with pytest.raises(FrameError, match=line):
        ends.receiver.admit(samples, LENGTHS)
    ends.cross(hidden(1), AGAIN)
    assert ends.same()


def test_more_than_the_session_may_have_kept_is_refused() -> None:
    room = place_bytes(4, HIDDEN) + place_bytes(2, HIDDEN)
    assert room == 2 * 6 * HIDDEN * 2
    ends = Ends(room)
    ends.cross(hidden(0), FIRST)
    with pytest.raises(FrameError, match=f"bytes would be kept; the session's limit is {room}"):
        ends.receiver.admit(Samples((1, 2, 3), (True, True, False)), LENGTHS)
    ends.cross(hidden(0), Samples((0, 2, 3), (False, True, False), (1,)))
    assert {place for _, place in ends.receiver._kept} == {2, 3}


def test_a_place_that_is_given_up_while_its_row_is_still_decoded_stays_free() -> None:
    sender, receiver = SampleCache(ROOM, HIDDEN), SampleCache(ROOM, HIDDEN)
    for number in range(0, 30, 3):
        mine = Samples((number + 1, number + 2, 0), (False, False, False))
        freed = tuple(place for place in mine.places if place)
        for end in (sender, receiver):
            end.admit(mine, LENGTHS)
        header, data = sender.encode("head", hidden(number), MASK, mine)
        for end in (sender, receiver):
            end.admit(Samples((0, 0, 0), (False, False, False), freed), LENGTHS)
        receiver.decode("head", header, memoryview(bytearray(data)), MASK, mine)
    assert receiver._kept == {}


def test_a_difference_to_what_was_given_up_meanwhile_is_refused() -> None:
    ends = Ends()
    ends.cross(hidden(0), FIRST)
    ends.receiver.admit(AGAIN, LENGTHS)
    header, data = ends.sender.encode("head", hidden(1), MASK, AGAIN)
    ends.receiver.admit(Samples((0, 0, 0), (False, False, False), (1, 2)), LENGTHS)
    with pytest.raises(FrameError, match="forward.forgotten named place 1, which an earlier forward still needed"):
        ends.receiver.decode("head", header, memoryview(bytearray(data)), MASK, AGAIN)
    assert ends.receiver._kept == {}


def test_a_size_that_is_another_is_refused_before_memory_is_taken() -> None:
    ends = Ends()
    ends.cross(hidden(0), FIRST)
    header, _ = ends.sender.encode("head", hidden(1), MASK, AGAIN)
    with pytest.raises(FrameError, match="size_bytes is .* by codec int4-delta takes 333"):
        check(header, FIRST)
    with pytest.raises(FrameError, match="forward.differences has 2 values; the batch has 3 rows"):
        check(header, Samples((1, 2), (True, True)))
    header.size_bytes += 1
    with pytest.raises(FrameError, match="size_bytes is"):
        check(header, AGAIN)


def test_a_forged_scale_is_refused() -> None:
    ends = Ends()
    ends.cross(hidden(0), FIRST)
    header, data = ends.sender.encode("head", hidden(1), MASK, AGAIN)
    forged = bytearray(data)
    forged[:4] = b"\x00\x00\x80\x7f"
    with pytest.raises(NonFiniteError, match="scale is a NaN or an infinity"):
        ends.receiver.decode("head", header, memoryview(forged), MASK, AGAIN)
