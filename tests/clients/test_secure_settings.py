"""What a site's node config says of secure sums, and what the ClientApp tells and keeps to itself under them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from aggregation import keys
from aggregation.terms import Policy, greeting_message
from clients.app import REFUSED, _reason, app
from clients.participation import RoundWork
from clients.secure import SecureTurn
from clients.site import RosterPin, Site, read_site
from contract.config import ConfigValue, RunConfig
from contract.errors import ConfigError, DataError, NonFiniteError, SecureSumError, TrunklineError, UpdateError
from contract.identity import public_key_text
from contract.privacy_records import Unit
from contract.records import Factor
from contract.secure_records import SecureOrder, reply_from, to_record
from orchestrator.messages import RoundOrder, adapter_record, order_message
from privacy.plan import operators_budget
from storage.home import home_dir, simulation_dir
from storage.ledger import open_ledger
from tests.clients.secure_sites import CONFIG, SecureSession, SecureSites, node_id

FIRST = "site-0"
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32))).public_key().public_bytes_raw()
NODE: dict[str, ConfigValue] = {"model": "a model", "data": "a text", "trunk-address": "127.0.0.1:1"}
PRIVATE = "row 3 reads: a private sentence"
QUOTING = pytest.mark.parametrize("kind", [DataError, UpdateError, NonFiniteError, TrunklineError])


def site_of(node_config: dict[str, ConfigValue], *, simulated: bool = False) -> Site:
    return read_site(NODE | node_config, CONFIG, "42", "7", simulated=simulated)


def test_a_site_that_says_nothing_of_secure_sums_keeps_its_own_beside_the_home_and_insists_on_the_defaults() -> None:
    site = site_of({})
    assert site.state_dir == home_dir() / "clients" / "42"
    assert site.identity_key == site.state_dir / "identity.pem"
    assert site.policy == Policy(min_members=10, min_threshold=0, max_weight=1 << 24)
    assert site.roster is None


def test_a_state_lies_beside_a_key_that_is_named_unless_it_is_named_itself() -> None:
    """Flower gives a SuperNode that starts anew another node id."""
    beside = site_of({"identity-key": "/keys/north.pem"})
    assert (beside.identity_key, beside.state_dir) == (Path("/keys/north.pem"), Path("/keys/north.pem.state"))
    inside = site_of({"state-dir": "/state"})
    assert (inside.identity_key, inside.state_dir) == (Path("/state/identity.pem"), Path("/state"))
    both = site_of({"identity-key": "/keys/north.pem", "state-dir": "/state"})
    assert (both.identity_key, both.state_dir) == (Path("/keys/north.pem"), Path("/state"))


def test_what_a_site_insists_on_and_whom_it_believes_come_from_its_node_config() -> None:
    told: dict[str, ConfigValue] = {"roster": "/rosters/all.json", "roster-signer": public_key_text(SIGNER)}
    counts: dict[str, ConfigValue] = {
        "secagg-min-members": 20,
        "secagg-min-threshold": 15,
        "secagg-max-weight": 4096,
    }
    site = site_of(told | counts)
    assert site.policy == Policy(min_members=20, min_threshold=15, max_weight=4096)
    assert site.roster == RosterPin(Path("/rosters/all.json"), SIGNER)


def test_a_site_takes_part_in_deterministic_secure_sums_only_where_it_says_so_and_has_a_name() -> None:
    repeated = RunConfig.from_flower({**CONFIG.to_flower(), "deterministic": True})
    named, allowed = {"name": "north"}, {"allow-deterministic": True}
    for lacking, told in (
        (named, "two sums over other clients would differ by just that; .*allow-deterministic=true in its node config"),
        (allowed, "node config gives no name: its batches are drawn by it"),
    ):
        with pytest.raises(ConfigError, match=told):
            read_site({**NODE, **lacking}, repeated, "42", "7", simulated=False)
    read_site({**NODE, **named, **allowed}, repeated, "42", "7", simulated=False)
    read_site(NODE, repeated, "42", "7", simulated=True)
    in_clear = RunConfig.from_flower({**repeated.to_flower(), "secagg": "off"})
    read_site({**NODE, **named}, in_clear, "42", "7", simulated=False)


@pytest.mark.parametrize("key", ["state-dir", "identity-key", "roster", "roster-signer"])
@pytest.mark.parametrize("value", [5, True, 0.5])
def test_a_place_that_is_no_text_is_named(key: str, value: ConfigValue) -> None:
    with pytest.raises(ConfigError, match=f"node config {key} is {value!r}; it must be text"):
        site_of({key: value})


@pytest.mark.parametrize("key", ["secagg-min-members", "secagg-min-threshold", "secagg-max-weight"])
@pytest.mark.parametrize("value", ["4", -1, True, 4.0])
def test_a_floor_that_is_no_count_is_named(key: str, value: ConfigValue) -> None:
    with pytest.raises(ConfigError, match=f"node config {key} is {value!r}; it must be a whole number, >= 0"):
        site_of({key: value})


def test_a_roster_is_pinned_by_its_file_and_its_signer_or_not_at_all() -> None:
    signer = public_key_text(SIGNER)
    with pytest.raises(ConfigError, match="node config holds roster but no roster-signer"):
        site_of({"roster": "/rosters/all.json"})
    with pytest.raises(ConfigError, match="node config holds roster-signer but no roster;"):
        site_of({"roster-signer": signer})
    with pytest.raises(ConfigError, match="node config holds roster but no roster-signer"):
        site_of({"roster": "/rosters/all.json", "roster-signer": ""})
    for wrong in (signer.removeprefix("ed25519:"), signer[:-4], public_key_text(bytes(32))):
        with pytest.raises(ConfigError, match="node config roster-signer"):
            site_of({"roster": "/rosters/all.json", "roster-signer": wrong})


def test_a_simulated_site_takes_part_in_small_sums_with_a_throw_away_identity() -> None:
    pinned: dict[str, ConfigValue] = {"roster": "/rosters/all.json", "roster-signer": public_key_text(SIGNER)}
    site = site_of({"partition-id": 3, "secagg-min-members": 20, **pinned}, simulated=True)
    assert (site.policy.min_members, site.policy.min_threshold) == (2, 0)
    assert site.policy.max_weight > 1 << 40
    assert site.roster is None
    assert site.state_dir == simulation_dir("7") / "42"
    assert site.identity_key == site.state_dir / "identity.pem"


def test_whoever_starts_a_masked_run_does_not_choose_the_sites_trunk() -> None:
    theirs = CONFIG.model_copy(update={"trunk_address": "192.0.2.1:9"})
    without = {key: value for key, value in NODE.items() if key != "trunk-address"}
    with pytest.raises(ConfigError, match="trunk-address is not set; with secagg on it must be in the node config"):
        read_site(without, theirs, "42", "7", simulated=False)
    assert read_site(NODE, theirs, "42", "7", simulated=False).trunk_address == "127.0.0.1:1"


@QUOTING
def test_only_masked_sums_keep_back_what_may_quote_a_sites_data(kind: type[TrunklineError]) -> None:
    error = kind(PRIVATE)
    assert _reason(error, masked=True) == f"{kind.__name__} at the client; its log says more"
    assert _reason(error, masked=False) == f"{kind.__name__}: {PRIVATE}"
    assert _reason(SecureSumError("a stage\n played twice"), masked=True) == "SecureSumError: a stage played twice"


@pytest.fixture
def sites(tmp_path: Path) -> SecureSites:
    return SecureSites(tmp_path)


def context_of(sites: SecureSites, **changed: ConfigValue) -> Context:
    site = sites.settings(FIRST)
    return Context(
        run_id=1,
        node_id=int(node_id(FIRST)),
        node_config=NODE
        | sites.node_config
        | {"state-dir": str(site.state_dir), "identity-key": str(site.identity_key)},
        state=RecordDict(),
        run_config=sites.config.to_flower() | changed,
    )


def train_message(secure: SecureOrder | None, *, final: bool = False) -> Message:
    factor: Factor = "B"
    order = RoundOrder("a run", 1, 1, "c" * 64, "d" * 64, factor, 4, final=final)
    message = order_message(node_id(FIRST), order, adapter_record(np.zeros(3, dtype=np.float32)))
    if secure is not None:
        message.content["secure"] = ConfigRecord(dict(to_record(secure)))
    return message


def refusal(reply: Message) -> str:
    assert reply.has_error()
    assert reply.error.code == REFUSED
    return str(reply.error.reason)


def raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Stands for the training, which needs a trunk."""

    def failing(*_: object, **__: object) -> RoundWork:
        raise error

    monkeypatch.setattr("clients.participation.take_part", failing)


