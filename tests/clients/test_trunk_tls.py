"""A site's TLS to its trunk: which files its node config names, and what it shows where sessions need a ticket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, RecordDict

import clients
from clients.admission import Admission
from clients.app import _read_order
from clients.site import Site, read_site
from clients.split_model import adapter_state
from contract.config import ConfigValue, RunConfig
from contract.errors import AccessError, ConfigError, ConnectionFailedError, FrameError
from contract.ticket import MAX_TICKET_BYTES, parse_ticket, renewed, require_proof, signed_ticket
from contract.tls import TlsFiles
from contract.trunk_pb2 import Hello
from orchestrator.messages import adapter_record
from tests.clients.conftest import ALL_LINEAR, CUT
from tests.conftest import TrunkProcess
from tests.contract.ticket_cases import HOLDER, RENEWAL_KEY, SIGNER, SIGNER_KEY, a_ticket
from tests.pki import Pki

PLAIN: dict[str, ConfigValue] = {"model": "m", "data": "d", "trunk-address": "127.0.0.1:1"}
FILES: dict[str, ConfigValue] = {"trunk-ca": "ca.pem", "trunk-certificate": "north.pem", "trunk-key": "north.key"}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.made(tmp_path_factory.mktemp("keys") / "pki")


@pytest.fixture(scope="module")
def secured(trunk_process: Callable[..., TrunkProcess], llama_dir: Path, pki: Pki) -> TrunkProcess:
    files = pki.files("trunk")
    tls = {"tls_certificate": files.certificate, "tls_key": files.key, "client_ca": files.ca}
    return trunk_process(llama_dir, CUT.head, CUT.tail, **tls)


def site_of(node_config: dict[str, ConfigValue]) -> Site:
    return read_site(node_config, RunConfig.from_flower({}), "7", "1", simulated=False)


def test_a_site_has_the_files_that_its_node_config_names_and_none_where_it_names_none() -> None:
    assert site_of(PLAIN).trunk_tls is None
    assert site_of(PLAIN | FILES).trunk_tls == TlsFiles(Path("ca.pem"), Path("north.pem"), Path("north.key"))


@pytest.mark.parametrize("missing", list(FILES))
def test_a_site_with_some_of_its_files_takes_no_part_rather_than_speak_in_clear(missing: str) -> None:
    told = {key: value for key, value in FILES.items() if key != missing}
    with pytest.raises(ConfigError, match=f"given without node config {missing}; TLS to the trunk needs all three"):
        site_of(PLAIN | told)
    with pytest.raises(ConfigError, match=f"node config {missing} is 7; it must be text"):
        site_of(PLAIN | FILES | {missing: 7})


def load(secured: TrunkProcess, llama_dir: Path, files: TlsFiles | None) -> Any:
    named = {} if files is None else {"trunk_ca": files.ca, "trunk_certificate": files.certificate}
    named |= {} if files is None else {"trunk_key": files.key}
    return clients.load_split_model(llama_dir, secured.address, CUT.head, CUT.tail, ALL_LINEAR, **named)


def test_the_sdk_trains_by_tls_as_it_does_without(
    secured: TrunkProcess, trunk: TrunkProcess, llama_dir: Path, pki: Pki
) -> None:
    states = []
    for served, files in ((trunk, None), (secured, pki.files("north"))):
        model = load(served, llama_dir, files)
        tokens_BT = torch.arange(12).reshape(2, 6)
        optimizer = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=1e-2)
        model(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
        optimizer.step()
        states.append(adapter_state(model))
        clients.close(model)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_sdk_is_told_what_is_wrong_before_a_model_is_loaded(
    secured: TrunkProcess, llama_dir: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clients.split_model.load_part", lambda *given, **named: pytest.fail("a model was loaded"))
    with pytest.raises(ConnectionFailedError, match="if it serves by TLS, it must be asked by TLS"):
        load(secured, llama_dir, None)
    with pytest.raises(ConfigError, match="trunk.key is not that of the certificate"):
        load(secured, llama_dir, TlsFiles(pki.ca, pki.files("north").certificate, pki.files("trunk").key))
    with pytest.raises(ConfigError, match="trunk_ca is given without trunk_certificate and trunk_key"):
        clients.load_split_model(llama_dir, secured.address, CUT.head, CUT.tail, ALL_LINEAR, trunk_ca=pki.ca)


def test_the_sdk_needs_the_role_of_a_client(secured: TrunkProcess, llama_dir: Path, pki: Pki) -> None:
    with pytest.raises(AccessError, match="Session is for client; the caller's certificate is of role operator"):
        load(secured, llama_dir, pki.files("operator"))


# ---- tickets ---------------------------------------------------------------------------------------------------------


def test_a_trunk_that_renewed_a_ticket_is_shown_its_renewal_and_others_the_ticket() -> None:
    ticket = a_ticket()
    admission, hello = Admission(signed_ticket(ticket, SIGNER), HOLDER), Hello(client_id="77")
    renewal = renewed(ticket, RENEWAL_KEY)
    shown = admission.presented(hello, "one:1", b"challenge")
    assert (shown.ticket, shown.client_id, hello.ticket) == (admission.ticket, "77", b"")
    admission.keep("one:1", renewal)
    admission.keep("two:2", b"")
    for address, wanted in (("one:1", renewal), ("two:2", admission.ticket)):
        shown = admission.presented(hello, address, b"another")
        assert shown.ticket == wanted
        require_proof(parse_ticket(shown.ticket, [SIGNER_KEY], RENEWAL_KEY), wanted, b"another", shown.proof)
    assert admission.presented(hello, "open:3", b"") == hello
    with pytest.raises(FrameError, match="gave a renewal of 4097 bytes"):
        admission.keep("one:1", bytes(MAX_TICKET_BYTES + 1))


def test_nothing_of_a_key_is_shown_where_an_admission_is() -> None:
    assert "PrivateKey" not in repr(Admission(b"", Ed25519PrivateKey.generate()))


@pytest.mark.parametrize("ticket", [7, "text", [1, 2], b"x" * (MAX_TICKET_BYTES + 1)])
def test_an_order_with_something_else_in_the_tickets_place_is_refused(ticket: Any) -> None:
    facts = {"run": "r", "round": 1, "attempt": 1, "client_id": "7", "client_sha256": "a", "trunk_sha256": "b"}
    record = ConfigRecord({**facts, "factor": "B", "clients": 2, "ticket": ticket})
    content = RecordDict({"round": record, "adapter": adapter_record(np.zeros(3, dtype=np.float32))})
    with pytest.raises(FrameError, match="ticket is no more than 4096 bytes"):
        _read_order(content)
    del record["ticket"]
    assert _read_order(content).ticket == b""
