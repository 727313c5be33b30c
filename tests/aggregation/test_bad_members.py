"""What a member, or a server that edits what members say, may try at the first stage and the last."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from aggregation import keys, shamir
from aggregation.secure_client import advert_message
from contract import secagg_pb2 as pb
from contract.errors import SecureSumError
from tests.aggregation.secure_sums import ADAPTER, cohort_of, vectors_of
from tests.aggregation.stages import COUNT, confirmed, refuses, victim_of


def edited(adverts: bytes, edit: Callable[[list[pb.Advert]], None]) -> bytes:
    listed = list(pb.Adverts.FromString(adverts).adverts)
    edit(listed)
    return pb.Adverts(adverts=listed).SerializeToString()


def swap(listed: list[pb.Advert]) -> None:
    listed[1].masking_key, listed[2].masking_key = listed[2].masking_key, listed[1].masking_key


def own_keys(listed: list[pb.Advert]) -> None:
    listed[1].masking_key = keys.public_bytes(os.urandom(32))


def unsigned(listed: list[pb.Advert]) -> None:
    listed[1].signature = b""


def twice(listed: list[pb.Advert]) -> None:
    listed.append(listed[1])


def unknown(listed: list[pb.Advert]) -> None:
    listed[1].member = COUNT


def short(listed: list[pb.Advert]) -> None:
    listed[1].sealing_key = listed[1].sealing_key[:31]


def without_me(listed: list[pb.Advert]) -> None:
    del listed[0]


def few(listed: list[pb.Advert]) -> None:
    del listed[2:]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (swap, "the advert of client client-0001 is not signed"),
        (own_keys, "the advert of client client-0001 is not signed"),
        (unsigned, "the advert of client client-0001 is not signed"),
        (twice, "an advert of member 1: unknown, or its second"),
        (unknown, "an advert of member 5: unknown, or its second"),
        (short, "the advert of client client-0001 holds a key that is not 32 bytes"),
        (without_me, "does not hold this member's own"),
        (few, "2 adverts; the threshold is 4"),
    ],
)
def test_adverts_that_were_tampered_with(edit: Callable[[list[pb.Advert]], None], reason: str) -> None:
    cohort = cohort_of(COUNT)
    adverts = edited(cohort.advertise(cohort.members), edit)
    refuses(reason, lambda: victim_of(cohort).share(adverts, os.urandom), victim_of(cohort))


def test_a_member_that_copies_anothers_keys() -> None:
    cohort = cohort_of(COUNT)
    listed = {one.member: one for one in pb.Adverts.FromString(cohort.advertise(cohort.members)).adverts}
    copied = pb.Advert()
    copied.CopyFrom(listed[1])
    copied.member = 2
    copied.signature = keys.sign(cohort.identities["client-0002"], advert_message(cohort.terms.session_id, copied))
    adverts = pb.Adverts(adverts=[listed[0], listed[1], copied, listed[3], listed[4]]).SerializeToString()
    refuses(
        "client-0002 repeats another's key", lambda: victim_of(cohort).share(adverts, os.urandom), victim_of(cohort)
    )


def test_the_server_names_the_member_whose_share_was_false() -> None:
    cohort = confirmed()
    request = cohort.server.unmask_request()
    for number, name in enumerate(sorted(cohort.members)[:4]):
        answer = pb.UnmaskAnswer.FromString(cohort.members[name].unmask(request))
        if number == 2:
            value = (shamir.element(answer.seeds[1].value, "it") + 1) % shamir.PRIME
            answer.seeds[1].value = value.to_bytes(32, "big")
        cohort.server.accept_answer(name, answer.SerializeToString())
    with pytest.raises(SecureSumError, match="the shares of client client-0001's seed do not give it"):
        cohort.server.finish()


def test_what_comes_after_its_stage_is_refused_and_changes_nothing() -> None:
    cohort = cohort_of(COUNT)
    names = sorted(cohort.members)
    adverts = cohort.advertise(names)
    late_shares = cohort.members[names[4]].share(adverts, os.urandom)
    cohort.share(names[:4], adverts)
    cohort.upload(names[:3], vectors_of(cohort))
    with pytest.raises(SecureSumError, match="client-0004 shared its secrets too late"):
        cohort.server.accept_shares(names[4], late_shares)
    late_vector = cohort.members[names[3]].upload(vectors_of(cohort)[names[3]], ADAPTER, cohort.server.inbox(names[3]))
    with pytest.raises(SecureSumError, match="only 3 of 5 uploaded a vector; threshold 4"):
        cohort.server.survivors_message()
    cohort.server.accept_upload(names[3], late_vector)
    cohort.server.survivors_message()
    with pytest.raises(SecureSumError, match="uploaded a vector already"):
        cohort.server.accept_upload(names[3], late_vector)


def test_a_sum_is_told_once() -> None:
    cohort = cohort_of(COUNT)
    cohort.play(vectors_of(cohort))
    with pytest.raises(SecureSumError, match="that stage has ended"):
        cohort.server.finish()


@pytest.mark.parametrize("key", [bytes(32), (1).to_bytes(32, "little"), b"short"])
@pytest.mark.parametrize("which", ["sealing_key", "masking_key"])
def test_a_member_with_a_key_that_stops_the_others_is_left_out(which: str, key: bytes) -> None:
    cohort = cohort_of(COUNT)
    advert = pb.Advert.FromString(cohort.members["client-0002"].advert())
    setattr(advert, which, key)
    advert.signature = keys.sign(cohort.identities["client-0002"], advert_message(cohort.terms.session_id, advert))
    with pytest.raises(SecureSumError, match="client-0002"):
        cohort.server.accept_advert("client-0002", advert.SerializeToString())
    total = cohort.play(vectors_of(cohort), [{"client-0002"}])
    assert total.size == cohort.terms.size
