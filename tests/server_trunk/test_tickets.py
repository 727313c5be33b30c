"""Which sessions a ticket admits, by a clock on paper: none of anybody else's, none twice, and no more than it says."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contract import trunk_pb2 as pb
from contract.errors import CapacityError, ConfigError, TicketError
from contract.identity import public_key_text
from contract.records import RoundKey
from contract.ticket import Ticket, prove, renewed, signed_ticket
from server_trunk import challenges, tickets
from server_trunk.challenges import Challenges
from server_trunk.signers import ticket_signers
from server_trunk.tickets import Asked, TicketBook, TicketUse, open_renewal_key
from tests.contract.ticket_cases import HOLDER, ISSUED_AT, RENEWAL_KEY, SIGNER, SIGNER_KEY, a_ticket

MODEL = pb.ModelAgreement(fingerprint="f" * 64, head_layers=1, tail_layers=1)


class Trunk:
    """A book whose clocks go when they are told to."""

    def __init__(self, renewal_key: bytes = RENEWAL_KEY, now: float = ISSUED_AT + 10) -> None:
        self.now = now
        self.book = TicketBook([SIGNER_KEY], renewal_key, lambda: self.now, Challenges(lambda: self.now))

    def hello(self, presented: bytes, holder: Ed25519PrivateKey = HOLDER, challenge: bytes | None = None) -> pb.Hello:
        asked = self.book.challenge() if challenge is None else challenge
        return pb.Hello(model=MODEL, ticket=presented, challenge=asked, proof=prove(holder, presented, asked))

    def enter(self, hello: pb.Hello, asked: Asked | None = None, certificate: str = "") -> TicketUse:
        return self.book.enter(self.book.checked(hello, asked or asks(a_ticket()), certificate))


def asks(ticket: Ticket, **changed: Any) -> Asked:
    """What the ticket's own client asks for."""
    key = RoundKey(ticket.run, ticket.round, ticket.attempt)
    plain = {"client_id": ticket.client_id, "round_key": key, "adapter_sha256": ticket.adapter_sha256}
    return Asked(**{**plain, "trainable": ticket.trainable, **changed})


def issued(**changed: Any) -> bytes:
    return signed_ticket(a_ticket(**changed), SIGNER)


def test_a_ticket_admits_as_many_sessions_as_it_says() -> None:
    trunk = Trunk()
    uses = [trunk.enter(trunk.hello(issued())) for _ in range(3)]
    assert uses[0] is uses[2]
    assert uses[0].sessions == 3
    with pytest.raises(TicketError, match="allows 3 sessions, and has had them"):
        trunk.enter(trunk.hello(issued()))
    other = a_ticket(ticket_id="f" * 32, client_id="78")
    assert trunk.enter(trunk.hello(signed_ticket(other, SIGNER)), asks(other)).sessions == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"client_id": "78"},
        {"round_key": RoundKey("b-run", 3, 1)},
        {"round_key": RoundKey("a-run", 4, 1)},
        {"round_key": RoundKey("a-run", 3, 2)},
        {"adapter_sha256": "b" * 64},
        {"trainable": "AB"},
    ],
)
def test_what_a_session_asks_for_otherwise_than_its_ticket_says_is_refused_by_name(changed: dict[str, Any]) -> None:
    trunk = Trunk()
    named = {"round_key": "run|round|attempt"}.get(next(iter(changed)), next(iter(changed)))
    with pytest.raises(TicketError, match=rf"the ticket's ({named}) is "):
        trunk.enter(trunk.hello(issued()), asks(a_ticket(), **changed))


@pytest.mark.parametrize(
    "changed", [{"head_layers": 2}, {"tail_layers": 0}, {"model_fingerprint": "e" * 64}, {"run": "b-run"}]
)
def test_a_ticket_for_another_model_cut_or_run_admits_nobody(changed: dict[str, Any]) -> None:
    trunk = Trunk()
    with pytest.raises(TicketError, match=f"the ticket's {next(iter(changed))} is"):
        trunk.enter(trunk.hello(issued(**changed)))


def test_a_stolen_ticket_is_of_no_use_without_its_holders_key() -> None:
    trunk, thief = Trunk(), Ed25519PrivateKey.generate()
    with pytest.raises(TicketError, match="the proof does not hold"):
        trunk.enter(trunk.hello(issued(), holder=thief))
    renewal = trunk.enter(trunk.hello(issued())).renewal
    with pytest.raises(TicketError, match="the proof does not hold"):
        trunk.enter(trunk.hello(renewal, holder=thief))


