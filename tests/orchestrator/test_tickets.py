"""Tickets as an orchestrator issues them: to whom, for what, under which key, and when it issues none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from contract.config import RunConfig
from contract.errors import ConfigError
from contract.identity import public_key_text, read_private_key
from contract.records import CutLayers, RoundKey
from contract.ticket import MAX_COUNT, MAX_ROUND_S, Ticket, parse_ticket
from orchestrator.exchange import MESSAGE_TTL_S
from orchestrator.replicas import connect
from orchestrator.run import conduct
from orchestrator.ticket_key import open_ticket_key, signer_text
from orchestrator.tickets import MOST_UNKNOWN_TOKENS, TicketOffice, open_office, session_limits
from orchestrator.trunk import ServedModel
from server_trunk.contributions import Contributions
from server_trunk.server import ServeOptions
from storage.store import Store, open_store
from tests.orchestrator.conftest import Bench, LiveTrunk
from tests.orchestrator.fakes import FakeNode
from tests.orchestrator.secure_fakes import SecureClient
from tests.server_trunk.conftest import RunningTrunk

HOLDER = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
KEY = RoundKey("a-run", 3, 2)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Of an operator whose home has no ticket key yet."""
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))
    opened = open_store(f"sqlite:///{tmp_path / 'store.db'}")
    yield opened
    opened.close()


def served(*signers: str) -> ServedModel:
    return ServedModel("f" * 64, CutLayers(1, 2), "float32", "sdpa", 6, 64, signers)


def config(**told: Any) -> RunConfig:
    return RunConfig.from_flower({key.replace("_", "-"): value for key, value in told.items()})


def issued(office: TicketOffice, *, final: bool = False, holder: bytes = HOLDER) -> Ticket:
    signer = office.key.public_key().public_bytes_raw()
    return parse_ticket(office.for_round(KEY, "B", "a" * 64, final=final)("77", holder), [signer], b"")


def test_a_ticket_says_what_its_client_may_do_in_its_attempt(store: Store) -> None:
    office = TicketOffice(open_ticket_key(), config(local_steps=7, trunk_retries=2), served(), store, lambda: 1000.9)
    ticket = issued(office)
    assert (ticket.run, ticket.round, ticket.attempt, ticket.client_id) == ("a-run", 3, 2, "77")
    assert (ticket.holder, ticket.adapter_sha256, ticket.trainable) == (HOLDER, "a" * 64, "B")
    assert (ticket.head_layers, ticket.tail_layers, ticket.model_fingerprint) == (1, 2, "f" * 64)
    assert (ticket.max_sessions, ticket.max_steps) == (3, 21)
    assert (ticket.issued_at, ticket.expires_at - ticket.issued_at) == (1000, 900)
    assert MESSAGE_TTL_S <= ticket.round_ends_at - ticket.issued_at <= MAX_ROUND_S
    assert issued(office).ticket_id != ticket.ticket_id
    assert issued(office, final=True).max_steps == 0
    frozen = TicketOffice(office.key, config(trunk_adapter="frozen"), served(), store)
    assert issued(frozen).trainable == "none"


def test_a_ticket_names_the_certificate_that_its_holder_is_enrolled_with_at_that_moment(store: Store) -> None:
    office = TicketOffice(open_ticket_key(), config(), served(), store)
    assert issued(office).certificate_key_sha256 == ""
    store.enroll_client("north", public_key_text(HOLDER), "ada", "c" * 64)
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    store.enroll_client("south", public_key_text(other), "ada")
    assert issued(office).certificate_key_sha256 == "c" * 64
    assert issued(office, holder=other).certificate_key_sha256 == ""
    store.set_client_certificate("north", "d" * 64, "ada")
    assert issued(office).certificate_key_sha256 == "d" * 64
    store.revoke_client("north", "ada", "laptop stolen")
    assert issued(office).certificate_key_sha256 == "d" * 64, "revoked after its cohort was drawn"


def test_an_office_opens_where_the_trunk_knows_its_key_and_only_there(store: Store, tmp_path: Path) -> None:
    assert open_office(config(), served(), store, "trunk:1") is None
    assert not (tmp_path / "home" / "ticket.pem").exists()
    stranger = public_key_text(HOLDER)
    with pytest.raises(
        ConfigError, match=r"takes tickets by ed25519:.* signs by .*: start the trunk with --ticket-sig"
    ):
        open_office(config(), served(stranger), store, "trunk:1")
    own = signer_text(open_ticket_key())
    office = open_office(config(), served(stranger, own), store, "trunk:1")
    assert office is not None
    assert signer_text(read_private_key(tmp_path / "home" / "ticket.pem")) == own
    with pytest.raises(ConfigError, match="secagg is off, and the trunk at trunk:1 takes sessions by ticket"):
        open_office(config(secagg="off"), served(own), store, "trunk:1")


