"""What a server may try, and the refusal that each member gives: it names the reason, and no secret leaves."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregation import keys
from aggregation.ring import RingVector
from aggregation.secure_client import SecureClient, Stage, survivors_message
from aggregation.terms import Member, Policy, Terms
from contract import secagg_pb2 as pb
from contract.errors import SecureSumError
from tests.aggregation.secure_sums import ADAPTER, Cohort, cohort_of, identities_of, terms_of, vectors_of
from tests.aggregation.stages import ALL, COUNT, VICTIM, asked, confirmed, refuses, shared, uploaded, victim_of


def test_overlapping_sets_would_lay_a_vector_open() -> None:
    cohort = confirmed()
    request = asked(cohort, dropped=[3, 4])
    refuses(
        "client-0003 is named both survivor and dropped", lambda: victim_of(cohort).unmask(request), victim_of(cohort)
    )


def test_a_dropped_member_that_becomes_a_survivor() -> None:
    cohort = confirmed()
    request = asked(cohort, survivors=ALL, dropped=[])
    refuses("not those that this member confirmed", lambda: victim_of(cohort).unmask(request), victim_of(cohort))


def test_a_survivor_that_is_said_to_have_dropped_out() -> None:
    cohort = confirmed()
    request = asked(cohort, survivors=[0, 1, 2], dropped=[3, 4])
    refuses("not those that this member confirmed", lambda: victim_of(cohort).unmask(request), victim_of(cohort))


def test_a_dropped_member_that_is_passed_over() -> None:
    cohort = confirmed()
    request = asked(cohort, dropped=[])
    refuses("do not cover exactly the neighbours", lambda: victim_of(cohort).unmask(request), victim_of(cohort))


def test_asked_to_unmask_twice() -> None:
    cohort = confirmed()
    request = cohort.server.unmask_request()
    victim_of(cohort).unmask(request)
    refuses("last answered: no stage is played twice", lambda: victim_of(cohort).unmask(request), victim_of(cohort))


def test_asked_to_unmask_before_the_survivors_were_confirmed() -> None:
    cohort = uploaded(ALL[:4])
    names = sorted(cohort.members)[:4]
    message = cohort.server.survivors_message()
    for name in names[1:]:
        cohort.server.accept_confirmation(name, cohort.members[name].confirm(message))
    cohort.server.terms = replace(cohort.terms, threshold=3)
    request = cohort.server.unmask_request()
    refuses(
        "last uploaded: no stage is played twice or early", lambda: victim_of(cohort).unmask(request), victim_of(cohort)
    )


def test_a_redelivered_train_message_after_the_upload() -> None:
    cohort = uploaded()
    victim, vector = cohort.reload(VICTIM), vectors_of(cohort, 1)[VICTIM]
    kept = vector.copy()
    refuses("asked to upload a vector", lambda: victim.upload(vector, ADAPTER, cohort.server.inbox(VICTIM)), victim)
    assert (vector == kept).all()


def test_a_resumed_round_under_the_old_session() -> None:
    cohort = uploaded()
    victim = cohort.reload(VICTIM)
    refuses("asked to advertise its keys", victim.advert, victim)
    adverts = pb.Adverts(adverts=[]).SerializeToString()
    refuses("asked to share its secrets", lambda: victim.share(adverts, os.urandom), victim)


def policy_refusal(
    reason: str, cohort: Cohort, terms: Terms, policy: Policy, roster: dict[str, bytes] | None = None
) -> None:
    with pytest.raises(SecureSumError, match=reason):
        SecureClient.join(terms, VICTIM, cohort.identities[VICTIM], policy, roster or cohort.roster, os.urandom)


def test_a_lowered_threshold() -> None:
    cohort = cohort_of(12)
    policy_refusal(
        "threshold is 7 of 12; this client wants at least 9", cohort, replace(cohort.terms, threshold=7), Policy()
    )
    with pytest.raises(SecureSumError, match="threshold is 6; it must be more than half of 12"):
        replace(cohort.terms, threshold=6)


def test_a_threshold_lowered_for_some_members_only() -> None:
    cohort = cohort_of(6)
    other = Cohort(replace(cohort.terms, threshold=4), cohort.identities)
    adverts = other.advertise(other.members)
    refuses("the advert of .* is not signed", lambda: victim_of(cohort).share(adverts, os.urandom), victim_of(cohort))


def test_a_cohort_under_the_floor() -> None:
    cohort = cohort_of(9)
    policy_refusal("no sum over fewer than 10", cohort, cohort.terms, Policy())


def test_a_ring_that_is_not_safe() -> None:
    cohort = cohort_of(40)
    thin = replace(cohort.terms, degree=4, threshold=3)
    policy_refusal("4 neighbours; below 129 this client wants everybody", cohort, thin, Policy())
    policy_refusal("4 neighbours with a threshold of 3 are not safe", cohort, thin, Policy(corrupt=0.1, min_ring=2))


def test_a_ring_of_which_the_server_hears_only_whom_it_chose() -> None:
    """Ten of forty advertise, and the server's own may be among them: a member shares with no such few."""
    identities = identities_of(40)
    terms = terms_of(identities, degree=20, threshold=20)
    policy = Policy(corrupt=0.05, dropout=0.25, min_ring=2)
    cohort = Cohort(terms, identities, policy=policy)
    adverts = cohort.advertise(sorted(identities)[:29])
    victim = victim_of(cohort)
    refuses("29 adverts; this client shares with no fewer than 30", lambda: victim.share(adverts, os.urandom), victim)


