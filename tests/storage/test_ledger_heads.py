"""Signed heads: of this ledger's chains, and those that peers sent of theirs; the same on both engines."""

from dataclasses import replace
from typing import Any

import pytest

from contract.errors import LedgerError
from contract.privacy_records import Unit
from storage import ledger_heads
from storage.ledger import Ledger, open_ledger
from storage.ledger_chain import head_fault, signed_head, unit_id_of
from tests.storage.ledger_cases import BUDGET, RUN, Key, admit_all, charge, release, unit

WARD, CLINIC = unit("ward"), unit("clinic")


def test_heads_are_signed_when_an_attempt_is_settled_and_when_a_budget_changes(ledger: Ledger) -> None:
    ledger.set_budget(WARD, BUDGET, "ops", "first")
    ledger.reserve([charge(WARD), charge(CLINIC), charge(CLINIC, paid=release(channel="metrics"))], admit_all)
    ledger.settle(RUN, 1, 1, "COMMITTED")
    found = ledger.heads(WARD)
    assert [(head.seq, head.run, head.round, head.attempt) for head in found] == [(1, "", 1, 0), (3, RUN, 1, 1)]
    assert [head.hash for head in found] == [row.hash for row in ledger.rows(WARD) if row.state != "RESERVED"]
    assert {head.seq for head in ledger.heads(CLINIC)} == {4}
    newest = ledger.newest_heads([WARD, unit("nobody"), CLINIC])
    assert newest == {WARD: found[-1], CLINIC: ledger.heads(CLINIC)[-1]}
    assert [head_fault(head) for head in ledger.heads()] == [None] * 3
    assert {head.signer for head in ledger.heads()} == {Key().public_key_text}


def test_a_ledger_without_a_key_signs_nothing(database_url: str) -> None:
    ledger = open_ledger(database_url)
    ledger.reserve([charge()], admit_all)
    ledger.settle(RUN, 1, 1, "COMMITTED")
    ledger.set_budget(WARD, BUDGET, "ops", "first")
    assert ledger.heads() == []
    ledger.close()


def test_a_peers_chain_may_only_grow(ledger: Ledger) -> None:
    def head(seq: int, row: str, number: int = 1, key: int = 1) -> Any:
        return signed_head(Key(key), unit_id_of(WARD), seq, row * 64, (RUN, number, 1))

    ledger.note_peer_head(WARD, head(2, "a"))
    ledger.note_peer_head(WARD, head(2, "a"))
    ledger.note_peer_head(WARD, head(5, "b", 2))
    ledger.note_peer_head(WARD, head(5, "b", 3))
    for back, named in ((head(4, "c", 3), "now it shows row 4"), (head(5, "c", 3), "row 5 was b+, now it shows row 5")):
        with pytest.raises(LedgerError, match=f"went back: .*{named}"):
            ledger.note_peer_head(WARD, back)
    ledger.note_peer_head(WARD, head(1, "d", key=2))  # another orchestrator's chain of the same unit
    assert ledger.peer_heads(WARD) == [head(1, "d", key=2), head(5, "b", 2)]
    assert ledger.peer_heads() == ledger.peer_heads(WARD)
    assert (ledger.peer_heads(CLINIC), ledger.heads(), ledger.verify()) == ([], [], [])


def test_strangers_cannot_have_heads_kept_without_end(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def note(of: Unit, key: int, seq: int = 1) -> None:
        ledger.note_peer_head(of, signed_head(Key(key), unit_id_of(of), seq, "a" * 64, (RUN, seq, 1)))

    for key in range(ledger_heads.MOST_SIGNERS):
        note(WARD, key)
    with pytest.raises(LedgerError, match="heads of client ward, dataset notes by 16 keys are kept, and another key"):
        note(WARD, ledger_heads.MOST_SIGNERS)
    note(WARD, 3, seq=2)  # whose heads are kept already goes on
    note(CLINIC, 99)
    monkeypatch.setattr(ledger_heads, "MOST_PEER_CHAINS", 2)
    with pytest.raises(LedgerError, match="heads of 2 units are kept, and this one is of another, client nobody"):
        note(unit("nobody"), 1)
    note(CLINIC, 100)
    assert len(ledger.peer_heads()) == ledger_heads.MOST_SIGNERS + 2


def test_a_peers_head_is_kept_only_with_its_signature_and_for_its_own_unit(ledger: Ledger) -> None:
    head = signed_head(Key(), unit_id_of(WARD), 2, "a" * 64, (RUN, 1, 1))
    with pytest.raises(LedgerError, match="came for client clinic"):
        ledger.note_peer_head(CLINIC, head)
    forged = {"seq": 3, "hash": "b" * 64, "run": "r2", "round": 2, "attempt": 2, "signature": "0" * 128}
    for name, value in (*forged.items(), ("signer", Key(2).public_key_text), ("signer", "nobody"), ("signature", "x")):
        with pytest.raises(LedgerError, match="the head of client ward, dataset notes cannot be kept"):
            ledger.note_peer_head(WARD, replace(head, **{name: value}))
    assert ledger.peer_heads() == []
