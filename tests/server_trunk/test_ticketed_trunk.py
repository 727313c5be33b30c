"""Tickets at a live trunk by TLS: nothing is admitted that should not be; a renewal outlives the trunk's process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from peft import LoraConfig

from contract import trunk_pb2 as pb
from contract.adapter import adapter_shapes, initial_adapter, resolve_lora, sha256_hex, split_adapter, to_bytes
from contract.architecture import probe
from contract.errors import CapacityError, SessionError, TicketError, TrunklineError
from contract.identity import public_key_text
from contract.records import RoundKey
from contract.ticket import Ticket, prove, signed_ticket
from contract.wire import PROTOCOL, round_to_wire
from server_trunk.tickets import TicketBook
from tests.contract.ticket_cases import HOLDER, SIGNER, SIGNER_KEY, a_ticket
from tests.pki import Pki
from tests.server_trunk.conftest import CUT, HIDDEN, RunningTrunk
from tests.server_trunk.wire_client import Refused, WireClient, WireSession

KEY = RoundKey("a-run", 3, 1)
HIDDEN_BTD = torch.ones(2, 4, HIDDEN)
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.made(tmp_path_factory.mktemp("keys") / "pki")


class Ticketed:
    """A trunk that takes SIGNER's tickets, with the adapter of a round, and its callers."""

    def __init__(self, trunk: RunningTrunk, pki: Pki, lora: pb.Lora, adapter: bytes) -> None:
        self.trunk, self.pki, self.lora = trunk, pki, lora
        orchestrator = WireClient(trunk.address, pki.files("orchestrator"))
        self.adapter_sha256 = orchestrator.put_adapter(sha256_hex(adapter), adapter)
        self.orchestrator = orchestrator
        self.described = orchestrator.call("Describe", pb.DescribeRequest())

    def caller(self, name: str = "north") -> WireClient:
        return WireClient(self.trunk.address, self.pki.files(name))

    def ticket(self, **changed: Any) -> Ticket:
        own: dict[str, Any] = {
            "model_fingerprint": self.described.model.fingerprint,
            "adapter_sha256": self.adapter_sha256,
            "issued_at": int(time.time()),
            "trainable": "AB",
        }
        return a_ticket(**(own | changed))

    def hello(
        self,
        client: WireClient,
        presented: bytes,
        holder: Ed25519PrivateKey = HOLDER,
        **fields: Any,
    ) -> pb.Hello:
        """As the ticket's own client says it, but for what `fields` changes."""
        described = client.call("Describe", pb.DescribeRequest())
        challenge = fields.pop("challenge", described.challenge)
        plain: dict[str, Any] = {
            "protocol": PROTOCOL,
            "client_id": "77",
            "model": described.model,
            "lora": self.lora,
            "trainable": "AB",
            "codecs": ["identity"],
            "round": round_to_wire(KEY),
            "ticket": presented,
            "challenge": challenge,
            "proof": prove(holder, presented, challenge),
        }
        if "seed" not in fields:
            plain["adapter_sha256"] = self.adapter_sha256
        return pb.Hello(**(plain | fields))

    def open(self, presented: bytes | None = None, caller: str = "north", **fields: Any) -> WireSession:
        client = self.caller(caller)
        presented = signed_ticket(self.ticket(), SIGNER) if presented is None else presented
        return client.session(self.hello(client, presented, **fields))

    def refused(self, told: str, presented: bytes | None = None, caller: str = "north", **fields: Any) -> None:
        """The trunk ends such a session with TicketError, and takes no place for it."""
        taken = self.taken()
        with pytest.raises(Refused, match=told) as refused:
            self.open(presented, caller, **fields)
        assert refused.value.error is TicketError
        assert refused.value.status.name == "PERMISSION_DENIED"
        assert self.taken() == taken

    def taken(self) -> int:
        return int(self.orchestrator.call("Describe", pb.DescribeRequest()).open_sessions)

    def until_empty(self) -> None:
        """A session whose client hung up is there for another moment."""
        until = time.monotonic() + LIMIT_S
        while self.taken():
            assert time.monotonic() < until
            time.sleep(0.02)


@pytest.fixture
def start_ticketed(
    start_trunk: Callable[..., RunningTrunk], pki: Pki, lora: pb.Lora, model_dir: Path, lora_config: LoraConfig
) -> Callable[..., Ticketed]:
    shapes = adapter_shapes(model_dir, resolve_lora(model_dir, lora_config))
    _, trunk_part = split_adapter(initial_adapter(shapes, 0), probe(model_dir), CUT)
    adapter = to_bytes(trunk_part)

    def start(**options: Any) -> Ticketed:
        plain = {"tls": pki.files("trunk"), "ticket_signers": (SIGNER_KEY,)}
        return Ticketed(start_trunk(**(plain | options)), pki, lora, adapter)

    return start