def test_a_sybil_in_a_roster_that_is_pinned() -> None:
    cohort = cohort_of(10)
    pinned = dict(list(cohort.roster.items())[:9])
    policy_refusal("client-0009 is not in this client's roster", cohort, cohort.terms, Policy(), pinned)


def test_another_key_for_a_member_of_the_roster() -> None:
    cohort = cohort_of(10)
    imposter = Member("client-0003", Ed25519PrivateKey.generate().public_key().public_bytes_raw())
    members = tuple(imposter if one.client_id == imposter.client_id else one for one in cohort.terms.members)
    policy_refusal(
        "client-0003 is not in this client's roster", cohort, replace(cohort.terms, members=members), Policy()
    )


def test_adverts_replayed_from_another_attempt() -> None:
    identities = identities_of(COUNT)
    first, second = (Cohort(terms_of(identities, nonce=bytes([n]) * 16), identities) for n in (1, 2))
    replayed = first.advertise(first.members)
    refuses("is not signed by the identity", lambda: victim_of(second).share(replayed, os.urandom), victim_of(second))


def test_shares_replayed_from_another_session() -> None:
    identities = identities_of(COUNT)
    first, second = (Cohort(terms_of(identities, round=n), identities) for n in (1, 2))
    for cohort in (first, second):
        cohort.share(cohort.members, cohort.advertise(cohort.members))
    victim, vector = victim_of(second), vectors_of(second)[VICTIM]
    inbox = first.server.inbox(VICTIM)
    refuses("cannot be opened: forged", lambda: victim.upload(vector, ADAPTER, inbox), victim)


def test_shares_from_who_is_no_neighbour() -> None:
    cohort = shared(40, degree=20, threshold=12)
    inbox = pb.SealedShares.FromString(cohort.server.inbox(VICTIM))
    hood = {share.member for share in inbox.shares}
    stranger = next(number for number in range(1, 40) if number not in hood)
    inbox.shares[0].member = stranger
    victim, vector = victim_of(cohort), vectors_of(cohort)[VICTIM]
    refuses("from who is no neighbour", lambda: victim.upload(vector, ADAPTER, inbox.SerializeToString()), victim)


def test_shares_that_another_was_meant_to_get() -> None:
    cohort = shared()
    victim, vector = victim_of(cohort), vectors_of(cohort)[VICTIM]
    swapped = pb.SealedShares(
        shares=[
            *(share for share in pb.SealedShares.FromString(cohort.server.inbox("client-0001")).shares if share.member),
            next(s for s in pb.SealedShares.FromString(cohort.server.inbox(VICTIM)).shares if s.member == 1),
        ]
    ).SerializeToString()
    refuses("cannot be opened: forged, or for another place", lambda: victim.upload(vector, ADAPTER, swapped), victim)


