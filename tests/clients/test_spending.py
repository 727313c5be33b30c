"""A site's own ledger: it pays before it releases, keeps what the orchestrator signed, and no run raises its budget."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clients.site import read_site
from clients.spending import SiteSpending, open_spending, refuse_unpriced
from clients.wire_privacy import wire_mechanism
from contract.config import ConfigValue, RunConfig
from contract.errors import BudgetError, ConfigError, LedgerError
from contract.identity import public_key_text
from contract.privacy_records import ALL_DATASETS, PrivacyEvent, Unit
from contract.records import RoundKey
from privacy.plan import operators_budget, register_budget
from storage import ledger_heads
from storage.ledger import open_ledger

NODE: dict[str, ConfigValue] = {
    "model": "a model",
    "data": "texts.jsonl",
    "trunk-address": "127.0.0.1:1",
    "name": "hospital",
    "dataset": "letters",
}
SETTINGS: dict[str, ConfigValue] = {
    "dp": "example",
    "trunk-adapter": "frozen",
    "wire": "dp",
    "metrics": "off",
    "wire-noise-multiplier": 30.0,
    "dp-noise-multiplier": 30.0,
}
SIZE = 1000


@contextmanager
def opened(folder: Path, node: dict[str, ConfigValue] | None = None, **settings: ConfigValue) -> Iterator[SiteSpending]:
    config = RunConfig.from_flower({**SETTINGS, **{key.replace("_", "-"): one for key, one in settings.items()}})
    told = {**NODE, "state-dir": str(folder / "state"), **(node or {})}
    site = read_site(told, config, "7", "1", simulated=False)
    with open_spending(site, config) as spending:
        yield spending


def reserve(spending: SiteSpending, number: int, run: str = "a-run") -> None:
    events = wire_mechanism(spending.config).events
    spending.reserve(RoundKey(run, number, 1), 10, 7, SIZE, events)


def spend_all(spending: SiteSpending) -> str:
    """Reserve rounds until the ledger refuses; what it says."""
    for number in range(100, 1000):
        try:
            reserve(spending, number)
        except BudgetError as error:
            return str(error)
    raise AssertionError("900 rounds were all paid for")


def charges(spending: SiteSpending) -> list[tuple[str, int, str, str]]:
    rows = spending.ledger.rows(spending.unit)
    return [(row.run, row.round, row.channel, row.state) for row in rows if row.kind == "charge"]


def test_each_channel_of_a_round_is_charged_and_settled(tmp_path: Path) -> None:
    with opened(tmp_path) as spending:
        reserve(spending, 1)
        spending.committed(RoundKey("a-run", 1, 1))
    with opened(tmp_path) as spending:
        channels = ("wire_forward", "wire_backward", "adapter_sum")
        wanted = {("a-run", 1, channel, state) for channel in channels for state in ("RESERVED", "COMMITTED")}
        assert set(charges(spending)) == wanted
        assert spending.ledger.verify() == []
        assert spending.unit == Unit("hospital", "letters", "example")


def test_a_spent_budget_refuses_and_charges_nothing_also_for_another_run(tmp_path: Path) -> None:
    with opened(tmp_path, dp_epsilon=1.5) as spending:
        for number in range(1, 4):
            reserve(spending, number)
        before = charges(spending)
        told = spend_all(spending)
        assert told.startswith("this site's own ledger refuses: ")
        assert "over the budget of 1.5" in told
        assert before == charges(spending)[: len(before)]
        full = len(charges(spending))
    with opened(tmp_path, dp_epsilon=80.0) as spending:
        with pytest.raises(BudgetError, match="over the budget of 1.5"):
            reserve(spending, 1, run="a-later-run")
        assert len(charges(spending)) == full


def test_the_operator_raises_the_budget_by_the_node_config_and_that_is_logged(tmp_path: Path) -> None:
    with opened(tmp_path, dp_epsilon=1.5) as spending:
        reserve(spending, 1)
    raised: dict[str, ConfigValue] = {"privacy-epsilon": 3.0, "privacy-delta": 1e-6}
    with opened(tmp_path, raised, dp_epsilon=50.0) as spending:
        reserve(spending, 2)
        reserve(spending, 3)
        budgets = [row for row in spending.ledger.rows(spending.unit) if row.kind == "budget"]
        assert [row.operator for row in budgets] == ["run a-run", "node config"]
        standing = spending.ledger.standing(spending.unit)
        assert standing.budget is not None
        assert (standing.budget.epsilon, standing.budget.delta) == (3.0, 1e-6)


def test_a_budget_of_the_node_config_is_registered_at_the_order_that_is_best_for_it(tmp_path: Path) -> None:
    own: dict[str, ConfigValue] = {"privacy-epsilon": 1.0, "privacy-delta": 1e-6}
    with opened(tmp_path, own, dp_epsilon=50.0, wire="off") as spending:
        spending.reserve(RoundKey("a-run", 1, 1), 10, 7, SIZE, {})
        best = RunConfig.from_flower({**spending.config.to_flower(), "dp-epsilon": 1.0, "dp-delta": 1e-6})
        assert spending.ledger.standing(spending.unit).budget == register_budget(best)
        assert register_budget(best).order != register_budget(spending.config).order


def test_a_budget_that_is_raised_keeps_the_order_that_was_registered(tmp_path: Path) -> None:
    with opened(tmp_path, dp_epsilon=1.5) as spending:
        reserve(spending, 1)
        first = spending.ledger.standing(spending.unit).budget
    raised: dict[str, ConfigValue] = {"privacy-epsilon": 9.0, "privacy-delta": 1e-6}
    with opened(tmp_path, raised, dp_epsilon=50.0) as spending:
        reserve(spending, 2)
        assert spending.ledger.standing(spending.unit).budget == replace(first, epsilon=9.0, delta=1e-6)  # type: ignore[type-var]
        assert register_budget(spending.config).order != first.order  # type: ignore[union-attr]


def test_the_budget_over_all_of_the_sites_datasets_binds_too(tmp_path: Path) -> None:
    with opened(tmp_path, dp_epsilon=8.0) as spending:
        small = operators_budget(0.5, 1e-5, "example", None)
        spending.ledger.set_budget(Unit("hospital", ALL_DATASETS, "example"), small, "ada", "for all")
        assert "all datasets of client hospital" in spend_all(spending)


def test_a_dataset_that_spent_at_client_level_is_not_released_row_by_row(tmp_path: Path) -> None:
    with opened(tmp_path, dp="client", wire="off") as spending:
        spending.reserve(RoundKey("a-run", 1, 1), 10, 7, SIZE, {})
    with opened(tmp_path) as spending:
        for refuses in (spending.require_willing, lambda: reserve(spending, 1)):
            with pytest.raises(ConfigError, match="own ledger refuses: dataset letters .* spends at client level"):
                refuses()
        simulated = replace(spending, site=replace(spending.site, simulated=True))
        simulated.require_willing()
        reserve(simulated, 1)


def test_a_site_that_names_no_budget_takes_the_runs_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path, dp_epsilon=1.5) as spending:
        reserve(spending, 1)
        reserve(spending, 2)
    told = "this site names no budget of its own: it takes the run's, epsilon 1.5 at delta 1e-05"
    assert sum(told in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("settings", [{"dp_epsilon": 11.0}, {"dp_delta": 2e-3}])
def test_no_run_chooses_more_for_a_site_than_protects_anybody(tmp_path: Path, settings: dict[str, ConfigValue]) -> None:
    with opened(tmp_path, **settings) as spending:
        for refuses in (spending.require_willing, lambda: reserve(spending, 1)):
            with pytest.raises(ConfigError, match="takes over at most epsilon 10 at delta 0.001 from a run"):
                refuses()
        assert charges(spending) == []
        assert spending.ledger.units() == []
    own: dict[str, ConfigValue] = {"privacy-epsilon": 11.0, "privacy-delta": 2e-3}
    with opened(tmp_path, own, **settings) as spending:
        reserve(spending, 1)


def test_data_with_a_budget_in_the_sites_own_ledger_goes_into_no_run_that_prices_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path, dp_epsilon=1.5) as spending:
        reserve(spending, 1)
        site = spending.site
    with pytest.raises(
        ConfigError, match=r"ledger.db holds a budget for dataset letters \(example level\), epsilon 1.5"
    ):
        refuse_unpriced(site)
    refuse_unpriced(replace(site, dataset="other"))
    refuse_unpriced(replace(site, simulated=True))
    assert "it goes on, as this is a simulation" in caplog.text


def test_a_site_by_another_name_does_not_begin_anew(tmp_path: Path) -> None:
    with opened(tmp_path, dp_epsilon=1.5) as spending:
        reserve(spending, 1)
    with opened(tmp_path, {"name": "clinic"}) as spending:
        for refuses in (spending.require_willing, lambda: reserve(spending, 1)):
            with pytest.raises(ConfigError, match="name is 'clinic', and .*ledger.db is that of 'hospital'"):
                refuses()


def test_what_a_person_set_at_the_site_outranks_its_node_config(tmp_path: Path) -> None:
    own: dict[str, ConfigValue] = {"privacy-epsilon": 3.0, "privacy-delta": 1e-6}
    with opened(tmp_path, own) as spending:
        reserve(spending, 1)
        chosen = operators_budget(5.0, 1e-6, "example", spending.ledger.standing(spending.unit).budget)
        spending.ledger.set_budget(spending.unit, chosen, "ada", "agreed")
        reserve(spending, 2)
        assert spending.ledger.standing(spending.unit).budget == chosen


def test_a_budget_for_the_whole_client_is_not_evaded_row_by_row(tmp_path: Path) -> None:
    with opened(tmp_path) as spending:
        whole = Unit("hospital", ALL_DATASETS, "client")
        spending.ledger.set_budget(whole, operators_budget(1.0, 1e-5, "client", None), "ada", "as a whole")
        for refuses in (spending.require_willing, lambda: reserve(spending, 1)):
            with pytest.raises(ConfigError, match="letters of client hospital spends at client level"):
                refuses()


def test_heads_beyond_what_is_kept_end_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_heads, "MOST_SIGNERS", 1)
    made = [Orchestrator(tmp_path, seed) for seed in (1, 2)]
    with opened(tmp_path) as spending:
        for one in made:
            spending.keep_head(one.head(UNIT))
        assert [head.signer for head in spending.ledger.peer_heads()] == [made[0].public_key_text]
    assert "is not kept: heads of client enrolled-hospital, dataset letters by 1 keys are kept" in caplog.text
    for one in made:
        one.ledger.close()


def test_a_ledger_that_was_lost_is_told_of(
    tmp_path: Path, orchestrator: Orchestrator, caplog: pytest.LogCaptureFixture
) -> None:
    heads = [orchestrator.head(UNIT, run) for run in ("one", "two", "three")]
    with opened(tmp_path) as spending:
        spending.keep_head(heads[0])
        assert "was lost" not in caplog.text
        spending.keep_head(heads[1])
        assert "if this site took part before, its ledger was lost" in caplog.text
        reserve(spending, 1)
        caplog.clear()
        spending.keep_head(heads[2])
        assert "was lost" not in caplog.text


def test_a_mechanism_that_releases_other_than_is_charged_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as spending:
        louder = {"wire_forward": PrivacyEvent("gaussian", {"noise_multiplier": (1.0).hex(), "clip": (1.0).hex()})}
        with pytest.raises(LedgerError, match="wire_forward is released by"):
            spending.reserve(RoundKey("a-run", 1, 1), 10, 7, SIZE, louder)  # type: ignore[arg-type]
        assert charges(spending) == []


class Orchestrator:
    """Signs heads of a chain of its own."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(bytes([seed] * 32))
        self.public_key_text = public_key_text(self._key.public_key().public_bytes_raw())
        self.ledger = open_ledger(f"sqlite:///{folder / f'orchestrator-{seed}.db'}", signer=self)

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)

    def head(self, unit: Unit, run: str = "a-run") -> bytes:
        config = RunConfig.from_flower(SETTINGS)
        self.ledger.set_budget(unit, register_budget(config), "an operator", f"for {run}")
        return json.dumps({"unit": asdict(unit), "head": asdict(self.ledger.heads(unit)[-1])}).encode()


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[Orchestrator]:
    made = Orchestrator(tmp_path)
    yield made
    made.ledger.close()


