"""A secure sum is the plain sum in the ring, bit for bit, whoever drops out, or it is none at all."""

from __future__ import annotations

import os
from itertools import chain, combinations, product

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregation.ring import FixedPoint, plan
from contract.errors import SecureSumError
from tests.aggregation.secure_sums import Cohort, cohort_of, identities_of, plain_sum, terms_of, vectors_of

STAGES = 5
CLIP = 1.0
MAX_WEIGHT = 1000
# The full figure, for a release: TRUNKLINE_SUM_CASES=10000.
CASES = int(os.environ.get("TRUNKLINE_SUM_CASES", "500"))


@st.composite
def sessions(draw: st.DrawFn) -> tuple[Cohort, dict[str, np.ndarray], list[set[str]], FixedPoint, dict[str, int]]:
    """A cohort, encoded updates of weighted clients, and who is gone from which stage on, a threshold staying."""
    count = draw(st.integers(2, 6))
    seed = draw(st.integers(0, 2**32 - 1))
    threshold = draw(st.integers(count // 2 + 1, count))
    size = draw(st.integers(1, 40))
    identities = identities_of(count, draw(st.integers(0, 3)))
    cohort = Cohort(terms_of(identities, threshold=threshold, size=size + 1, round=seed), identities)
    fixed_point = plan(count, MAX_WEIGHT, CLIP)
    rng = np.random.default_rng(seed)
    weights = {client_id: draw(st.integers(1, MAX_WEIGHT)) for client_id in identities}
    vectors = {
        client_id: fixed_point.encode(rng.uniform(-CLIP, CLIP, size), weight) for client_id, weight in weights.items()
    }
    leaving = draw(st.lists(st.sampled_from(sorted(identities)), max_size=count - threshold, unique=True))
    gone: list[set[str]] = [set() for _ in range(STAGES)]
    for client_id in leaving:
        gone[draw(st.integers(0, STAGES - 1))].add(client_id)
    return cohort, vectors, gone, fixed_point, weights


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(sessions())
def test_the_sum_is_the_plain_sum_and_decodes_to_the_weighted_mean(
    session: tuple[Cohort, dict[str, np.ndarray], list[set[str]], FixedPoint, dict[str, int]],
) -> None:
    cohort, vectors, gone, fixed_point, weights = session
    total = cohort.play(vectors, gone)
    survivors = cohort.server.survivors
    assert set(survivors) == set(vectors) - gone[0] - gone[1] - gone[2]
    assert total.tobytes() == plain_sum(cohort, vectors, survivors).tobytes()
    _, weight_sum = fixed_point.decode(total)  # type: ignore[arg-type]
    assert weight_sum == sum(weights[client_id] for client_id in survivors)


def subsets(names: list[str], most: int) -> list[tuple[str, ...]]:
    return list(chain.from_iterable(combinations(names, size) for size in range(most + 1)))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_every_set_of_dropouts_at_every_stage(count: int) -> None:
    identities = identities_of(count)
    terms = terms_of(identities, size=3)
    names, spare = sorted(identities), count - terms.threshold
    for number, (who, stage) in enumerate(product(subsets(names, count), range(STAGES))):
        cohort = Cohort(terms_of(identities, size=3, round=number), identities)
        vectors = vectors_of(cohort, number)
        gone = [set(who) if at == stage else set() for at in range(STAGES)]
        if len(who) > spare:
            with pytest.raises(SecureSumError, match="threshold"):
                cohort.play(vectors, gone)
            continue
        total = cohort.play(vectors, gone)
        survivors = [name for name in names if name not in who or stage > 2]
        assert list(cohort.server.survivors) == survivors
        assert (total == plain_sum(cohort, vectors, survivors)).all()


@pytest.mark.parametrize("stage", range(STAGES))
def test_three_in_ten_of_fifty_may_drop_out_at_a_stage(stage: int) -> None:
    cohort = cohort_of(50)
    vectors = vectors_of(cohort)
    gone = [set(sorted(cohort.identities)[3:18]) if at == stage else set() for at in range(STAGES)]
    total = cohort.play(vectors, gone)
    assert len(cohort.server.survivors) == (35 if stage <= 2 else 50)
    assert (total == plain_sum(cohort, vectors, cohort.server.survivors)).all()


@pytest.mark.parametrize("stage", range(STAGES))
def test_seventeen_of_fifty_are_too_many_and_nothing_is_told(stage: int) -> None:
    cohort = cohort_of(50)
    gone = [set(sorted(cohort.identities)[:17]) if at == stage else set() for at in range(STAGES)]
    with pytest.raises(SecureSumError, match="threshold"):
        cohort.play(vectors_of(cohort), gone)


@pytest.mark.parametrize("bits", [32, 64])
def test_members_with_few_neighbours_give_the_same_sum(bits: int) -> None:
    cohort = cohort_of(40, degree=20, threshold=12, ring_bits=bits)
    vectors = vectors_of(cohort)
    names = sorted(cohort.identities)
    total = cohort.play(vectors, [{names[0]}, {names[7]}, {names[20], names[21]}, {names[30]}])
    assert len(cohort.server.survivors) == 36
    assert (total == plain_sum(cohort, vectors, cohort.server.survivors)).all()


def test_no_upload_is_what_the_member_wanted_to_hide() -> None:
    cohort = cohort_of(3, size=4096)
    cohort.share(cohort.members, cohort.advertise(cohort.members))
    zeros = np.zeros(4096, dtype=np.uint32)
    uploads = [
        client.upload(zeros.copy(), "ad" * 32, cohort.server.inbox(name)) for name, client in cohort.members.items()
    ]
    assert all(len(set(upload)) == 256 for upload in uploads)
    assert len(set(uploads)) == 3


def test_a_finished_member_keeps_no_secret() -> None:
    cohort = cohort_of(4)
    started = {name: cohort.members[name]._state for name in cohort.identities}
    secrets = {name: (one.seed, one.masking_secret, one.sealing_secret) for name, one in started.items()}
    cohort.play(vectors_of(cohort))
    for name, client in cohort.members.items():
        kept = client.to_bytes()
        assert all(len(secret) == 32 and secret not in kept for secret in secrets[name])


def test_a_member_of_another_identity_cannot_join() -> None:
    cohort = cohort_of(3)
    stranger = Ed25519PrivateKey.generate()
    cohort.identities = {**cohort.identities, "client-0001": stranger}
    with pytest.raises(SecureSumError, match="another identity key for client client-0001 than its own"):
        cohort.join("client-0001")
