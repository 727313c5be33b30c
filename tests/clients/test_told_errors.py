"""Under masked sums an orchestrator is told the words of those errors only that quote nothing of a site's data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from clients import bookkeeping, opacus_gradients
from clients.app import _reason
from clients.connection import TrunkConnection
from clients.remote_trunk import RemoteTrunk
from clients.secure import tellable
from contract import errors
from contract.errors import AgreementError, ConfigError, DataError, TrunklineError
from contract.trunk_pb2 import CloseReply, Hello, Welcome
from tests.clients.secure_sites import SecureSession, SecureSites

TOLD = {
    *("SecureSumError", "ConfigError", "ModelError", "UnsupportedModelError", "AgreementError"),
    *("StorageError", "SchemaError", "LeaseError", "IntegrityError", "ConnectionFailedError", "DeadlineError"),
    *("AccessError", "TicketError"),
}
WORDS = "row 3 has 4711 tokens"


def kinds() -> list[type[TrunklineError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TrunklineError)]
    assert {kind.__name__ for kind in found} > TOLD
    return found


@pytest.mark.parametrize("kind", kinds())
def test_only_listed_errors_are_told_in_their_own_words(kind: type[TrunklineError]) -> None:
    name = kind.__name__
    told = f"{name}: {WORDS}" if name in TOLD else f"{name} at the client; its log says more"
    assert _reason(kind(WORDS), masked=True) == told
    assert _reason(kind(WORDS), masked=False) == f"{name}: {WORDS}"


def test_an_error_that_is_added_one_day_is_not_told_before_it_is_listed() -> None:
    new = type("NewError", (TrunklineError,), {})
    assert _reason(new(WORDS), masked=True) == "NewError at the client; its log says more"


def test_a_refusal_of_the_next_session_withholds_the_same_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sites = SecureSites(tmp_path)
    session = SecureSession(sites, sites.terms())

    def failing(*_: object) -> None:
        raise DataError(WORDS)

    monkeypatch.setattr("clients.secure.SecureClient.join", failing)
    assert session.join("site-0").refusal == "DataError at the client; its log says more"
    assert f"no part in the next secure sum: {WORDS}" in caplog.messages


def test_how_many_rows_a_secret_draw_had_is_in_no_error_that_is_told() -> None:
    tells: list[Callable[[], object]] = [
        lambda: bookkeeping._by_row(torch.zeros(23, 7), 13, "a layer"),
        lambda: opacus_gradients._require_rows("a layer", torch.zeros(23), 13),
    ]
    for tell in tells:
        with pytest.raises(ConfigError, match="a layer") as caught:
            tell()
        assert not any(letter.isdigit() for letter in str(tellable(caught.value)))


class Stream:
    """A trunk that welcomes with one adapter and acknowledges one number of tokens."""

    def __init__(self, adapter_sha256: str, trained_tokens: int) -> None:
        self.replies = {
            "welcome": Welcome(adapter_sha256=adapter_sha256, codecs=["identity"]),
            "close": CloseReply(trained_tokens=trained_tokens),
        }

    def send(self, frame: object) -> None:
        pass

    def receive(self, kind: str) -> Any:
        return self.replies[kind]

    def finish(self) -> None:
        pass

    cancel = finish


def session_with(stream: Stream) -> RemoteTrunk:
    connection = SimpleNamespace(
        address="trunk:9", wire_log=None, open_stream=lambda timeout_s: stream, round_trip_s=lambda: 0.0
    )
    hello = Hello(adapter_sha256="asked")
    return RemoteTrunk(cast(TrunkConnection, connection), hello, hidden_size=8, adapter_bytes=8)


def test_a_weight_that_the_trunk_got_wrong_is_told_without_any_number() -> None:
    with pytest.raises(AgreementError, match="trunk:9 acknowledged another number of trained tokens") as caught:
        session_with(Stream("asked", 815)).close(trained_tokens=4711, contribute=True)
    assert not any(number in str(caught.value) for number in ("815", "4711"))


def test_a_trunk_that_starts_from_another_adapter_is_told_in_full() -> None:
    with pytest.raises(AgreementError) as caught:
        session_with(Stream("another", 0))
    words = "the trunk at trunk:9 starts from adapter another; asked was asked for"
    assert _reason(caught.value, masked=True) == f"AgreementError: {words}"