def test_too_few_shares_to_hide_among() -> None:
    cohort = shared()
    inbox = pb.SealedShares.FromString(cohort.server.inbox(VICTIM))
    del inbox.shares[2:]
    victim, vector = victim_of(cohort), vectors_of(cohort)[VICTIM]
    refuses(
        "only 3 shared secrets; the threshold is 4",
        lambda: victim.upload(vector, ADAPTER, inbox.SerializeToString()),
        victim,
    )


@pytest.mark.parametrize("vector", [np.zeros(49, np.uint32), np.zeros(50, np.uint64), np.zeros((50, 1), np.uint32)])
def test_a_session_for_vectors_of_another_size(vector: RingVector) -> None:
    cohort = shared()
    victim = victim_of(cohort)
    refuses("sums uint32 of shape", lambda: victim.upload(vector, ADAPTER, cohort.server.inbox(VICTIM)), victim)


def test_members_given_different_adapters_neither_confirm_each_other_nor_cancel() -> None:
    cohort = shared()
    vectors = vectors_of(cohort)
    for name, client in cohort.members.items():
        adapter = "ff" * 32 if name == VICTIM else ADAPTER
        cohort.server.accept_upload(name, client.upload(vectors[name], adapter, cohort.server.inbox(name)))
    message = cohort.server.survivors_message()
    signed = {name: client.confirm(message) for name, client in cohort.members.items()}
    with pytest.raises(SecureSumError, match="the confirmation of client client-0000 is not signed"):
        cohort.server.accept_confirmation(VICTIM, signed[VICTIM])
    confirmations = [pb.Confirmation.FromString(one) for one in signed.values()]
    request = pb.UnmaskRequest(survivors=ALL, dropped=[], confirmations=confirmations).SerializeToString()
    for name, client in cohort.members.items():
        wrong = "client-0001" if name == VICTIM else VICTIM
        refuses(f"the confirmation of client {wrong} is not signed", lambda c=client: c.unmask(request), client)


def test_members_told_of_different_survivors() -> None:
    cohort = uploaded()
    told = {name: [0, 1, 2, 3] if name == VICTIM else list(ALL) for name in cohort.members}
    signed = [
        pb.Confirmation.FromString(client.confirm(pb.Survivors(members=told[name]).SerializeToString()))
        for name, client in cohort.members.items()
    ]
    request = pb.UnmaskRequest(survivors=[0, 1, 2, 3], dropped=[4], confirmations=signed).SerializeToString()
    victim = victim_of(cohort)
    refuses("the confirmation of client client-0001 is not signed", lambda: victim.unmask(request), victim)


def test_a_second_set_of_survivors_to_confirm() -> None:
    cohort = confirmed()
    victim = victim_of(cohort)
    other = pb.Survivors(members=ALL).SerializeToString()
    refuses("asked to confirm survivors, but this member last confirmed", lambda: victim.confirm(other), victim)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([0, 1, 2], "3 survivors; the threshold is 4"),
        ([1, 2, 3, 4], "this member uploaded, and is not among the survivors"),
        ([0, 1, 2, 2, 3], "not in order"),
        ([3, 2, 1, 0], "not in order"),
        ([0, 1, 2, 3, 5], "not of this session"),
    ],
)
def test_survivors_that_cannot_be(members: list[int], reason: str) -> None:
    cohort = uploaded()
    victim = victim_of(cohort)
    refuses(reason, lambda: victim.confirm(pb.Survivors(members=members).SerializeToString()), victim)


def test_a_survivor_that_never_shared_its_secrets() -> None:
    cohort = cohort_of(COUNT)
    adverts = cohort.advertise(cohort.members)
    sharing = sorted(cohort.members)[:4]
    cohort.share(sharing, adverts)
    cohort.upload(sharing, vectors_of(cohort))
    victim = victim_of(cohort)
    survivors = pb.Survivors(members=ALL).SerializeToString()
    refuses("client-0004 is named a survivor but shared no secrets", lambda: victim.confirm(survivors), victim)