UNIT = Unit("enrolled-hospital", "letters", "example")


def test_the_orchestrators_newest_head_is_kept(tmp_path: Path, orchestrator: Orchestrator) -> None:
    heads = [orchestrator.head(UNIT, run) for run in ("one", "two")]
    with opened(tmp_path) as spending:
        for head in heads:
            spending.keep_head(head)
        (kept,) = spending.ledger.peer_heads()
        assert kept == orchestrator.ledger.heads(UNIT)[-1]
        assert orchestrator.ledger.verify(spending.ledger.peer_heads()) == []


def test_a_ledger_that_went_back_is_refused(tmp_path: Path, orchestrator: Orchestrator) -> None:
    heads = [orchestrator.head(UNIT, run) for run in ("one", "two")]
    with opened(tmp_path) as spending:
        spending.keep_head(heads[1])
        with pytest.raises(LedgerError, match="went back"):
            spending.keep_head(heads[0])


@pytest.mark.parametrize(
    "head", [b"", b"{}", b"[]", b'{"unit": {}, "head": {}}', b'{"unit": {"client": "a"}, "head": 3}', b"\xff"]
)
def test_a_head_that_is_none_is_refused(tmp_path: Path, head: bytes) -> None:
    with opened(tmp_path) as spending, pytest.raises(LedgerError, match="cannot be read"):
        spending.keep_head(head)