@pytest.fixture
def ticketed(start_ticketed: Callable[..., Ticketed]) -> Ticketed:
    return start_ticketed()


def ended(call: Callable[[], object]) -> type[TrunklineError] | None:
    with pytest.raises(Refused) as refused:
        call()
    return refused.value.error


def test_a_round_with_a_ticket_goes_to_its_commit(ticketed: Ticketed) -> None:
    assert ticketed.described.ticket_signer == public_key_text(SIGNER_KEY)
    session = ticketed.open()
    session.forward(HIDDEN_BTD)
    session.backward(torch.ones(2, 4, HIDDEN))
    assert session.step() == 1
    session.close(trained_tokens=8, contribute=True)
    request = pb.CommitRoundRequest(round=round_to_wire(KEY), base_sha256=ticketed.adapter_sha256, survivors=["77"])
    assert ticketed.orchestrator.call("CommitRound", request).trained_tokens == 8


def test_forged_foreign_expired_and_early_tickets_admit_nobody(ticketed: Ticketed) -> None:
    stranger, now = Ed25519PrivateKey.generate(), int(time.time())
    own = ticketed.ticket()
    good = signed_ticket(own, SIGNER)
    assert b'"max_steps":30' in good
    ticketed.refused("the ticket's signature does not hold", good.replace(b'"max_steps":30', b'"max_steps":99'))
    by_stranger = replace(own, signer=stranger.public_key().public_bytes_raw())
    ticketed.refused("which this trunk does not know", signed_ticket(by_stranger, stranger))
    ticketed.refused("the ticket expired", signed_ticket(ticketed.ticket(issued_at=now - 1000), SIGNER))
    ticketed.refused("was issued [0-9]+ s from now", signed_ticket(ticketed.ticket(issued_at=now + 100), SIGNER))
    ticketed.refused("hello.ticket is missing", b"")
    ticketed.refused("second line is neither", b"\x00" * 4096)
    ticketed.refused("is of 4097 bytes", b"\x00" * 4097)


def test_a_ticket_is_for_one_client_round_and_adapter_and_one_holder(ticketed: Ticketed) -> None:
    ticketed.refused("the ticket's client_id is 77, and the session's 78", client_id="78")
    ticketed.refused("the ticket's round is 3, and the session's 4", round=round_to_wire(replace(KEY, round=4)))
    ticketed.refused("the ticket's attempt is 1", round=round_to_wire(replace(KEY, attempt=2)))
    ticketed.refused("the ticket's run is a-run", round=round_to_wire(replace(KEY, run="b-run")))
    ticketed.refused("the ticket's trainable is AB", trainable="B")
    ticketed.refused("the ticket's adapter_sha256 is", adapter_sha256="b" * 64)
    ticketed.refused("the proof does not hold", holder=Ed25519PrivateKey.generate())
    ticketed.refused("the proof does not hold", proof=b"")
    own = ticketed.open()
    own.close()


def test_a_hello_that_was_recorded_opens_no_second_session(ticketed: Ticketed) -> None:
    client = ticketed.caller()
    hello = ticketed.hello(client, signed_ticket(ticketed.ticket(), SIGNER))
    client.session(hello).close()
    with pytest.raises(Refused, match="the challenge was used by another session already") as refused:
        client.session(hello)
    assert refused.value.error is TicketError
    ticketed.refused("the challenge is of 3 bytes", challenge=b"old")


def test_a_ticket_for_one_certificate_is_refused_by_another_clients(ticketed: Ticketed) -> None:
    bound = signed_ticket(ticketed.ticket(certificate_key_sha256=ticketed.pki.key_sha256("north")), SIGNER)
    ticketed.refused("the ticket is for the TLS key", bound, caller="south")
    ticketed.open(bound).close()


def test_a_session_of_its_own_is_refused(ticketed: Ticketed) -> None:
    client = ticketed.caller()
    described = client.call("Describe", pb.DescribeRequest())
    hello = client.hello(ticketed.lora, seed=1, challenge=described.challenge)
    assert ended(lambda: client.session(hello)) is TicketError


