from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from itertools import count, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation import secure_client
from aggregation.masks import add_mask
from aggregation.ring import RingVector
from aggregation.secure_client import pair_mask_key, self_mask_key
from aggregation.terms import Terms
from tests.aggregation.secure_sums import Cohort, cohort_of, identities_of, terms_of, vectors_of

# Masks are made 2^18 bytes at a time: 65536 elements of 32 bits, 32768 of 64.
EDGES = {32: (65535, 65536, 65537, 131073), 64: (32767, 32768, 32769, 65537)}
SIZES = [(bits, size) for bits, edges in EDGES.items() for size in (1, 2, 3, 7, *edges)]
keys_of_masks = st.binary(min_size=32, max_size=32)


def drawn(bits: int, size: int, seed: int = 0) -> RingVector:
    kind = np.uint32 if bits == 32 else np.uint64
    return np.random.default_rng(seed).integers(0, 1 << bits, size, dtype=kind)


def mask(bits: int, size: int, key: bytes) -> RingVector:
    vector = np.zeros(size, dtype=f"uint{bits}")
    add_mask(vector, key)
    return vector


@given(st.sampled_from(SIZES), keys_of_masks, st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_mask_added_and_taken_away_leaves_every_bit_as_it_was(
    shape: tuple[int, int], key: bytes, negative_first: bool
) -> None:
    before = drawn(*shape)
    vector = before.copy()
    add_mask(vector, key, negative=negative_first)
    assert vector.size < 4 or not np.array_equal(vector, before)
    add_mask(vector, key, negative=not negative_first)
    np.testing.assert_array_equal(vector, before)
    assert vector.dtype == before.dtype


@given(st.sampled_from(SIZES), keys_of_masks)
@settings(max_examples=40, deadline=None)
def test_a_mask_is_added_modulo_the_ring_whatever_it_is_added_to(shape: tuple[int, int], key: bytes) -> None:
    bits, size = shape
    vector = drawn(bits, size)
    expected = [(int(a) + int(b)) % 2**bits for a, b in zip(vector[-5:], mask(bits, size, key)[-5:], strict=True)]
    add_mask(vector, key)
    assert vector[-5:].tolist() == expected


@given(st.sampled_from(SIZES), keys_of_masks, st.data())
@settings(max_examples=40, deadline=None)
def test_the_mask_of_a_longer_vector_begins_with_that_of_a_shorter_one(
    shape: tuple[int, int], key: bytes, data: st.DataObject
) -> None:
    bits, size = shape
    shorter = data.draw(st.integers(1, size))
    np.testing.assert_array_equal(mask(bits, size, key)[:shorter], mask(bits, shorter, key))


@given(keys_of_masks)
@settings(max_examples=10, deadline=None)
def test_no_piece_of_a_mask_repeats_another(key: bytes) -> None:
    pieces = mask(32, 3 * 65536, key).reshape(3, 65536)
    assert len({piece.tobytes() for piece in pieces}) == 3


@given(keys_of_masks, st.integers(0, 255))
@settings(max_examples=40, deadline=None)
def test_another_key_makes_another_mask(key: bytes, bit: int) -> None:
    other = (int.from_bytes(key, "big") ^ (1 << bit)).to_bytes(32, "big")
    assert not np.any(mask(64, 100, key) == mask(64, 100, other))


def chi_square_p(data: bytes | npt.NDArray[np.uint8]) -> float:
    """How probable a histogram of bytes this uneven is if all are equally likely, by Wilson and Hilferty's cube root.

    "The Distribution of Chi-Square" (PNAS 1931): (X / k)^(1/3) is nearly normal about 1 - 2 / 9k with variance 2 / 9k.
    """
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    expected = counts.sum() / 256
    return chi_square_tail(float(((counts - expected) ** 2).sum() / expected), 255)


def chi_square_tail(statistic: float, freedom: int) -> float:
    spread = 2 / (9 * freedom)
    return math.erfc((math.cbrt(statistic / freedom) - (1 - spread)) / math.sqrt(2 * spread)) / 2


def test_the_tail_of_chi_square_is_that_of_its_tables() -> None:
    # Upper quantiles of 255 degrees of freedom: 50 %, 5 %, 1 %, 0.1 %.
    for statistic, tail in ((254.334, 0.5), (293.248, 0.05), (310.457, 0.01), (330.520, 0.001)):
        assert chi_square_tail(statistic, 255) == pytest.approx(tail, rel=0.02)


def test_the_flatness_test_tells_a_plain_vector_and_a_tilted_byte() -> None:
    assert chi_square_p(small_numbers(1 << 16, 0).tobytes()) < 1e-300
    tilted = drawn(32, 1 << 18).view(np.uint8)
    assert chi_square_p(tilted) > 1e-6
    tilted[:8000] = 77
    assert chi_square_p(tilted) < 1e-6


def small_numbers(size: int, seed: int) -> npt.NDArray[np.uint32]:
    """As fixed point encodes small updates: near zero on both sides, so that the upper bytes are 00 or ff."""
    steps = np.random.default_rng(seed).normal(0, 300, size).astype(np.int32)
    return steps.view(np.uint32)


def seeded(label: str) -> Callable[[int], bytes]:
    """Entropy that is the same in every run of the tests."""
    calls = count()
    return lambda size: hashlib.shake_256(f"{label} {next(calls)}".encode()).digest(size)


def seeded_cohort(clients: int, label: str = "masks", **changes: object) -> Cohort:
    identities = identities_of(clients)
    return Cohort(terms_of(identities, **changes), identities, entropy=seeded(label))


def uploads_of(cohort: Cohort, vectors: dict[str, RingVector]) -> dict[str, RingVector]:
    everybody = sorted(cohort.identities)
    cohort.share(everybody, cohort.advertise(everybody))
    kind = "<u4" if cohort.terms.ring_bits == 32 else "<u8"
    uploads = {}
    for client_id in everybody:
        sent = cohort.members[client_id].upload(vectors[client_id].copy(), "ad" * 32, cohort.server.inbox(client_id))
        uploads[client_id] = np.frombuffer(sent, dtype=kind)
    return uploads


@pytest.mark.parametrize("clients", [2, 5])
def test_the_bytes_of_two_uploads_their_difference_and_their_sum_are_flat(clients: int) -> None:
    """With two clients the pair's mask cancels in the sum, and only their own masks are left to hide it."""
    cohort = seeded_cohort(clients, size=1 << 18)
    vectors = {client_id: small_numbers(1 << 18, seed) for seed, client_id in enumerate(cohort.identities)}
    one, other = list(uploads_of(cohort, vectors).values())[:2]
    for seen in (one, other, one - other, one + other):
        assert chi_square_p(seen.tobytes()) > 1e-6
        for place in range(4):
            assert chi_square_p(np.ascontiguousarray(seen.view(np.uint8)[place::4])) > 1e-6


def test_two_attempts_with_the_very_same_secrets_and_vectors_upload_nothing_alike() -> None:
    """A member's entropy that repeats is the worst case: the session's id must part the masks even then."""
    vectors = {client_id: small_numbers(1 << 16, seed) for seed, client_id in enumerate(identities_of(3))}
    first = uploads_of(seeded_cohort(3, size=1 << 16), vectors)
    again = uploads_of(seeded_cohort(3, size=1 << 16), vectors)
    other = uploads_of(seeded_cohort(3, size=1 << 16, nonce=b"\1" + bytes(15)), vectors)
    for client_id, upload in first.items():
        np.testing.assert_array_equal(upload, again[client_id])
        assert chi_square_p((upload - other[client_id]).tobytes()) > 1e-6


SESSIONS = {
    "first": {},
    "next round": {"round": 2},
    "next attempt": {"nonce": b"\1" + bytes(15)},
    "other run": {"run": "another run"},
    "other model": {"model_fingerprint": "e" * 64},
    "other settings": {"settings_sha256": "6" * 64},
    "other threshold": {"threshold": 5},
    "other size": {"size": 51},
    "other ring": {"ring_bits": 64},
    "other graph": {"degree": 2, "threshold": 2},
}


def test_no_two_masks_of_any_rounds_attempts_runs_adapters_or_pairs_have_the_same_key() -> None:
    secret = bytes(range(32))  # the same for all of them
    made = []
    identities = identities_of(5)
    for changes, adapter in product(SESSIONS.values(), ("ad" * 32, "ae" * 32, "")):
        session_id = terms_of(identities, **changes).session_id
        made += [self_mask_key(secret, session_id, member, adapter) for member in range(12)]
        made += [pair_mask_key(secret, session_id, a, b, adapter) for b in range(12) for a in range(b)]
    assert len(set(made)) == len(made) == len(SESSIONS) * 3 * (12 + 66)


@given(st.integers(0, 2**14), st.integers(0, 2**14), keys_of_masks)
@settings(max_examples=50, deadline=None)
def test_both_of_a_pair_derive_the_same_key(one: int, other: int, agreed: bytes) -> None:
    session_id = bytes(32)
    assert pair_mask_key(agreed, session_id, one, other, "ad") == pair_mask_key(agreed, session_id, other, one, "ad")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bool]]:
    """Every key that members make a mask of, and whether it is taken away."""
    seen: list[tuple[bytes, bool]] = []

    def spy(vector: RingVector, key: bytes, *, negative: bool = False) -> None:
        seen.append((key, negative))
        add_mask(vector, key, negative=negative)

    monkeypatch.setattr(secure_client, "add_mask", spy)
    return seen