def test_a_head_of_another_dataset_is_refused(tmp_path: Path, orchestrator: Orchestrator) -> None:
    head = orchestrator.head(Unit("enrolled-hospital", "other", "example"))
    with opened(tmp_path) as spending, pytest.raises(LedgerError, match="is of dataset other, not of letters"):
        spending.keep_head(head)


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({"privacy-epsilon": 1.0}, "node config holds privacy-epsilon alone"),
        ({"privacy-epsilon": 0, "privacy-delta": 0.1}, "node config privacy-epsilon is 0; it must be a number above 0"),
        ({"privacy-epsilon": 1.0, "privacy-delta": 1}, "node config privacy-delta is 1; it must be a number above 0"),
        ({"privacy-epsilon": True, "privacy-delta": 0.1}, "node config privacy-epsilon is True"),
        ({"dataset": "a b"}, "node config dataset is 'a b'"),
        ({"name": "a b"}, "node config name is 'a b'"),
        ({"name": ""}, "dp is example, and this SuperNode's node config gives no name: "),
        ({"state-dir": ""}, "dp is example, and this SuperNode's node config gives no state-dir nor identity-key: "),
    ],
)
def test_what_is_wrong_in_the_node_config_is_named(tmp_path: Path, node: dict[str, ConfigValue], told: str) -> None:
    with pytest.raises(ConfigError, match=told), opened(tmp_path, node):
        pass


