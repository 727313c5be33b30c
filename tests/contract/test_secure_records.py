"""What orchestrator and client say of secure sums reads back as it was said, and anything else is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

import pytest
from flwr.app import ConfigRecord
from hypothesis import given
from hypothesis import strategies as st

from contract.errors import FrameError
from contract.secure_records import MAX_FIELD_BYTES, SecureOrder, SecureReply, order_from, reply_from, to_record

Read = Callable[[Mapping[str, object]], SecureOrder | SecureReply]

_BYTES = st.binary(max_size=40)
orders = st.builds(
    SecureOrder,
    run=st.text(min_size=1, max_size=20),
    **{field.name: _BYTES for field in fields(SecureOrder) if field.name != "run"},
)
_TEXTS = ("name", "dataset", "refusal", "failure")
_WORDS = st.lists(st.text("abcdef", min_size=1, max_size=5), max_size=4).map(" ".join)
replies = st.builds(
    SecureReply,
    **dict.fromkeys(_TEXTS, _WORDS),
    **{field.name: _BYTES for field in fields(SecureReply) if field.name not in _TEXTS},
)
BOTH = pytest.mark.parametrize("read", [order_from, reply_from])


@given(orders)
def test_an_order_reads_back_from_flowers_record_as_it_was_said(said: SecureOrder) -> None:
    assert order_from(ConfigRecord(dict(to_record(said)))) == said


@given(replies)
def test_a_reply_reads_back_from_flowers_record_as_it_was_said(said: SecureReply) -> None:
    assert reply_from(ConfigRecord(dict(to_record(said)))) == said


@given(orders)
def test_what_is_empty_is_not_sent(said: SecureOrder) -> None:
    record = to_record(said)
    assert all(record.values())
    assert {name: value for name in record if (value := getattr(said, name))} == record


def test_a_reply_may_be_empty_and_an_order_names_its_run() -> None:
    assert to_record(SecureReply()) == {}
    assert reply_from({}) == SecureReply()
    for nameless in ({}, {"run": ""}, {"join": b"terms"}):
        with pytest.raises(FrameError, match="the record 'secure' names no run"):
            order_from(nameless)


@BOTH
@pytest.mark.parametrize("name", ["learning_rate", "__class__", ""])
def test_a_field_that_is_unknown_is_refused_by_name(read: Read, name: str) -> None:
    with pytest.raises(FrameError, match=f"holds {name} of type bytes, which is not known"):
        read({"run": "a run", name: b"1"} if read is order_from else {name: b"1"})


def test_what_only_the_other_side_says_is_unknown() -> None:
    for field in fields(SecureReply):
        with pytest.raises(FrameError, match=f"holds {field.name} of type bytes"):
            order_from({"run": "a run", field.name: b"1"})
    for field in fields(SecureOrder):
        with pytest.raises(FrameError, match=f"holds {field.name} of type bytes"):
            reply_from({field.name: b"1"})


@pytest.mark.parametrize("value", [1, 1.5, True, [b"1"], None])
def test_a_field_of_no_known_type_is_refused_by_name(value: object) -> None:
    for field in fields(SecureOrder):
        with pytest.raises(FrameError, match=f"holds {field.name} of type {type(value).__name__}"):
            order_from({"run": "a run", field.name: value})
    for field in fields(SecureReply):
        with pytest.raises(FrameError, match=f"holds {field.name} of type {type(value).__name__}"):
            reply_from({field.name: value})


def test_text_in_the_place_of_bytes_and_bytes_in_the_place_of_text_are_refused_by_name() -> None:
    with pytest.raises(FrameError, match="holds join of type str"):
        order_from({"run": "a run", "join": "terms"})
    with pytest.raises(FrameError, match="holds run of type bytes"):
        order_from({"run": b"a run"})
    with pytest.raises(FrameError, match="holds advert of type str"):
        reply_from({"advert": "keys"})
    with pytest.raises(FrameError, match="holds refusal of type bytes"):
        reply_from({"refusal": b"no"})


def test_a_field_that_is_too_large_is_refused_by_name_and_one_at_the_limit_is_not() -> None:
    most = bytes(MAX_FIELD_BYTES)
    assert order_from({"run": "a run", "inbox": most}).inbox == most
    assert reply_from({"shares": most}).shares == most
    more = bytes(MAX_FIELD_BYTES + 1)
    with pytest.raises(FrameError, match=f"secure.inbox has {MAX_FIELD_BYTES + 1} bytes; at most {MAX_FIELD_BYTES}"):
        order_from({"run": "a run", "inbox": more})
    with pytest.raises(FrameError, match=f"secure.shares has {MAX_FIELD_BYTES + 1} bytes"):
        reply_from({"shares": more})


def test_a_clients_own_words_come_as_one_short_line() -> None:
    said = reply_from({"failure": "two\nlines\x1b[31m " + "x" * 100_000, "refusal": "\n"})
    assert said.failure.startswith("two lines")
    assert "\n" not in said.failure
    assert len(said.failure) <= 1000
    assert said.refusal == ""
