"""The ClientApp works once for a session, one process at a time, whatever its training comes to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from clients import vault as vaults
from clients.app import app
from clients.participation import RoundWork
from clients.secure import SecureSite
from clients.vault import Vault
from contract.errors import SecureSumError, UpdateError
from contract.secure_records import SecureOrder, to_record
from tests.clients.secure_sites import FINGERPRINT, SecureSession, SecureSites, node_id
from tests.clients.test_secure_settings import FIRST, PRIVATE, context_of, refusal, train_message

pytestmark = pytest.mark.usefixtures("flower_task")


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SecureSites:
    monkeypatch.setattr(vaults, "LOCK_WAIT_S", 0.1)
    return SecureSites(tmp_path)


def stage_message() -> Message:
    order = ConfigRecord(dict(to_record(SecureOrder("a run", greet=b"a nonce"))))
    return Message(RecordDict({"secure": order}), dst_node_id=int(node_id(FIRST)), message_type="query.secure")


def fail_at_the_model(sites: SecureSites, session: SecureSession, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Everything but the round's own part is there; what is known of the turn when the model is opened."""
    known: list[bool] = []

    def opening(*_: object) -> NoReturn:
        known.append(sites.kept(FIRST, session.session_id).attempted)
        raise UpdateError(PRIVATE)

    served = SimpleNamespace(model=SimpleNamespace(fingerprint=FINGERPRINT))
    connection = SimpleNamespace(describe=lambda: served, close=lambda: None)
    for name, stub in {
        "participation.resolve_model": lambda model: model,
        "participation.load_tokenizer": lambda model: None,
        "participation.load_dataset": lambda *_: None,
        "replay.trunk_route": lambda *_: connection,
        "participation._open_model": opening,
    }.items():
        monkeypatch.setattr(f"clients.{name}", stub)
    return known


@pytest.mark.parametrize("finals", [(False, False), (False, True), (True, False), (True, True)])
def test_a_failed_turn_is_not_taken_again_and_nothing_is_trained_for_a_second_order(
    sites: SecureSites, finals: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = SecureSession(sites, sites.terms())
    session.set_up()
    known = fail_at_the_model(sites, session, monkeypatch)
    asked = SecureOrder("a run", session=session.session_id, inbox=session.server.inbox(FIRST))
    told = []
    for final in finals:
        reply = app(train_message(asked, final=final), context_of(sites))
        told.append(str(dict(reply.content["secure"])["failure"]))
    assert told[0] == "UpdateError at the client; its log says more"
    assert told[1].startswith("SecureSumError: asked to train, but this session's one turn was taken before")
    assert known == [True]


@pytest.mark.parametrize("kind", ["train", "secure"])
def test_a_message_finds_no_way_in_while_another_process_works_for_the_site(sites: SecureSites, kind: str) -> None:
    state_dir = sites.settings(FIRST).state_dir
    message = train_message(SecureOrder("a run", session=bytes(32))) if kind == "train" else stage_message()
    with Vault(state_dir).alone():
        reason = refusal(app(message, context_of(sites)))
    assert reason.startswith(f"SecureSumError: another process works in the state-dir {state_dir}: two SuperNodes must")
    assert not app(message, context_of(sites)).has_error()


def test_a_message_is_alone_from_before_its_first_look_until_its_answer_is_kept(
    sites: SecureSites, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    state_dir = sites.settings(FIRST).state_dir

    def note(where: str) -> None:
        with pytest.raises(SecureSumError, match="must not share one"), Vault(state_dir).alone():
            pass
        looked.append(where)

    def training(*_: object, **__: object) -> RoundWork:
        note("train")
        return RoundWork(None, {})

    opened, answered = SecureSite.__init__, SecureSite.answer

    def opening(self: SecureSite, *args: object) -> None:
        note("open")
        opened(self, *args)  # type: ignore[arg-type]

    def answering(self: SecureSite, *args: object) -> object:
        found = answered(self, *args)  # type: ignore[arg-type]
        note("answer")
        return found

    monkeypatch.setattr("clients.participation.take_part", training)
    monkeypatch.setattr(SecureSite, "__init__", opening)
    monkeypatch.setattr(SecureSite, "answer", answering)
    for message in (train_message(SecureOrder("a run", session=bytes(32))), stage_message()):
        assert not app(message, context_of(sites)).has_error()
    assert looked == ["open", "train", "answer", "open", "answer"]
