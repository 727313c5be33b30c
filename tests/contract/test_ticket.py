"""Tickets: read as they were signed or not at all, in their time, and of use to their holder alone."""

from __future__ import annotations

import base64
import json
import string
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import ticket as tickets
from contract.errors import ConfigError, TicketError
from contract.identity import public_key_text
from contract.roster import Roster, signed_roster
from contract.ticket import Ticket, parse_ticket, prove, renewed, require_in_time, require_proof, signed_ticket
from tests.contract.ticket_cases import HOLDER, ISSUED_AT, RENEWAL_KEY, SIGNER, SIGNER_KEY, a_ticket

OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER_KEY = OTHER.public_key().public_bytes_raw()

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True)
hashes = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
counts = st.integers(0, 2**40)
any_tickets = st.builds(
    a_ticket,
    ticket_id=st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
    run=names,
    round=counts,
    attempt=counts,
    client_id=names,
    holder=st.binary(min_size=32, max_size=32),
    certificate_key_sha256=st.one_of(st.just(""), hashes),
    head_layers=counts,
    tail_layers=counts,
    model_fingerprint=hashes,
    adapter_sha256=hashes,
    trainable=st.sampled_from(["A", "B", "AB", "none"]),
    max_sessions=st.integers(1, 2**40),
    max_steps=counts,
    max_bytes=counts,
)


def parsed(data: bytes) -> Ticket:
    return parse_ticket(data, [SIGNER_KEY], RENEWAL_KEY)