def test_a_proof_that_was_overheard_opens_nothing() -> None:
    trunk = Trunk()
    heard = trunk.hello(issued())
    trunk.enter(heard)
    with pytest.raises(TicketError, match="the challenge was used by another session already"):
        trunk.enter(heard)
    heard.challenge = trunk.book.challenge()
    with pytest.raises(TicketError, match="the proof does not hold"):
        trunk.enter(heard)


def test_two_hellos_with_one_challenge_are_one_session_even_when_both_were_checked() -> None:
    trunk = Trunk()
    admissions = [trunk.book.checked(trunk.hello(issued(), challenge=one), asks(a_ticket()), "")
                  for one in [trunk.book.challenge()] * 2]  # fmt: skip
    trunk.book.enter(admissions[0])
    with pytest.raises(TicketError, match="was used"):
        trunk.book.enter(admissions[1])


def test_a_challenge_is_this_processs_own_and_good_for_a_minute() -> None:
    trunk, other = Trunk(), Trunk()
    with pytest.raises(TicketError, match="not one that this trunk made since it started"):
        trunk.enter(trunk.hello(issued(), challenge=other.book.challenge()))
    for odd in (b"", b"x", bytes(56), trunk.book.challenge()[:-1]):
        with pytest.raises(TicketError, match="challenge"):
            trunk.enter(trunk.hello(issued(), challenge=odd))
    hello = trunk.hello(issued())
    trunk.now += challenges.GOOD_FOR_S + 1
    with pytest.raises(TicketError, match="61 s old"):
        trunk.enter(hello)


def test_used_challenges_are_forgotten_after_their_minute_and_bounded_within_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(challenges, "MOST_USED", 3)
    now = 1000.0
    made = Challenges(lambda: now)
    for _ in range(3):
        made.use(made.new())
    with pytest.raises(CapacityError, match="3 sessions began within a minute"):
        made.use(made.new())
    now += 62
    made.use(made.new())
    assert len(made._used) == 1


def test_the_clocks_leeway_is_half_a_minute() -> None:
    late, early = Trunk(now=ISSUED_AT + 931), Trunk(now=ISSUED_AT - 31)
    with pytest.raises(TicketError, match="the ticket expired 31 s ago"):
        late.enter(late.hello(issued()))
    with pytest.raises(TicketError, match="was issued 31 s from now"):
        early.enter(early.hello(issued()))
    for now in (ISSUED_AT + 930, ISSUED_AT - 30):
        trunk = Trunk(now=now)
        trunk.enter(trunk.hello(issued()))


def test_a_renewal_holds_to_the_rounds_end_over_a_restart_and_counts_with_its_ticket() -> None:
    trunk = Trunk()
    use = trunk.enter(trunk.hello(issued()))
    trunk.now = ISSUED_AT + 7200
    with pytest.raises(TicketError, match="the ticket expired"):
        trunk.enter(trunk.hello(issued()))
    assert trunk.enter(trunk.hello(use.renewal)) is use
    restarted = Trunk(now=ISSUED_AT + 80_000)
    again = restarted.enter(restarted.hello(use.renewal))
    assert (again.sessions, again.renewal) == (1, use.renewal)
    restarted.now = ISSUED_AT + 86_431
    with pytest.raises(TicketError, match="the renewal expired 31 s ago"):
        restarted.enter(restarted.hello(use.renewal))


def test_a_renewal_is_nothing_at_another_trunk_where_the_ticket_is_good() -> None:
    one, other = Trunk(), Trunk(renewal_key=bytes(32))
    renewal = one.enter(one.hello(issued())).renewal
    with pytest.raises(TicketError, match="not one of this trunk's"):
        other.enter(other.hello(renewal))
    assert other.enter(other.hello(issued())).sessions == 1


def test_a_renewal_that_a_client_makes_itself_is_refused() -> None:
    trunk = Trunk()
    with pytest.raises(TicketError, match="not one of this trunk's"):
        trunk.enter(trunk.hello(renewed(a_ticket(), bytes(32))))


def test_steps_and_bytes_are_counted_over_all_sessions_of_a_ticket() -> None:
    trunk = Trunk()
    first, second = (trunk.enter(trunk.hello(issued(max_steps=5, max_bytes=100))) for _ in range(2))
    first.spend(3, 60)
    second.spend(2, 40)
    with pytest.raises(TicketError, match="allows 5 steps, and its sessions have come to more"):
        second.spend(1, 0)
    with pytest.raises(TicketError):
        first.spend(0, 1)
    bytes_only = TicketUse(5, 100, b"")
    with pytest.raises(TicketError, match="allows 100 bytes"):
        bytes_only.spend(0, 101)