@QUOTING
@pytest.mark.usefixtures("flower_task")
def test_an_error_reply_quotes_the_data_only_with_secagg_off(
    sites: SecureSites, kind: type[TrunklineError], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    raises(monkeypatch, kind(PRIVATE))
    context = context_of(sites)
    del context.run_config["secagg"]
    for masked in (context_of(sites), context):
        caplog.clear()
        reply = app(train_message(SecureOrder("a run", session=bytes(32))), masked)
        assert dict(reply.content["secure"]) == {"failure": f"{kind.__name__} at the client; its log says more"}
        assert "update" not in reply.content
        assert PRIVATE in caplog.text
    clear = context_of(sites, secagg="off")
    assert "allow-secagg-off=true in its node config" in refusal(app(train_message(None), clear))
    clear.node_config["allow-secagg-off"] = True
    assert refusal(app(train_message(None), clear)) == f"{kind.__name__}: {PRIVATE}"


@pytest.mark.usefixtures("flower_task")
@pytest.mark.parametrize("final", [False, True])
def test_a_round_without_a_secure_order_sends_nothing_in_clear(
    sites: SecureSites, final: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raises(monkeypatch, AssertionError("the site worked all the same"))
    reason = "SecureSumError: the message holds no config record 'secure', but secagg is on: nothing is sent in clear"
    wrong_kinds: list[Any] = [None, MetricRecord({"run": 1}), ArrayRecord({})]
    for record in wrong_kinds:
        message = train_message(None, final=final)
        if record is not None:
            message.content["secure"] = record
        reply = app(message, context_of(sites))
        assert refusal(reply) == reason
        assert not reply.has_content()
    message.content["secure"] = ConfigRecord({"session": bytes(32)})
    assert refusal(app(message, context_of(sites))) == "FrameError at the client; its log says more"


@pytest.mark.usefixtures("flower_task")
def test_a_masked_round_works_for_the_session_that_it_was_asked_for_and_joins_the_next(
    sites: SecureSites, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[SecureTurn | None] = []

    def working(*_: object, training: bool, turn: SecureTurn | None) -> RoundWork:
        turns.append(turn)
        return RoundWork(b"masked", {})

    monkeypatch.setattr("clients.participation.take_part", working)
    following = SecureSession(sites, sites.terms(round=2))
    asked = SecureOrder("a run", session=b"s" * 32, inbox=b"shares", join=following.terms.to_bytes())
    reply = app(train_message(asked), context_of(sites))
    assert not reply.has_error()
    (turn,) = turns
    assert turn is not None
    assert (turn.session_id, turn.inbox) == (b"s" * 32, b"shares")
    record, metrics = reply.content["secure"], reply.content["metrics"]
    assert isinstance(record, ConfigRecord)
    assert dict(metrics) == {}
    following.server.accept_advert(FIRST, reply_from(record).advert)


@pytest.mark.usefixtures("flower_task")
def test_the_stages_beside_the_training_are_answered_and_noted_in_the_wire_log(
    sites: SecureSites, tmp_path: Path
) -> None:
    sites.node_config["wire-log"] = str(tmp_path / "wire log")
    order = ConfigRecord(dict(to_record(SecureOrder("a run", greet=b"a nonce"))))
    message = Message(RecordDict({"secure": order}), dst_node_id=int(node_id(FIRST)), message_type="query.secure")
    reply = app(message, context_of(sites))
    assert not reply.has_error()
    record = reply.content["secure"]
    assert isinstance(record, ConfigRecord)
    told = reply_from(record)
    assert told.identity == sites.keys[FIRST]
    keys.verify(told.identity, told.greeting, greeting_message("a run", node_id(FIRST), b"a nonce"), "the greeting")
    sizes = {f"secure.{name}": len(value) for name, value in asdict(told).items() if value}
    (line,) = (tmp_path / "wire log").read_text().splitlines()
    assert all(f'"{name}": {size}' in line for name, size in sizes.items())
    assert len(sizes) == 2


def test_a_head_of_a_ledger_in_a_run_that_charges_nothing_is_refused_and_opens_none(sites: SecureSites) -> None:
    head = SecureOrder("a run", session=b"s" * 32, head=b"{}")
    assert "brings the head of a privacy ledger, but the run's dp is off" in refusal(
        app(train_message(head), context_of(sites))
    )
    assert not sites.settings(FIRST).ledger.exists()


def test_a_run_that_prices_nothing_is_refused_by_the_sites_own_ledger_before_anything_else(sites: SecureSites) -> None:
    site = sites.settings(FIRST)
    site.ledger.parent.mkdir(parents=True, exist_ok=True)
    ledger = open_ledger(f"sqlite:///{site.ledger}")
    ledger.set_budget(Unit("whoever", "*", "client"), operators_budget(3.0, 1e-6, "client", None), "ada", "all of it")
    ledger.close()
    greeting = ConfigRecord(dict(to_record(SecureOrder("a run", greet=b"a nonce"))))
    greet = Message(RecordDict({"secure": greeting}), dst_node_id=int(node_id(FIRST)), message_type="query.secure")
    for message in (greet, train_message(SecureOrder("a run", session=b"s" * 32))):
        told = refusal(app(message, context_of(sites)))
        assert "holds a budget for all datasets (client level), epsilon 3 at delta 1e-06" in told


def test_a_site_says_at_its_greeting_that_it_takes_over_no_such_budget(sites: SecureSites) -> None:
    greeting = ConfigRecord(dict(to_record(SecureOrder("a run", greet=b"a nonce"))))
    greet = Message(RecordDict({"secure": greeting}), dst_node_id=int(node_id(FIRST)), message_type="query.secure")
    settings: dict[str, ConfigValue] = {"dp": "client", "trunk-adapter": "frozen", "metrics": "off", "dp-epsilon": 1e6}
    context = context_of(sites, **settings)
    context.node_config["name"] = "north"
    assert "the run's budget is epsilon 1e+06 at delta 1e-05, and this site names none of its own" in refusal(
        app(greet, context)
    )
