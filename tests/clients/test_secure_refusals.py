"""What a site refuses in secure sums, each by name, and that nothing of its secrets is drawn or lost by a refusal."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregation import tally
from aggregation.ring import RingVector
from aggregation.secure_client import Stage
from aggregation.terms import Terms
from contract import secagg_pb2 as pb
from contract.config import RunConfig
from contract.errors import ConfigError, IntegrityError, SecureSumError, StorageError, TrunklineError
from contract.records import Factor, RoundKey
from tests.clients.secure_sites import (
    ADAPTER,
    CONFIG,
    FINGERPRINT,
    RUN,
    VALUES,
    WEIGHT,
    SecureSession,
    SecureSites,
    counts_of,
    ring_sum,
    vectors_of,
)

FIRST = "site-0"


@pytest.fixture
def sites(tmp_path: Path) -> SecureSites:
    return SecureSites(tmp_path)


def join(sites: SecureSites, terms: Terms, config: RunConfig = CONFIG) -> bytes:
    return sites.process(FIRST).join(terms.to_bytes(), config)


def refuses_to_join(
    reason: str,
    sites: SecureSites,
    terms: Terms,
    config: RunConfig = CONFIG,
    kind: type[TrunklineError] = SecureSumError,
) -> None:
    """The refusal, and that the site has no part in that session afterwards."""
    with pytest.raises(kind, match=reason):
        join(sites, terms, config)
    assert not sites.process(FIRST).vault.knows(terms.session_id)


def test_a_site_joins_a_session_once(sites: SecureSites) -> None:
    terms = sites.terms()
    join(sites, terms)
    kept = sites.files(FIRST)
    with pytest.raises(SecureSumError, match="has joined that session before: a round tried again is a new session"):
        join(sites, terms)
    assert sites.files(FIRST) == kept


def test_a_session_for_other_settings_is_refused(sites: SecureSites) -> None:
    reason = "made for other settings than this client was given"
    refuses_to_join(reason, sites, sites.terms(settings_sha256="5" * 64))
    refuses_to_join(reason, sites, sites.terms(), config=CONFIG.model_copy(update={"learning_rate": 1.0}))


def test_a_session_in_another_ring_than_the_settings_need_is_refused(sites: SecureSites) -> None:
    reason = rf"sums in Z_2\^64; 4 clients of up to {WEIGHT} tokens sum in Z_2\^32: in another ring"
    refuses_to_join(reason, sites, sites.terms(ring_bits=64))
    sites.config = RunConfig.from_flower({"max-tokens": 1 << 26})
    sites.node_config["secagg-max-weight"] = 1 << 26
    reason = r"sums in Z_2\^32; 4 clients of up to 67108864 tokens sum in Z_2\^64"
    refuses_to_join(reason, sites, sites.terms(ring_bits=32), sites.config)
    assert join(sites, sites.terms(ring_bits=64), sites.config)


def test_a_run_in_which_one_client_may_weigh_more_than_the_policy_lets_it_is_refused(sites: SecureSites) -> None:
    sites.node_config["secagg-max-weight"] = WEIGHT - 1
    reason = f"train on {WEIGHT} tokens in a round; this client takes part with no more than {WEIGHT - 1} .secagg-max"
    refuses_to_join(reason, sites, sites.terms())
    sites.node_config["secagg-max-weight"] = WEIGHT
    assert join(sites, sites.terms())


def test_a_cohort_under_the_policys_floor_is_refused(sites: SecureSites) -> None:
    for floor in (5, 10):
        sites.node_config["secagg-min-members"] = floor
        refuses_to_join(f"the session has 4 members; .* no sum over fewer than {floor}", sites, sites.terms())
    del sites.node_config["secagg-min-members"]
    refuses_to_join("no sum over fewer than 10", sites, sites.terms())


def test_a_threshold_under_the_policys_floor_is_refused(tmp_path: Path) -> None:
    sites = SecureSites(tmp_path, count=7)
    refuses_to_join("threshold is 4 of 7; this client wants at least 5", sites, sites.terms(threshold=4))
    sites.node_config["secagg-min-threshold"] = 6
    refuses_to_join("threshold is 5 of 7; this client wants at least 6", sites, sites.terms(threshold=5))
    assert join(sites, sites.terms(threshold=6))


def test_a_session_that_does_not_name_the_sites_key_is_refused(tmp_path: Path) -> None:
    sites = SecureSites(tmp_path, count=5)
    terms = sites.terms(*sites.names[1:])
    refuses_to_join("the session does not name this client's identity key", sites, terms)


def test_a_member_that_the_pinned_roster_does_not_hold_is_refused(sites: SecureSites) -> None:
    sites.pin(version=1, names=sites.names[:3])
    refuses_to_join("client site-3 is not in this client's roster with that key", sites, sites.terms())
    impostor = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    sites.pin(version=2)
    terms = sites.terms()
    members = tuple(replace(one, identity_key=impostor) if one.client_id == "site-2" else one for one in terms.members)
    refuses_to_join(
        "client site-2 is not in this client's roster with that key", sites, replace(terms, members=members)
    )
    assert join(sites, terms)


def test_a_roster_older_than_one_that_was_seen_is_refused_by_every_later_process(sites: SecureSites) -> None:
    sites.pin(version=2)
    join(sites, sites.terms())
    sites.pin(version=1)
    reason = "roster.json: version is 1, but version 2 was seen before: it is an old one"
    refuses_to_join(reason, sites, sites.terms(round=2), kind=IntegrityError)
    sites.pin(version=2)
    assert join(sites, sites.terms(round=2))


def test_a_roster_that_another_key_signed_is_refused_and_its_version_forgotten(sites: SecureSites) -> None:
    sites.pin(version=9, signing_key=Ed25519PrivateKey.generate())
    refuses_to_join("roster.json is not signed by ed25519:", sites, sites.terms(), kind=IntegrityError)
    assert sites.process(FIRST).vault.roster_version() == 0


def test_a_site_whose_pinned_roster_is_gone_takes_nobodys_word_instead(sites: SecureSites) -> None:
    sites.pin(version=1)
    (sites.folder / "roster.json").unlink()
    refuses_to_join("cannot read the roster .*roster.json", sites, sites.terms(), kind=ConfigError)


def test_a_site_that_is_enrolled_later_is_known_without_another_node_config(sites: SecureSites) -> None:
    sites.pin(version=1)
    before = dict(sites.node_config)
    sites.enrol("site-4")
    terms = sites.terms(*sites.names, "site-4")
    refuses_to_join("client site-4 is not in this client's roster", sites, terms)
    sites.pin(version=2)
    assert sites.node_config == before
    assert join(sites, terms)


def test_a_site_without_a_roster_says_whose_word_it_takes(sites: SecureSites, caplog: pytest.LogCaptureFixture) -> None:
    join(sites, sites.terms())
    (warned,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned.startswith("secure sum over 4 clients: no roster is pinned in this node's config")
    assert "and not the orchestrator's own, is the orchestrator's word" in warned
    caplog.clear()
    sites.pin(version=1)
    join(sites, sites.terms(round=2))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_train_order_before_the_secrets_are_shared_is_refused(sites: SecureSites) -> None:
    session = SecureSession(sites, sites.terms())
    with pytest.raises(SecureSumError, match="this client has not joined it"):
        sites.process(FIRST).require_ready(session.session_id)
    session.join(FIRST)
    with pytest.raises(SecureSumError, match="asked to train, but this member last advertised: no stage is played"):
        sites.process(FIRST).require_ready(session.session_id)


def test_a_train_order_after_the_upload_is_refused(sites: SecureSites) -> None:
    session = SecureSession(sites, sites.terms())

    def refused(reason: str) -> None:
        with pytest.raises(SecureSumError, match=reason):
            session.check(FIRST)

    session.set_up()
    vectors, counts = vectors_of(sites.names), counts_of(sites.names)
    turn = session.turn(FIRST)
    session.upload(vectors, counts)
    refused("asked to train, but this member last uploaded: no stage is played twice")
    with pytest.raises(SecureSumError, match="asked to upload a vector, but this member last uploaded"):
        turn.upload(ADAPTER, vectors[FIRST].copy(), counts[FIRST])
    session.confirm(sites.names)
    refused("asked to train, but this member last confirmed")
    session.unmask(sites.names)
    refused("has ended for this client: it is not played again")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_a_session_has_one_turn_whatever_came_of_it(sites: SecureSites, first: bool, second: bool) -> None:
    """Else a server could ask again with another adapter for as long as the training fails, and learn each time."""
    session = SecureSession(sites, sites.terms())
    session.set_up()
    session.check(FIRST, training=first)
    for _ in range(2):
        with pytest.raises(SecureSumError, match="this session's one turn was taken before, .* is a new session"):
            session.check(FIRST, training=second)


def test_the_turn_that_was_taken_still_brings_its_vector(sites: SecureSites) -> None:
    session = SecureSession(sites, sites.terms())
    session.set_up()
    for name in sites.names:
        session.check(name)
        assert sites.kept(name, session.session_id).attempted
    vectors, counts = vectors_of(sites.names), counts_of(sites.names)
    for name in sites.names:
        session.server.accept_upload(name, session.turn(name).upload(ADAPTER, vectors[name].copy(), counts[name]))
    session.confirm(sites.names)
    assert (session.unmask(sites.names)[: -tally.SIZE] == ring_sum(vectors, sites.names)).all()


def test_a_turn_that_is_not_durable_is_not_taken(sites: SecureSites, monkeypatch: pytest.MonkeyPatch) -> None:
    session = SecureSession(sites, sites.terms())
    session.set_up()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            session.check(FIRST)
    session.check(FIRST)


FACTS: dict[str, dict[str, Any]] = {
    "run": {"key": RoundKey("another run", 1, 1)},
    "number": {"key": RoundKey(RUN, 2, 1)},
    "factor": {"factor": "AB"},
    "number of clients": {"clients": 5},
    "model fingerprint": {"fingerprint": "e" * 64},
    "settings' hash": {"config": CONFIG.model_copy(update={"learning_rate": 1.0})},
}


@pytest.mark.parametrize("fact", FACTS)
def test_a_round_that_is_not_the_one_the_site_agreed_to_is_refused(sites: SecureSites, fact: str) -> None:
    session = SecureSession(sites, sites.terms())
    session.set_up()
    agreed: dict[str, Any] = {
        "key": RoundKey(RUN, 1, 1),
        "config": CONFIG,
        "factor": "B",
        "clients": 4,
        "fingerprint": FINGERPRINT,
        "training": True,
    }
    with pytest.raises(SecureSumError, match=f"the round's {fact} is .*, but the session that it was joined for has"):
        session.turn(FIRST).check(**(agreed | FACTS[fact]))
    session.turn(FIRST).check(**agreed)  # an order that was not worked for cost no turn


def test_the_factor_is_the_one_that_the_rounds_number_says(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"aggregation": "rolora"})
    sites = SecureSites(tmp_path, config=config)
    trains, judges = (SecureSession(sites, sites.terms(round=2, nonce=bytes([number] * 16))) for number in (1, 2))

    def check(session: SecureSession, factor: Factor, *, training: bool) -> None:
        session.turn(FIRST).check(RoundKey(RUN, 2, 1), config, factor, 4, FINGERPRINT, training=training)

    trains.set_up()
    with pytest.raises(SecureSumError, match="the round's factor is B, but the session that it was joined for has A"):
        check(trains, "B", training=True)
    check(trains, "A", training=True)
    judges.set_up()
    check(judges, "B", training=False)


def test_a_vector_of_another_size_than_was_agreed_is_refused(sites: SecureSites) -> None:
    session = SecureSession(sites, sites.terms())
    session.set_up()
    vector = vectors_of([FIRST])[FIRST]
    longer: RingVector = np.zeros(VALUES + 1, dtype=np.uint32)
    for wrong in (None, vector[:-1], longer):
        with pytest.raises(SecureSumError, match=rf"this session sums uint32 of shape \({VALUES + tally.SIZE},\)"):
            session.turn(FIRST).upload(ADAPTER, wrong, {})
    assert sites.kept(FIRST, session.session_id).stage == Stage.SHARED


def next_to(session: SecureSession) -> SecureSession:
    return SecureSession(session.sites, session.sites.terms(round=session.terms.round + 1))


def test_a_refusal_of_the_next_session_costs_the_present_one_no_confirmation(sites: SecureSites) -> None:
    present = SecureSession(sites, sites.terms())
    present.set_up()
    present.upload(vectors_of(sites.names), counts_of(sites.names))
    following = next_to(present)
    following.join(FIRST)
    survivors = present.server.survivors_message()
    reply = present.ask(
        FIRST, session=present.session_id, confirm=survivors, next_session=following.session_id, share=b"no adverts"
    )
    assert reply.refusal == "the list of adverts cannot be read"
    assert reply.shares == b""
    present.server.accept_confirmation(FIRST, reply.confirmation)
    assert sites.kept(FIRST, present.session_id).stage == Stage.CONFIRMED
    assert sites.kept(FIRST, following.session_id).stage == Stage.ADVERTISED


def test_a_refusal_of_the_next_session_costs_the_present_one_no_answer(sites: SecureSites) -> None:
    present = SecureSession(sites, sites.terms())
    present.set_up()
    vectors, counts = vectors_of(sites.names), counts_of(sites.names)
    present.upload(vectors, counts)
    present.confirm(sites.names)
    request = present.server.unmask_request()
    foul = sites.terms(round=2, threshold=4, settings_sha256="5" * 64)
    for name in sites.names:
        reply = present.ask(name, session=present.session_id, unmask=request, join=foul.to_bytes())
        assert reply.refusal == "the session was made for other settings than this client was given"
        assert reply.advert == b""
        present.server.accept_answer(name, reply.answer)
    assert (present.server.finish()[: -tally.SIZE] == ring_sum(vectors, sites.names)).all()


def test_a_refusal_is_told_as_one_line_and_logged(sites: SecureSites, caplog: pytest.LogCaptureFixture) -> None:
    sites.pin(version=1)
    sites.node_config["roster"] = str(sites.folder / "no such\nroster")
    session = SecureSession(sites, sites.terms())
    reply = session.join(FIRST)
    assert "no such roster: No such file" in reply.refusal
    assert reply.advert == b""
    assert f"no part in the next secure sum: {reply.refusal}" in caplog.messages


def test_what_is_refused_of_the_present_session_is_an_error_and_keeps_it_as_it_was(sites: SecureSites) -> None:
    session = SecureSession(sites, sites.terms())
    session.set_up()
    session.upload(vectors_of(sites.names), counts_of(sites.names))
    kept = sites.files(FIRST)
    without_it = pb.Survivors(members=[1, 2, 3]).SerializeToString()
    with pytest.raises(SecureSumError, match="not among the survivors that it is asked to confirm"):
        session.ask(FIRST, session=session.session_id, confirm=without_it, join=sites.terms(round=2).to_bytes())
    with pytest.raises(SecureSumError, match="asked to help to unmask, but this member last uploaded"):
        session.ask(FIRST, session=session.session_id, unmask=b"any")
    with pytest.raises(SecureSumError, match="this client has not joined it"):
        session.ask(FIRST, session=bytes(32), confirm=session.server.survivors_message())
    assert sites.files(FIRST) == kept