@pytest.mark.parametrize(
    ("told", "rows"),
    [
        ({"local_steps": 10, "eval_batches": 2}, 10 * 8 + 2 * 8),
        ({"local_steps": 10, "gradient_accumulation_steps": 4, "metrics": "off"}, 10 * 4 * 8),
        ({"local_steps": 10, "eval_fraction": 0.0}, 10 * 8),
        ({"local_steps": 0, "max_tokens": 5000, "eval_fraction": 0.0}, 5000),
        ({"local_steps": 10}, 10 * 8 + MOST_UNKNOWN_TOKENS // 128),
        (
            {"local_steps": 10, "dp": "example", "trunk_adapter": "frozen", "metrics": "off"},
            MOST_UNKNOWN_TOKENS // 128,
        ),
    ],
)
def test_limits_are_twice_what_the_settings_let_cross_in_the_widest_codec(told: dict[str, Any], rows: int) -> None:
    settings = config(max_length=128, per_device_train_batch_size=8, **told)
    hidden = 64
    row_bytes = 128 * (4 * 4 * hidden + 64) + 4096
    steps, size = session_limits(settings, hidden, final=False)
    assert steps == (told["local_steps"] or 5000)
    assert size == 2 * (rows * row_bytes + (1 << 20))
    judged = session_limits(settings, hidden, final=True)
    assert judged[0] == 0
    assert judged[1] <= size


def test_limits_of_the_largest_settings_are_still_a_ticket(store: Store) -> None:
    large = config(local_steps=10**6, per_device_train_batch_size=1, max_length=10**3, trunk_retries=10**6)
    huge = ServedModel("f" * 64, CutLayers(1, 1), "float32", "sdpa", 6, 10**9)
    assert issued(TicketOffice(open_ticket_key(), large, huge, store)).max_bytes == MAX_COUNT


@pytest.fixture(scope="module")
def ticketed_trunk(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveTrunk, bytes]]:
    """A trunk that takes one key's tickets, and that key's file."""
    key, state = Ed25519PrivateKey.generate(), tmp_path_factory.mktemp("ticketed")
    signers = (key.public_key().public_bytes_raw(),)
    options = ServeOptions(str(tiny_model), CutLayers(1, 1), "127.0.0.1:0", state, device="cpu", ticket_signers=signers)
    running = RunningTrunk(options)
    yield LiveTrunk(running.address, Contributions(state)), key.private_bytes_raw()
    running.stop()


def secure(bench: Bench, trunk: LiveTrunk, fingerprint: str) -> None:
    for number, scripted in list(bench.clients.items()):
        client = SecureClient(
            bench.config, trunk.contributions, scripted.weight, node_id=number, home=bench.home / "sites",
            client_names=scripted.client_names, client_sizes=scripted.client_sizes, fingerprint=fingerprint,
        )  # fmt: skip
        bench.clients[number], bench.grid.nodes[number] = client, FakeNode(client)


def test_a_run_sends_each_client_a_ticket_of_its_own_with_every_order(
    make_bench: Callable[..., Bench], ticketed_trunk: tuple[LiveTrunk, bytes]
) -> None:
    trunk, seed = ticketed_trunk
    bench = make_bench(secagg="on", trunk_address=trunk.address).tell_shapes_ahead()
    bench.trunk = trunk
    key = Ed25519PrivateKey.from_private_bytes(seed)
    bench.home.mkdir(exist_ok=True)
    path = bench.home / "ticket.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    described = connect(trunk.address).describe()
    secure(bench, trunk, described.fingerprint)
    bench.conduct()
    signer = key.public_key().public_bytes_raw()
    for number, client in bench.clients.items():
        assert isinstance(client, SecureClient)
        found = [parse_ticket(bytes(order["ticket"]), [signer], b"") for order in client.orders]
        told = [(one.round, one.attempt, one.max_steps > 0) for one in found]
        assert told == [(1, 1, True), (2, 1, True), (3, 0, False)]
        assert {one.client_id for one in found} == {str(number)}
        assert {one.holder for one in found} == {client.identity.public_key().public_bytes_raw()}
        assert [one.adapter_sha256 for one in found] == [order["trunk_sha256"] for order in client.orders]


def test_a_run_whose_key_the_trunk_does_not_know_fails_at_once_and_says_what_to_do(
    make_bench: Callable[..., Bench], ticketed_trunk: tuple[LiveTrunk, bytes]
) -> None:
    bench = make_bench(secagg="on", trunk_address=ticketed_trunk[0].address)
    with pytest.raises(ConfigError, match="start the trunk with --ticket-signer 'ed25519:"):
        conduct(bench.start(bench.config.to_flower()))
    run = bench.store.get_run("last")
    assert (run.status, bench.grid.sent) == ("failed", [])
    assert "start the trunk with --ticket-signer" in str(run.reason)