def test_a_ticket_for_one_tls_key_is_refused_by_any_other_and_without_tls() -> None:
    trunk, bound = Trunk(), "c" * 64
    ticket = a_ticket(certificate_key_sha256=bound)
    for shown in ("", "d" * 64):
        with pytest.raises(TicketError, match="the ticket is for the TLS key cccccccccccc"):
            trunk.enter(trunk.hello(signed_ticket(ticket, SIGNER)), asks(ticket), shown)
    trunk.enter(trunk.hello(signed_ticket(ticket, SIGNER)), asks(ticket), bound)
    trunk.enter(trunk.hello(issued(ticket_id="e" * 32)), certificate=bound)  # one that names no key is good with any


def test_without_a_ticket_and_outside_of_rounds_nobody_is_admitted() -> None:
    trunk = Trunk()
    with pytest.raises(TicketError, match="no sessions of their own"):
        trunk.book.checked(trunk.hello(issued()), None, "")
    with pytest.raises(TicketError, match="hello.ticket is missing"):
        trunk.enter(trunk.hello(b""))


def test_tickets_of_rounds_and_attempts_that_a_run_left_behind_admit_nobody() -> None:
    trunk = Trunk()
    for place, refused in (((3, 1), False), ((3, 2), False), ((3, 1), True), ((4, 0), False), ((3, 2), True)):
        ticket = a_ticket(round=place[0], attempt=place[1], ticket_id=f"{place[0]}{place[1]}" * 16)
        hello = trunk.hello(signed_ticket(ticket, SIGNER))
        if refused:
            with pytest.raises(TicketError, match=r"its run has gone on to round"):
                trunk.enter(hello, asks(ticket))
        else:
            trunk.enter(hello, asks(ticket))
    other = a_ticket(run="b-run", round=1)
    trunk.enter(trunk.hello(signed_ticket(other, SIGNER)), asks(other))


def test_the_table_of_tickets_is_bounded_and_forgets_runs_whose_rounds_are_over(monkeypatch: Any) -> None:
    monkeypatch.setattr(tickets, "MOST_TICKETS", 2)
    trunk = Trunk()

    def enter(number: int, **changed: Any) -> TicketUse:
        ticket = a_ticket(ticket_id=f"{number:032x}", run=f"run-{number}", **changed)
        return trunk.enter(trunk.hello(signed_ticket(ticket, SIGNER)), asks(ticket))

    for number in range(2):
        enter(number)
    with pytest.raises(CapacityError, match="2 tickets are in use"):
        enter(2)
    trunk.now += 86_500
    assert enter(3, issued_at=int(trunk.now)).sessions == 1
    assert len(trunk.book._runs) == 1


def test_the_renewal_key_is_made_once_and_must_be_the_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        key = open_renewal_key(tmp_path)
    finally:
        os.umask(before)
    path = tmp_path / tickets.RENEWAL_KEY_FILE
    assert (len(key), stat.S_IMODE(path.stat().st_mode)) == (32, 0o600)
    assert open_renewal_key(tmp_path) == key
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        open_renewal_key(tmp_path)
    path.chmod(0o600)
    path.write_bytes(key[:31])
    with pytest.raises(ConfigError, match="is of 31 bytes, not 32"):
        open_renewal_key(tmp_path)


def test_signers_are_lines_or_files_of_lines(tmp_path: Path) -> None:
    other = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
    lines = tmp_path / "signers"
    lines.write_text(f"# ours\n\n{public_key_text(SIGNER_KEY)}\n{public_key_text(other)}\n")
    assert ticket_signers([f"@{lines}", public_key_text(SIGNER_KEY)]) == (SIGNER_KEY, other)
    assert ticket_signers([]) == ()


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: path.write_text("# nobody\n"), "names no key"),
        (lambda path: path.write_text("ed25519:AAAA\n"), "ticket-signer is of 3 bytes"),
        (lambda path: path.write_bytes(b"x" * 70_000), "is over 65536 bytes"),
        (lambda path: None, "cannot read"),
    ],
)
def test_a_file_of_signers_that_names_none_is_refused(
    tmp_path: Path, write: Callable[[Path], object], told: str
) -> None:
    write(tmp_path / "signers")
    with pytest.raises(ConfigError, match=told):
        ticket_signers([f"@{tmp_path / 'signers'}"])
