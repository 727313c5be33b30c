"""Whole secure sums by sites that are a new process for every message, and what is left of them on their disks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aggregation import keys, tally
from aggregation.secure_client import Stage
from aggregation.terms import greeting_message
from clients.secure import STALE_S, open_secure_site
from clients.site import read_site
from contract.config import ConfigValue
from contract.durable_file import PARTIAL_PREFIX
from contract.errors import ConfigError, SecureSumError, StorageError
from tests.clients.secure_sites import (
    ADAPTER,
    CONFIG,
    RUN,
    SecureSession,
    SecureSites,
    counts_of,
    node_id,
    ring_sum,
    totals_of,
    vectors_of,
)

REPOSITORY = Path(__file__).resolve().parents[2]
FIRST = "site-0"


@pytest.fixture
def sites(tmp_path: Path) -> SecureSites:
    return SecureSites(tmp_path)


def secrets_of(session: SecureSession, name: str) -> dict[str, bytes]:
    state = session.sites.kept(name, session.session_id)
    secrets = {what: getattr(state, what) for what in ("sealing_secret", "masking_secret", "seed")}
    assert all(len(secret) == 32 for secret in secrets.values())
    return secrets


def laid_open(session: SecureSession, name: str, secrets: dict[str, bytes]) -> dict[str, str]:
    """Which of the secrets is in which file of the site."""
    return {
        what: file
        for file, data in session.sites.files(name).items()
        for what, secret in secrets.items()
        if secret in data
    }


@pytest.mark.parametrize("gone", [[], ["site-3"]])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_session_sums_as_if_nothing_were_masked_and_leaves_no_secret(
    sites: SecureSites, gone: list[str], pinned: bool
) -> None:
    if pinned:
        sites.pin(version=7)
    session = SecureSession(sites, sites.terms())
    session.set_up()
    secrets = {name: secrets_of(session, name) for name in sites.names}
    for name in sites.names:
        assert laid_open(session, name, secrets[name]).keys() == secrets[name].keys()
    there = [name for name in sites.names if name not in gone]
    vectors, counts = vectors_of(there), counts_of(there)
    session.upload(vectors, counts)
    session.confirm(there)
    total = session.unmask(there)
    assert (total[: -tally.SIZE] == ring_sum(vectors, there)).all()
    assert tally.decode(total[-tally.SIZE :]) == totals_of(counts)
    left = {f"state/sessions/{session.session_id.hex()}": b""} | ({"state/roster-version": b"7"} if pinned else {})
    for name in there:
        assert laid_open(session, name, secrets[name]) == {}
        assert sites.files(name) == left


def test_a_judgement_sums_counts_alone_in_either_ring(sites: SecureSites) -> None:
    for number, bits in enumerate((32, 64), start=1):
        session = SecureSession(sites, sites.terms(round=number, size=tally.SIZE, ring_bits=bits))
        session.set_up()
        counts = counts_of(sites.names)
        session.upload({}, counts)
        session.confirm(sites.names)
        assert tally.decode(session.unmask(sites.names)) == totals_of(counts)


def test_sessions_of_two_rounds_go_on_beside_each_other(sites: SecureSites) -> None:
    """Every message serves the round's own session and the next one's, as the orchestrator asks it."""
    one, two = (SecureSession(sites, sites.terms(round=number)) for number in (1, 2))
    one.set_up()
    vectors, counts = vectors_of(sites.names), counts_of(sites.names)
    one.upload(vectors, counts)
    for name in sites.names:
        two.server.accept_advert(name, two.join(name).advert)
    survivors, adverts = one.server.survivors_message(), two.server.adverts()
    for name in sites.names:
        reply = one.ask(name, session=one.session_id, confirm=survivors, next_session=two.session_id, share=adverts)
        assert reply.refusal == ""
        one.server.accept_confirmation(name, reply.confirmation)
        two.server.accept_shares(name, reply.shares)
    sums = [one.unmask(sites.names)]
    two.upload(vectors, counts)
    two.confirm(sites.names)
    sums.append(two.unmask(sites.names))
    for total in sums:
        assert (total[: -tally.SIZE] == ring_sum(vectors, sites.names)).all()


def uploading(session: SecureSession) -> Callable[[], object]:
    turn, vector = session.turn(FIRST), vectors_of([FIRST])[FIRST]
    return lambda: turn.upload(ADAPTER, vector, {})


def confirming(session: SecureSession) -> Callable[[], object]:
    session.upload(vectors_of(session.sites.names), counts_of(session.sites.names))
    survivors = session.server.survivors_message()
    return lambda: session.ask(FIRST, session=session.session_id, confirm=survivors)


def unmasking(session: SecureSession) -> Callable[[], object]:
    confirming(session)
    session.confirm(session.sites.names)
    request = session.server.unmask_request()
    return lambda: session.ask(FIRST, session=session.session_id, unmask=request)


@pytest.mark.parametrize(
    ("prepared", "stage"),
    [(uploading, Stage.SHARED), (confirming, Stage.UPLOADED), (unmasking, Stage.CONFIRMED)],
)
def test_nothing_leaves_a_site_before_its_stage_is_durable(
    sites: SecureSites,
    prepared: Callable[[SecureSession], Callable[[], object]],
    stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = SecureSession(sites, sites.terms())
    session.set_up()
    act = prepared(session)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            act()
    assert sites.kept(FIRST, session.session_id).stage == stage
    act()
    with pytest.raises(SecureSumError, match="no stage is played twice|not played again"):
        act()


def test_a_site_whose_disk_is_full_takes_no_part_in_the_next_sum_and_says_so(
    sites: SecureSites, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = SecureSession(sites, sites.terms())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        reply = session.join(FIRST)
    assert (reply.advert, "No space left on device" in reply.refusal) == (b"", True)
    assert session.join(FIRST).advert


def test_a_greeting_binds_the_identity_to_one_node_one_run_and_one_nonce(sites: SecureSites) -> None:
    session = SecureSession(sites, sites.terms())
    reply = session.ask(FIRST, greet=b"a nonce")
    assert reply.identity == sites.keys[FIRST]
    told = (RUN, node_id(FIRST), b"a nonce")
    keys.verify(reply.identity, reply.greeting, greeting_message(*told), "the greeting")
    for other in (("another run", *told[1:]), (RUN, node_id("site-1"), b"a nonce"), (*told[:2], b"another nonce")):
        with pytest.raises(SecureSumError, match="the greeting is not signed"):
            keys.verify(reply.identity, reply.greeting, greeting_message(*other), "the greeting")


def test_a_site_that_names_no_key_makes_one_at_its_first_message_and_keeps_it(tmp_path: Path) -> None:
    config: dict[str, ConfigValue] = {"model": "a model", "data": "a text", "trunk-address": "127.0.0.1:1"}
    config["state-dir"] = str(tmp_path / "state")
    settings = read_site(config, CONFIG, "1", "1", simulated=False)
    made = open_secure_site(settings, "1").greet(RUN, b"a nonce")[0]
    assert open_secure_site(settings, "1").greet(RUN, b"another nonce")[0] == made
    assert (tmp_path / "state" / "identity.pem").stat().st_mode & 0o777 == 0o600


def test_a_key_that_is_named_and_gone_is_not_replaced(tmp_path: Path) -> None:
    sites = SecureSites(tmp_path)
    (tmp_path / FIRST / "identity.pem").unlink()
    with pytest.raises(ConfigError, match="identity-key is .*identity.pem', which is not there: .*clients keygen"):
        sites.process(FIRST)
    assert not (tmp_path / FIRST / "identity.pem").exists()


def test_a_process_that_was_killed_while_it_wrote_leaves_no_secret_past_the_next_session(tmp_path: Path) -> None:
    sites = SecureSites(tmp_path)
    joined(sites)
    state = tmp_path / FIRST / "state"
    halves = [folder / f"{PARTIAL_PREFIX}0123456789abcdef" for folder in (state, state / "sessions")]
    for half in halves:
        half.write_bytes(b"secrets")
    joined(sites, round=2)
    assert not any(half.exists() for half in halves)


def test_a_state_that_this_code_cannot_read_is_forgotten_and_keeps_nobody_from_joining(tmp_path: Path) -> None:
    sites = SecureSites(tmp_path)
    damaged = tmp_path / FIRST / "state" / "sessions" / ("ab" * 32)
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"no state")
    joined(sites)
    assert damaged.read_bytes() == b""


def joined(sites: SecureSites, **changes: object) -> SecureSession:
    session = SecureSession(sites, sites.terms(**changes))
    assert session.join(FIRST).advert
    return session


def open_ids(sites: SecureSites) -> set[bytes]:
    return {session_id for session_id, _, _ in sites.process(FIRST).vault.open_sessions()}


def test_only_the_round_befores_session_outlives_a_join(sites: SecureSites) -> None:
    aborted = joined(sites, round=1, nonce=bytes(16))
    again = joined(sites, round=1, nonce=bytes(15) + b"1")
    assert open_ids(sites) == {again.session_id}
    following = joined(sites, round=2)
    assert open_ids(sites) == {again.session_id, following.session_id}
    third = joined(sites, round=3)
    assert open_ids(sites) == {following.session_id, third.session_id}
    for dead in (aborted, again):
        with pytest.raises(SecureSumError, match="has ended for this client: it is not played again"):
            sites.process(FIRST).terms(dead.session_id)
        assert "has joined that session before" in dead.join(FIRST).refusal


def test_the_secrets_of_a_session_that_nobody_ended_are_gone_with_it(sites: SecureSites) -> None:
    session = SecureSession(sites, sites.terms())
    session.set_up()
    secrets = secrets_of(session, FIRST)
    joined(sites, round=2)
    assert laid_open(session, FIRST, secrets).keys() == secrets.keys()
    joined(sites, round=3)
    assert laid_open(session, FIRST, secrets) == {}


def test_another_runs_session_is_forgotten_only_when_it_is_stale(sites: SecureSites) -> None:
    other = joined(sites, run="another run")
    file = sites.folder / FIRST / "state" / "sessions" / other.session_id.hex()
    kept_at = file.stat().st_mtime
    os.utime(file, (kept_at, kept_at - STALE_S + 600))
    one = joined(sites, round=5)
    assert open_ids(sites) == {other.session_id, one.session_id}
    os.utime(file, (kept_at, kept_at - STALE_S - 600))
    two = joined(sites, round=6)
    assert open_ids(sites) == {one.session_id, two.session_id}


def test_a_sites_part_in_a_whole_session_imports_no_torch(tmp_path: Path) -> None:
    code = """
import pathlib, sys
import clients.app
from aggregation import tally
from tests.clients.secure_sites import SecureSession, SecureSites, counts_of, ring_sum, vectors_of

sites = SecureSites(pathlib.Path(sys.argv[1]))
session = SecureSession(sites, sites.terms())
assert session.ask("site-0", greet=b"a nonce").greeting
session.set_up()
vectors = vectors_of(sites.names)
session.upload(vectors, counts_of(sites.names))
session.confirm(sites.names)
total = session.unmask(sites.names)
assert (total[: -tally.SIZE] == ring_sum(vectors, sites.names)).all()
print(sorted({"torch", "transformers", "peft"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