def test_forged_signatures_on_the_survivors() -> None:
    cohort = confirmed()
    request = pb.UnmaskRequest.FromString(cohort.server.unmask_request())
    message = survivors_message(cohort.terms.session_id, ADAPTER, [0, 1, 2, 3])
    request.confirmations[1].signature = keys.sign(Ed25519PrivateKey.generate(), message)
    victim = victim_of(cohort)
    refuses("client-0001 is not signed", lambda: victim.unmask(request.SerializeToString()), victim)


def test_too_few_signatures_on_the_survivors_however_often_they_are_repeated() -> None:
    cohort = confirmed()
    honest = list(pb.UnmaskRequest.FromString(cohort.server.unmask_request()).confirmations)
    request = asked(cohort, confirmations=[*honest[:3], *honest[:3]])
    victim = victim_of(cohort)
    refuses("3 neighbours confirmed these survivors; the threshold is 4", lambda: victim.unmask(request), victim)


def test_shares_out_of_the_field() -> None:
    cohort = cohort_of(COUNT)
    adverts = cohort.advertise(cohort.members)
    cohort.share(cohort.members, adverts)
    liar, victim = cohort.members["client-0001"], victim_of(cohort)
    sealing_key = next(one.sealing_key for one in pb.Adverts.FromString(adverts).adverts if one.member == 0)
    key, bound_to = liar._sealing(sealing_key, 1, 0)
    sealed = keys.seal(key, b"\xff" * 32 + bytes(32), bound_to, os.urandom)
    inbox = pb.SealedShares.FromString(cohort.server.inbox(VICTIM))
    next(share for share in inbox.shares if share.member == 1).sealed = sealed
    vector = vectors_of(cohort)[VICTIM]
    reason = "a share from client client-0001 is no element of the field"
    refuses(reason, lambda: victim.upload(vector, ADAPTER, inbox.SerializeToString()), victim)


@pytest.mark.parametrize("stage", ["share", "upload", "confirm", "unmask"])
def test_bytes_that_are_no_message(stage: str) -> None:
    cohort = {"share": lambda: cohort_of(COUNT), "upload": shared, "confirm": uploaded, "unmask": confirmed}[stage]()
    victim, vector = victim_of(cohort), vectors_of(cohort)[VICTIM]
    garbage = b"\xff" * 40
    call = {
        "share": lambda: victim.share(garbage, os.urandom),
        "upload": lambda: victim.upload(vector, ADAPTER, garbage),
        "confirm": lambda: victim.confirm(garbage),
        "unmask": lambda: victim.unmask(garbage),
    }[stage]
    refuses("cannot be read", call, victim)


def test_a_session_that_was_played_leaves_nothing_to_play_again() -> None:
    cohort = cohort_of(COUNT)
    cohort.play(vectors_of(cohort))
    victim = cohort.reload(VICTIM)
    assert victim.stage is Stage.ANSWERED
    for act in (
        victim.advert,
        lambda: victim.upload(vectors_of(cohort)[VICTIM], ADAPTER, b""),
        lambda: victim.confirm(b""),
        lambda: victim.unmask(b""),
    ):
        refuses("last answered", act, victim)


def test_asked_to_train_twice_in_one_session() -> None:
    cohort = shared()
    cohort.members[VICTIM].take_turn()
    victim = cohort.reload(VICTIM)
    refuses("this session's one turn was taken before", victim.take_turn, victim)
    refuses("this session's one turn was taken before", victim.require_turn, victim)
    vectors = vectors_of(cohort)
    cohort.upload(sorted(cohort.members), vectors)
    refuses("asked to train, but this member last uploaded", cohort.reload(VICTIM).take_turn, victim_of(cohort))


def test_asked_to_train_before_the_secrets_are_shared() -> None:
    victim = victim_of(cohort_of(COUNT))
    refuses("asked to train, but this member last advertised", victim.take_turn, victim)