def test_in_a_session_each_own_key_is_used_once_and_each_pair_key_by_its_two_with_opposite_signs(
    used: list[tuple[bytes, bool]],
) -> None:
    cohort = cohort_of(6)
    uploads_of(cohort, vectors_of(cohort))
    assert len(set(used)) == len(used) == 6 + 6 * 5
    signs: dict[bytes, list[bool]] = {}
    for key, negative in used:
        signs.setdefault(key, []).append(negative)
    assert sorted(sorted(both) for both in signs.values()) == [[False]] * 6 + [[False, True]] * 15


def test_sessions_with_repeated_secrets_share_no_key(used: list[tuple[bytes, bool]]) -> None:
    by_session: list[set[bytes]] = []
    for changes in SESSIONS.values():
        cohort = seeded_cohort(5, label="the same", **changes)
        uploads_of(cohort, vectors_of(cohort))
        by_session.append({key for key, _ in used})
        used.clear()
    assert len(set.union(*by_session)) == sum(map(len, by_session))


def test_the_sum_of_all_pair_masks_is_zero() -> None:
    cohort = seeded_cohort(7, size=65537)
    zero = {client_id: np.zeros(65537, dtype=np.uint32) for client_id in cohort.identities}
    total = np.add.reduce(list(uploads_of(cohort, zero).values()), dtype=np.uint32)
    own = own_masks(cohort.terms, seeded("masks"))
    np.testing.assert_array_equal(total, own)


def own_masks(terms: Terms, entropy: Callable[[int], bytes]) -> RingVector:
    """The sum of the members' own masks: each drew two keys and then its seed."""
    total = np.zeros(terms.size, dtype=np.uint32)
    for member in range(len(terms.members)):
        seed = [entropy(32) for _ in range(3)][2]
        add_mask(total, self_mask_key(seed, terms.session_id, member, "ad" * 32))
    return total