def test_a_site_with_a_budget_takes_part_in_no_run_that_prices_nothing(tmp_path: Path) -> None:
    budget: dict[str, ConfigValue] = {"privacy-epsilon": 3.0, "privacy-delta": 1e-6, "state-dir": str(tmp_path)}
    with pytest.raises(ConfigError, match="the run's dp is off, and this site's node config gives its data a privacy"):
        read_site({**NODE, **budget}, RunConfig.from_flower({}), "7", "1", simulated=False)


def test_a_dataset_without_a_name_is_known_by_where_it_lies_and_not_by_that_path(tmp_path: Path) -> None:
    config = RunConfig.from_flower(SETTINGS)
    told = {key: value for key, value in NODE.items() if key != "dataset"} | {"state-dir": str(tmp_path)}
    one = read_site(told, config, "7", "1", simulated=False).dataset
    assert one == read_site(told, config, "8", "2", simulated=False).dataset
    assert one != read_site({**told, "data": "other.jsonl"}, config, "7", "1", simulated=False).dataset
    assert one.startswith("data-")
    assert "texts" not in one


def test_a_simulated_clients_ledger_outlives_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path))
    config = RunConfig.from_flower({**SETTINGS, "model": "a model", "data": "{partition}.jsonl"})
    first = read_site({"partition-id": 3}, config, "1", "1", simulated=True)
    second = read_site({"partition-id": 3}, config, "9", "2", simulated=True)
    assert first.ledger == second.ledger
    assert (first.name, first.dataset) == (second.name, second.dataset)
    assert first.name == "client-3"
    other = read_site({"partition-id": 4}, config, "1", "1", simulated=True)
    assert other.ledger != first.ledger