def test_sessions_steps_and_bytes_end_where_the_ticket_says(ticketed: Ticketed) -> None:
    two = signed_ticket(ticketed.ticket(max_sessions=2), SIGNER)
    for _ in range(2):
        ticketed.open(two).hang_up()
    ticketed.until_empty()
    ticketed.refused("allows 2 sessions, and has had them", two)

    stepping = ticketed.open(signed_ticket(ticketed.ticket(ticket_id="1" * 32, max_steps=2), SIGNER))
    for number in (1, 2):
        stepping.forward(HIDDEN_BTD)
        stepping.backward(torch.ones(2, 4, HIDDEN))
        assert stepping.step() == number
    assert ended(stepping.step) is TicketError

    talking = ticketed.open(signed_ticket(ticketed.ticket(ticket_id="2" * 32, max_bytes=6000), SIGNER))
    talking.forward(HIDDEN_BTD, need_grad=False)
    ending = ended(lambda: [talking.forward(HIDDEN_BTD, need_grad=False) for _ in range(5)])
    assert ending is TicketError


def test_a_session_over_its_ticket_contributes_nothing(ticketed: Ticketed) -> None:
    """Not even where the last frame is what goes over it: the close itself."""
    session = ticketed.open(signed_ticket(ticketed.ticket(max_steps=1), SIGNER))
    for _ in range(2):
        session.send(step=pb.Step(lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8))
    session.send(close=pb.Close(trained_tokens=8, contribute=True))
    session.receive("step")
    assert ended(lambda: session.receive("step")) is TicketError
    request = pb.CommitRoundRequest(round=round_to_wire(KEY), base_sha256=ticketed.adapter_sha256, survivors=["77"])
    assert ended(lambda: ticketed.orchestrator.call("CommitRound", request)) is not None


def test_a_full_trunk_tells_a_forger_of_the_ticket_and_an_honest_client_of_the_place(
    start_ticketed: Callable[..., Ticketed],
) -> None:
    ticketed = start_ticketed(max_sessions=1)
    held = ticketed.open()
    ticketed.refused("the proof does not hold", holder=Ed25519PrivateKey.generate())
    good = signed_ticket(ticketed.ticket(ticket_id="1" * 32, max_sessions=1), SIGNER)
    assert ended(lambda: ticketed.open(good)) is CapacityError
    held.close()
    while ticketed.taken():
        time.sleep(0.05)
    ticketed.open(good).close()  # what was refused for lack of a place was not counted


def test_a_renewal_admits_after_the_trunk_was_killed_and_came_back_and_after_the_tickets_time(
    start_ticketed: Callable[..., Ticketed], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticketed = start_ticketed()
    session = ticketed.open()
    renewal = session.welcome.renewal
    again = start_ticketed()  # another process's: the same state directory, and the first one's memory gone
    monkeypatch.setattr("server_trunk.server.TicketBook", partial(TicketBook, clock=lambda: time.time() + 3600))
    late = start_ticketed()
    for trunk in (again, late):
        replayed = trunk.open(renewal)
        assert replayed.welcome.renewal == renewal
        replayed.close()
    late.refused("the ticket expired", signed_ticket(ticketed.ticket(), SIGNER))
    late.refused("the proof does not hold", renewal, holder=Ed25519PrivateKey.generate())


def test_a_renewal_of_another_trunk_is_refused_and_the_ticket_is_good_there(
    start_ticketed: Callable[..., Ticketed], tmp_path: Path
) -> None:
    one, other = start_ticketed(), start_ticketed(state_dir=tmp_path / "other")
    ticket = signed_ticket(one.ticket(), SIGNER)
    renewal = one.open(ticket).welcome.renewal
    other.refused("the renewal is not one of this trunk's", renewal)
    other.open(ticket).close()


def test_a_trunk_without_signers_makes_no_challenge_and_looks_at_no_ticket(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    client = WireClient(start_trunk().address)
    described = client.call("Describe", pb.DescribeRequest())
    assert (described.challenge, described.ticket_signer) == (b"", "")
    session = client.session(client.hello(lora, ticket=b"anything", challenge=b"x", proof=b"y"))
    assert session.welcome.renewal == b""
    session.close()


def test_tickets_without_tls_on_loopback_work_as_they_do_with_it(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    client = WireClient(start_trunk(ticket_signers=(SIGNER_KEY,)).address)
    assert ended(lambda: client.session(client.hello(lora))) is TicketError
    described = client.call("Describe", pb.DescribeRequest())
    ticket = a_ticket(model_fingerprint=described.model.fingerprint, issued_at=int(time.time()), trainable="AB")
    presented = signed_ticket(ticket, SIGNER)
    hello = client.hello(
        lora, client_id="77", round=round_to_wire(KEY), adapter_sha256="a" * 64, ticket=presented,
        challenge=described.challenge, proof=prove(HOLDER, presented, described.challenge),
    )  # fmt: skip
    assert ended(lambda: client.session(hello)) is SessionError  # admitted; the trunk does not hold that adapter