def body_of(**changed: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(signed_ticket(a_ticket(), SIGNER).split(b"\n")[0])
    return found | changed


def canonical(body: object) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def resigned(body: bytes, key: Ed25519PrivateKey = SIGNER, tag: bytes = b"trunkline ticket\x00") -> bytes:
    """What is spelt as a ticket, with `body`, whatever that is, and a signature that holds."""
    signature = base64.b64encode(key.sign(tag + body)).decode()
    return body + b"\n" + canonical({"signature": signature}) + b"\n"


@given(any_tickets)
def test_a_ticket_and_its_renewal_read_back_as_they_were_made(written: Ticket) -> None:
    assert parsed(signed_ticket(written, SIGNER)) == written
    again = parsed(renewed(written, RENEWAL_KEY))
    assert again == replace(written, expires_at=written.round_ends_at, renewal=True)
    assert renewed(again, RENEWAL_KEY) == renewed(written, RENEWAL_KEY)
    assert len(signed_ticket(written, SIGNER)) <= tickets.MAX_TICKET_BYTES


@pytest.mark.parametrize("data", [signed_ticket(a_ticket(), SIGNER), renewed(a_ticket(), RENEWAL_KEY)])
def test_every_single_byte_counts(data: bytes) -> None:
    for place in range(len(data)):
        for other in {data[place] ^ 1, data[place] ^ 0x20, ord(" "), ord("\n"), 0, 255} - {data[place]}:
            with pytest.raises(TicketError):
                parsed(data[:place] + bytes([other]) + data[place + 1 :])


@given(st.data())
@settings(max_examples=200)
def test_a_byte_more_or_less_is_refused(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([signed_ticket(a_ticket(), SIGNER), renewed(a_ticket(), RENEWAL_KEY)]))
    place = data.draw(st.integers(0, len(whole) - 1))
    added = bytes([data.draw(st.sampled_from(string.printable.encode()))])
    for changed in (whole[:place] + whole[place + 1 :], whole[:place] + added + whole[place:], whole[:place]):
        if changed != whole:
            with pytest.raises(TicketError):
                parsed(changed)


@given(st.binary(max_size=300))
def test_bytes_that_are_no_ticket_are_refused(data: bytes) -> None:
    with pytest.raises(TicketError):
        parsed(data)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"run": "a/b"}, "run is 'a/b'"),
        ({"run": 7}, "run is no text"),
        ({"client_id": ""}, "client_id is ''"),
        ({"round": -1}, "round is -1"),
        ({"round": True}, "round is True"),
        ({"attempt": 1.0}, "attempt is 1.0"),
        ({"max_sessions": 0}, "max_sessions is 0; it must be a whole number from 1 on"),
        ({"max_steps": 2**53 + 1}, "max_steps is 9007199254740993"),
        ({"max_bytes": "7"}, "max_bytes is '7'"),
        ({"holder": "ed25519:AAAA"}, "holder is of 3 bytes"),
        ({"holder": 7}, "holder is no text"),
        ({"adapter_sha256": "AB" * 32}, "adapter_sha256 is"),
        ({"adapter_sha256": ""}, "adapter_sha256 is ''"),
        ({"certificate_key_sha256": "x"}, "certificate_key_sha256 is 'x'"),
        ({"model_fingerprint": None}, "model_fingerprint is no text"),
        ({"trainable": "C"}, "trainable is 'C'"),
        ({"trainable": ["A"]}, "trainable is"),
        ({"ticket_id": "00"}, "ticket_id is '00'"),
        ({"expires_at": ISSUED_AT + 901}, "expires_at is 901 s after issued_at, not 0 to 900"),
        ({"expires_at": ISSUED_AT - 1}, "expires_at is -1 s after"),
        ({"round_ends_at": ISSUED_AT + 899}, "round_ends_at is"),
        ({"round_ends_at": ISSUED_AT + 86_401}, "round_ends_at is"),
        ({"format": "trunkline-ticket-2"}, "format is not trunkline-ticket-1"),
        ({"format": "trunkline-renewal-1"}, "format is not trunkline-ticket-1"),
        ({"admin": True}, "no place in it: 'admin'"),
        ({"\n\ud800": True}, r"no place in it: '\\n\\ud800'"),
    ],
)
def test_what_is_signed_must_still_be_a_ticket_field_by_field(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(TicketError, match=told):
        parsed(resigned(canonical(body_of(**changed))))


def test_what_is_signed_must_be_spelt_in_the_one_way() -> None:
    body = body_of()
    fewer = {name: value for name, value in body.items() if name != "max_bytes"}
    twice = canonical(body)[:-1] + b',"run":"other"}'
    spaced = json.dumps(body, sort_keys=True).encode()
    for odd, told in (
        (canonical(fewer), "max_bytes"),
        (twice, "'run' is there twice"),
        (spaced, "not spelt as one is"),
        (canonical([body]), "format is not"),
        (b"{", "no JSON"),
    ):
        with pytest.raises(TicketError, match=told):
            parsed(resigned(odd))


def test_only_the_signers_own_signature_over_a_ticket_counts() -> None:
    """Not another key's, not one over something else, and not one whose signer this trunk does not know."""
    body = canonical(body_of())
    with pytest.raises(TicketError, match="signature does not hold"):
        parsed(resigned(body, OTHER))
    with pytest.raises(TicketError, match="signature does not hold"):
        parsed(resigned(body, tag=b"trunkline roster\x00"))
    foreign = signed_ticket(a_ticket(signer=OTHER_KEY), OTHER)
    with pytest.raises(TicketError, match="which this trunk does not know"):
        parsed(foreign)
    assert parse_ticket(foreign, [SIGNER_KEY, OTHER_KEY], RENEWAL_KEY).signer == OTHER_KEY
    roster = signed_roster(Roster(1, datetime(2026, 1, 1, tzinfo=UTC), SIGNER_KEY, {}), SIGNER)
    with pytest.raises(TicketError):
        parsed(roster)


def test_a_renewal_is_of_the_trunk_that_gave_it_and_of_a_signer_that_it_still_knows() -> None:
    renewal = renewed(a_ticket(), RENEWAL_KEY)
    with pytest.raises(TicketError, match="not one of this trunk's"):
        parse_ticket(renewal, [SIGNER_KEY], bytes(32))
    with pytest.raises(TicketError, match="which this trunk does not know"):
        parse_ticket(renewal, [OTHER_KEY], RENEWAL_KEY)
    body, _, rest = renewal.partition(b"\n")
    mac = json.loads(rest)["mac"]
    with pytest.raises(TicketError):  # a mac is no signature, whatever it is called
        parsed(body + b"\n" + canonical({"signature": mac}) + b"\n")


def test_a_ticket_is_signed_by_its_signers_key_alone_and_a_renewal_not_at_all() -> None:
    with pytest.raises(ConfigError, match="another one than the key's owner"):
        signed_ticket(a_ticket(), OTHER)
    with pytest.raises(ConfigError):
        signed_ticket(parsed(renewed(a_ticket(), RENEWAL_KEY)), SIGNER)


def test_a_ticket_is_good_from_its_issue_to_its_end_give_or_take_half_a_minute() -> None:
    ticket = a_ticket()
    for now in (ISSUED_AT - 30, ISSUED_AT, ticket.expires_at, ticket.expires_at + 30):
        require_in_time(ticket, now)
    with pytest.raises(TicketError, match="was issued 31 s from now, by this trunk's clock"):
        require_in_time(ticket, ISSUED_AT - 31)
    with pytest.raises(TicketError, match="the ticket expired 31 s ago"):
        require_in_time(ticket, ticket.expires_at + 31)
    renewal = parsed(renewed(ticket, RENEWAL_KEY))
    require_in_time(renewal, ticket.expires_at + 3600)
    with pytest.raises(TicketError, match="the renewal expired 31 s ago"):
        require_in_time(renewal, ticket.round_ends_at + 31)


@given(challenge=st.binary(min_size=1, max_size=64), other=st.binary(min_size=1, max_size=64))
def test_a_proof_is_of_one_holder_for_one_ticket_and_one_challenge(challenge: bytes, other: bytes) -> None:
    ticket = a_ticket()
    data = signed_ticket(ticket, SIGNER)
    proof = prove(HOLDER, data, challenge)
    require_proof(ticket, data, challenge, proof)
    wrong = [
        (data, challenge, prove(OTHER, data, challenge)),
        (renewed(ticket, RENEWAL_KEY), challenge, proof),
        (data, challenge, b""),
        (data, challenge, proof[:-1]),
        (data, challenge, HOLDER.sign(data + challenge)),
    ]
    wrong += [(data, other, proof)] if other != challenge else []
    for presented, asked, given_proof in wrong:
        with pytest.raises(TicketError, match="the proof does not hold"):
            require_proof(ticket, presented, asked, given_proof)


def test_a_ticket_tells_who_signed_it_by_its_public_line() -> None:
    body = body_of()
    assert body["signer"] == public_key_text(SIGNER_KEY)
    assert set(body) == set(Ticket.__dataclass_fields__) - {"renewal"} | {"format"}
