"""Whole secure sums, byte for byte: `vectors/secure_sum.json` says what each party sends when its entropy is known.

Another implementation can be checked against that file; a change of it is a change of the protocol. Each member's
entropy, asked for so many bytes, gives the next ones of SHA-256(label | 8 bytes big-endian 0) | SHA-256(label | 1) ...,
where the label is the entry's "entropy". Written anew by `python -m tests.aggregation.test_transcript --write`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregation.ring import RingVector
from aggregation.secure_client import SecureClient
from aggregation.secure_server import SecureServer
from aggregation.shamir import Entropy
from aggregation.terms import Member, Policy, Terms

FILE = Path(__file__).parent / "vectors" / "secure_sum.json"
ADAPTER = hashlib.sha256(b"the adapter of the transcript").hexdigest()
IDS = ("ash", "beech", "cedar", "elm", "fir", "hazel", "oak")
THRESHOLD = 5  # of 7: what members insist on, and as many as are left
GONE_BEFORE_UPLOAD = "cedar"
GONE_AFTER_UPLOAD = "fir"
SIZE = 8
SESSIONS = {"Z_2^32": 32, "Z_2^64": 64}

Transcript = dict[str, Any]


def generator(label: str) -> Entropy:
    def stream() -> Iterator[int]:
        counter = 0
        while True:
            yield from hashlib.sha256(label.encode() + counter.to_bytes(8, "big")).digest()
            counter += 1

    left = stream()
    return lambda count: bytes(next(left) for _ in range(count))


def vector_of(client_id: str, bits: int) -> RingVector:
    """Numbers of the whole ring, so that the sum wraps."""
    drawn = generator(f"vector {client_id}")(SIZE * bits // 8)
    return np.frombuffer(drawn, dtype=f"<u{bits // 8}").astype(f"uint{bits}")


def terms_of(roster: dict[str, bytes], bits: int) -> Terms:
    return Terms(
        run="transcript",
        round=3,
        nonce=bytes(range(16)),
        members=tuple(Member(one, key) for one, key in roster.items()),
        threshold=THRESHOLD,
        degree=0,
        size=SIZE,
        ring_bits=bits,
        model_fingerprint="0" * 64,
        settings_sha256="1" * 64,
    )


def play(bits: int) -> Transcript:
    """One session; every message that travels, in the order in which they do."""
    identities = {one: Ed25519PrivateKey.from_private_bytes(generator(f"identity {one}")(32)) for one in IDS}
    roster = {one: key.public_key().public_bytes_raw() for one, key in identities.items()}
    terms = terms_of(roster, bits)
    policy = Policy(min_members=len(IDS))
    server = SecureServer(terms, ADAPTER)
    labels = {one: f"entropy {bits} {one}" for one in IDS}
    entropy = {one: generator(label) for one, label in labels.items()}
    clients = {one: SecureClient.join(terms, one, identities[one], policy, roster, entropy[one]) for one in IDS}
    vectors = {one: vector_of(one, bits) for one in IDS}

    adverts = {one: clients[one].advert() for one in IDS}
    for one, sent in adverts.items():
        server.accept_advert(one, sent)
    all_adverts = server.adverts()

    shares = {one: clients[one].share(all_adverts, entropy[one]) for one in IDS}
    for one, sent in shares.items():
        server.accept_shares(one, sent)

    uploaders = [one for one in IDS if one != GONE_BEFORE_UPLOAD]
    inboxes = {one: server.inbox(one) for one in uploaders}
    uploads = {one: clients[one].upload(vectors[one].copy(), ADAPTER, inboxes[one]) for one in uploaders}
    for one, sent in uploads.items():
        server.accept_upload(one, sent)
    survivors = server.survivors_message()

    left = [one for one in uploaders if one != GONE_AFTER_UPLOAD]
    confirmations = {one: clients[one].confirm(survivors) for one in left}
    for one, sent in confirmations.items():
        server.accept_confirmation(one, sent)
    request = server.unmask_request()

    answers = {one: clients[one].unmask(request) for one in left}
    for one, sent in answers.items():
        server.accept_answer(one, sent)
    total = server.finish()

    return {
        "terms": terms.to_bytes().hex(),
        "session_id": terms.session_id.hex(),
        "adapter_sha256": ADAPTER,
        "members": {
            one: {
                "identity_secret": identities[one].private_bytes_raw().hex(),
                "entropy": labels[one],
                "vector": [int(number) for number in vectors[one]],
            }
            for one in IDS
        },
        "adverts": in_hex(adverts.items()),
        "all_adverts_sha256": hashlib.sha256(all_adverts).hexdigest(),
        "shares": in_hex(shares.items()),
        "inboxes_sha256": {one: hashlib.sha256(inbox).hexdigest() for one, inbox in inboxes.items()},
        "uploads": in_hex(uploads.items()),
        "survivors": survivors.hex(),
        "confirmations": in_hex(confirmations.items()),
        "unmask_request": request.hex(),
        "answers": in_hex(answers.items()),
        "sum": [int(number) for number in total],
    }


def in_hex(messages: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    return {one: message.hex() for one, message in messages}


def written() -> str:
    return json.dumps({name: play(bits) for name, bits in SESSIONS.items()}, indent=1) + "\n"


@pytest.fixture(scope="module")
def committed() -> dict[str, Transcript]:
    read: dict[str, Transcript] = json.loads(FILE.read_text())
    return read


@pytest.mark.parametrize("name", SESSIONS)
def test_a_replay_sends_what_was_committed_byte_for_byte(name: str, committed: dict[str, Transcript]) -> None:
    replayed, expected = play(SESSIONS[name]), committed[name]
    assert list(replayed) == list(expected)
    for part, value in replayed.items():
        assert value == expected[part], f"{part} of the session '{name}' is not what it was"


def test_the_file_is_what_the_write_flag_writes(committed: dict[str, Transcript]) -> None:
    assert list(committed) == list(SESSIONS)
    assert FILE.read_text() == written()


@pytest.mark.parametrize("name", SESSIONS)
def test_the_committed_sum_is_that_of_the_committed_vectors_of_those_who_uploaded(
    name: str, committed: dict[str, Transcript]
) -> None:
    session, bits = committed[name], SESSIONS[name]
    assert list(session["uploads"]) == [one for one in IDS if one != GONE_BEFORE_UPLOAD]
    assert GONE_AFTER_UPLOAD not in session["confirmations"]
    rows = [session["members"][one]["vector"] for one in session["uploads"]]
    assert session["sum"] == [sum(column) % 2**bits for column in zip(*rows, strict=True)]
    assert any(sum(column) >= 2**bits for column in zip(*rows, strict=True))


@pytest.mark.parametrize("name", SESSIONS)
def test_no_committed_message_holds_a_vector_or_a_secret(name: str, committed: dict[str, Transcript]) -> None:
    session, bits = committed[name], SESSIONS[name]
    sent = [session["survivors"], session["unmask_request"]]
    for part in ("adverts", "shares", "uploads", "confirmations", "answers"):
        sent += session[part].values()
    for one, member in session["members"].items():
        secrets = generator(member["entropy"])(3 * 32)
        plain = vector_of(one, bits).astype(f"<u{bits // 8}").tobytes()
        hidden = [secrets[:32], secrets[32:64], secrets[64:], bytes.fromhex(member["identity_secret"]), plain]
        assert not any(secret.hex() in message for secret in hidden for message in sent)


def main() -> None:
    parser = argparse.ArgumentParser(description="Replays the committed transcript of secure sums.")
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name} anew")
    if parser.parse_args().write:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(written())
    elif FILE.read_text() != written():
        raise SystemExit(f"{FILE.name} is not what the secure sum sends; --write writes it anew")


if __name__ == "__main__":
    main()
