from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.graph import plan_graph
from aggregation.terms import DEFAULT_MIN_MEMBERS, MAX_MEMBERS, NONCE_BYTES, PROTOCOL, Member, Policy, Terms
from contract import secagg_pb2 as pb
from contract.errors import SecureSumError


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def members_of(count: int) -> tuple[Member, ...]:
    return tuple(Member(f"client-{number:05}", key_of(number)) for number in range(count))


def terms_over(count: int, **changes: object) -> Terms:
    values: dict[str, object] = {
        "run": "a run",
        "round": 1,
        "nonce": bytes(NONCE_BYTES),
        "members": members_of(count),
        "threshold": 2 * count // 3 + 1,
        "degree": 0,
        "size": 50,
        "ring_bits": 32,
        "model_fingerprint": "f" * 64,
        "settings_sha256": "5" * 64,
    }
    return Terms(**(values | changes))  # type: ignore[arg-type]


@st.composite
def any_terms(draw: st.DrawFn) -> Terms:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    ids = sorted(draw(st.sets(text, min_size=2, max_size=12)))
    identity_key = st.binary(min_size=32, max_size=32)
    identity_keys = draw(st.lists(identity_key, min_size=len(ids), max_size=len(ids), unique=True))
    degree = 2 * draw(st.integers(0, (len(ids) - 1) // 2))
    hood = degree + 1 if degree else len(ids)
    return Terms(
        run=draw(text),
        round=draw(st.integers(0, 2**32 - 1)),
        nonce=draw(st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES)),
        members=tuple(Member(client_id, key) for client_id, key in zip(ids, identity_keys, strict=True)),
        threshold=draw(st.integers(hood // 2 + 1, hood)),
        degree=degree,
        size=draw(st.integers(1, 2**64 - 1)),
        ring_bits=draw(st.sampled_from([32, 64])),
        model_fingerprint=draw(text),
        settings_sha256=draw(text),
    )


@given(any_terms())
@settings(max_examples=150, deadline=None)
def test_terms_are_read_back_as_they_were_written(terms: Terms) -> None:
    read = Terms.from_bytes(terms.to_bytes())
    assert read == terms
    assert read.session_id == terms.session_id
    assert read.to_bytes() == terms.to_bytes()


CHANGES: dict[str, list[object]] = {
    "run": ["another run", "", "a run\0"],
    "round": [0, 2, 11],
    "nonce": [b"\1" + bytes(15), bytes(15) + b"\1"],
    "members": [
        members_of(8),
        members_of(10)[1:],
        (*members_of(8), Member("client-00009", key_of(8))),
        (*members_of(8), Member("client-00008", key_of(9))),
    ],
    "threshold": [6, 8, 9],
    "degree": [8],
    "size": [49, 51, 500],
    "ring_bits": [64],
    "model_fingerprint": ["f" * 63, "e" * 64, ""],
    "settings_sha256": ["5" * 63, "6" * 64, ""],
}


def test_every_field_of_the_terms_is_changed_below() -> None:
    assert [field.name for field in fields(Terms)] == list(CHANGES)


def test_every_single_field_changes_the_session_id() -> None:
    terms = terms_over(9)
    changed = [replace(terms, **{name: value}) for name, values in CHANGES.items() for value in values]
    assert len({one.session_id for one in (terms, *changed)}) == len(changed) + 1
    assert {len(one.session_id) for one in changed} == {32}


def test_what_moves_from_one_field_to_the_next_changes_the_session_id() -> None:
    texts = [
        {"run": "ab", "model_fingerprint": "c", "settings_sha256": ""},
        {"run": "a", "model_fingerprint": "bc", "settings_sha256": ""},
        {"run": "a", "model_fingerprint": "b", "settings_sha256": "c"},
        {"run": "", "model_fingerprint": "abc", "settings_sha256": ""},
        {"run": "abc", "model_fingerprint": "", "settings_sha256": ""},
    ]
    numbers = [
        {"round": 1, "size": 12},
        {"round": 12, "size": 1},
        {"round": 7, "size": 5, "threshold": 6},
        {"round": 6, "size": 5, "threshold": 7},
    ]
    named = [
        {"members": (Member("a", b"b" * 32), Member("c", b"d" * 32)), "threshold": 2},
        {"members": (Member("ab", b"b" * 32), Member("c", b"d" * 32)), "threshold": 2},
        {"members": (Member("a", b"d" * 32), Member("c", b"b" * 32)), "threshold": 2},
    ]
    moved = [terms_over(9, **changes) for changes in (*texts, *numbers, *named)]
    assert len({terms.session_id for terms in moved}) == len(moved)


@given(any_terms(), any_terms())
@settings(max_examples=100, deadline=None)
def test_other_terms_have_another_session_id(one: Terms, other: Terms) -> None:
    assert (one == other) == (one.session_id == other.session_id)


def swapped(count: int) -> tuple[Member, ...]:
    first, second, *rest = members_of(count)
    return (second, first, *rest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": ()}, f"0 members; a session has 2 to {MAX_MEMBERS}"),
        ({"members": members_of(1), "threshold": 1}, f"1 members; a session has 2 to {MAX_MEMBERS}"),
        ({"members": members_of(MAX_MEMBERS + 1)}, f"{MAX_MEMBERS + 1} members; a session has 2 to {MAX_MEMBERS}"),
        ({"members": swapped(9)}, "the members are not in order, or one is named twice"),
        (
            {"members": (*members_of(8), Member("client-00007", key_of(8)))},
            "the members are not in order, or one is named twice",
        ),
        ({"members": (*members_of(8), Member("client-00008", key_of(7)))}, "two members have the same identity key"),
        ({"members": (*members_of(8), Member("client-00008", bytes(31)))}, "an identity key is not 32 bytes"),
        ({"members": (*members_of(8), Member("client-00008", bytes(33)))}, "an identity key is not 32 bytes"),
        ({"nonce": b""}, "the nonce has 0 bytes; it must have 16"),
        ({"nonce": bytes(15)}, "the nonce has 15 bytes; it must have 16"),
        ({"nonce": bytes(17)}, "the nonce has 17 bytes; it must have 16"),
        ({"ring_bits": 0}, "ring_bits is 0; it must be 32 or 64"),
        ({"ring_bits": 16}, "ring_bits is 16; it must be 32 or 64"),
        ({"ring_bits": 33}, "ring_bits is 33; it must be 32 or 64"),
        ({"size": 0}, "size is 0; a vector has at least one element"),
        ({"size": -1}, "size is -1; a vector has at least one element"),
        ({"degree": 3}, "degree is 3; it must be even, below N"),
        ({"degree": 10}, "degree is 10; it must be even, below N"),
        ({"threshold": 0}, "threshold is 0; it must be more than half of 9, and at most that"),
        ({"threshold": 4}, "threshold is 4; it must be more than half of 9, and at most that"),
        ({"threshold": 10}, "threshold is 10; it must be more than half of 9, and at most that"),
        ({"degree": 4, "threshold": 2}, "threshold is 2; it must be more than half of 5, and at most that"),
        ({"degree": 4, "threshold": 6}, "threshold is 6; it must be more than half of 5, and at most that"),
        ({"members": members_of(8), "threshold": 4}, "threshold is 4; it must be more than half of 8"),
    ],
)
def test_impossible_terms_are_refused_by_what_is_wrong(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SecureSumError, match=message):
        terms_over(9, **changes)


def test_the_largest_and_the_smallest_session_are_accepted() -> None:
    assert len(terms_over(MAX_MEMBERS).members) == MAX_MEMBERS
    assert terms_over(2).threshold == 2


@pytest.mark.parametrize(
    "data", [b"\xff", b"garbage", b"\x12\x7f", bytes([0x2A, 4, 1]), b"\x12\x02\xff\xfe", terms_over(9).to_bytes()[:-1]]
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(SecureSumError, match="the session's terms cannot be read"):
        Terms.from_bytes(data)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_garbage_is_refused_and_with_no_other_error(data: bytes) -> None:
    with pytest.raises(SecureSumError):
        Terms.from_bytes(data)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_terms_with_a_changed_byte_are_refused_or_are_other_terms(data: st.DataObject) -> None:
    good = terms_over(4).to_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    changed = bytearray(good)
    changed[place] ^= data.draw(st.integers(1, 255))
    try:
        read = Terms.from_bytes(bytes(changed))
    except SecureSumError:
        return
    assert read.session_id != terms_over(4).session_id


@pytest.mark.parametrize("protocol", [0, PROTOCOL + 1, 99])
def test_terms_of_another_protocol_are_refused(protocol: int) -> None:
    message = pb.Terms.FromString(terms_over(9).to_bytes())
    message.protocol = protocol
    with pytest.raises(SecureSumError, match=f"the terms are of protocol {protocol}; this is {PROTOCOL}"):
        Terms.from_bytes(message.SerializeToString())


def test_impossible_terms_are_refused_when_they_are_read_too() -> None:
    message = pb.Terms.FromString(terms_over(9).to_bytes())
    message.ring_bits = 48
    with pytest.raises(SecureSumError, match="ring_bits is 48"):
        Terms.from_bytes(message.SerializeToString())


def test_a_members_number_is_its_place_and_a_stranger_has_none() -> None:
    terms = terms_over(9)
    assert [terms.number_of(member.client_id) for member in terms.members] == list(range(9))
    with pytest.raises(SecureSumError, match="client nobody is not among the session's members"):
        terms.number_of("nobody")


def roster_of(terms: Terms) -> dict[str, bytes]:
    return {member.client_id: member.identity_key for member in terms.members}


@pytest.mark.parametrize("count", [DEFAULT_MIN_MEMBERS, 11, 12, 13, 50, 128])
def test_the_planned_full_graph_passes_the_default_policy(count: int) -> None:
    plan = plan_graph(count, 0.05, 0.1)
    terms = terms_over(count, threshold=plan.threshold, degree=plan.degree)
    Policy().check(terms, roster_of(terms) | {"one more": bytes(32)})


def test_the_planned_ring_passes_the_default_policy_and_one_vote_fewer_does_not() -> None:
    plan = plan_graph(200, 0.05, 0.1)
    terms = terms_over(200, threshold=plan.threshold, degree=plan.degree)
    Policy().check(terms, roster_of(terms))
    weaker = replace(terms, threshold=plan.threshold - 1)
    with pytest.raises(
        SecureSumError,
        match=f"{plan.degree} neighbours with a threshold of {plan.threshold - 1} are not safe against 10 corrupt",
    ):
        Policy().check(weaker, roster_of(weaker))


@pytest.mark.parametrize(
    ("policy", "terms", "message"),
    [
        (Policy(), terms_over(9), "the session has 9 members; this client takes part in no sum over fewer than 10"),
        (
            Policy(min_members=30),
            terms_over(29),
            r"has 29 members; .* fewer than 30 \(secagg-min-members in its node config\)",
        ),
        (
            Policy(),
            terms_over(12, threshold=8),
            r"threshold is 8 of 12; this client wants at least 9 \(secagg-min-threshold in its node config\)",
        ),
        (Policy(min_threshold=11), terms_over(12, threshold=10), "threshold is 10 of 12; .* at least 11"),
        (
            Policy(min_threshold=150),
            terms_over(200, degree=60, threshold=50),
            "threshold is 50 of 61; .* at least 150",
        ),
        (
            Policy(),
            terms_over(200, degree=20, threshold=11),
            "20 neighbours with a threshold of 11 are not safe against 10 corrupt members of 200",
        ),
        (
            Policy(corrupt=0.3),
            terms_over(200, degree=60, threshold=42),
            "60 neighbours with a threshold of 42 are not safe against 60 corrupt members of 200",
        ),
    ],
)
def test_terms_below_the_policy_are_refused_by_what_is_too_low(policy: Policy, terms: Terms, message: str) -> None:
    with pytest.raises(SecureSumError, match=message):
        policy.check(terms, roster_of(terms))


def test_a_lower_threshold_of_the_clients_own_choice_is_kept_to() -> None:
    terms = terms_over(12, threshold=8)
    Policy(min_threshold=8).check(terms, roster_of(terms))


def test_a_member_whom_the_roster_does_not_name_or_names_with_another_key_is_refused_by_name() -> None:
    terms = terms_over(12)
    roster = roster_of(terms)
    Policy().check(terms, roster)
    for wrong in ({"client-00004": bytes(32)}, {"client-00004": b""}):
        with pytest.raises(SecureSumError, match="client client-00004 is not in this client's roster with that key"):
            Policy().check(terms, roster | wrong)
    del roster["client-00007"]
    with pytest.raises(SecureSumError, match="client client-00007 is not in this client's roster with that key"):
        Policy().check(terms, roster)
