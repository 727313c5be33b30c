"""`trunkline budget show`, `set` and `plan` as an operator and a site use them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contract import watching
from contract.config import RunConfig
from contract.privacy_records import ALL_DATASETS, Unit
from orchestrator.ledger_key import open_ledger_key
from privacy.plan import expected_spend, level_of, operators_budget
from storage.home import database_url
from storage.ledger import open_ledger
from tests.orchestrator.budget_cases import CLIENT, NORTH, ROUNDS, WIRE, budget, charge, config, data, refused

pytestmark = pytest.mark.usefixtures("ledger_home")


# ---- show ------------------------------------------------------------------------------------------------------------


def test_what_a_client_spent_is_recomputed_and_told_with_its_adversary(spent: None) -> None:
    rows = data("show", "--client", "north")
    told = expected_spend(config(CLIENT, num_rounds=ROUNDS), scale=2.0**20, size=1000)
    holder = rows[0]
    assert (holder["adversary"], holder["channel"], holder["level"]) == ("holder", "adapter_sum", "client")
    assert holder["epsilon"] == told["holder"]
    assert holder["left"] == 8.0 - told["holder"]
    assert (holder["budget"], holder["delta"], holder["last_run"], holder["last_round"]) == (8.0, 1e-5, "run-1", ROUNDS)
    assert 0.5 < holder["used"] < 0.55
    assert {row["client"] for row in data("show")} == {"north", "south"}
    assert {row["client"] for row in data("show", "--dataset", "notes")} == {"south"}


def test_an_epsilon_is_withheld_with_the_reason(spent: None) -> None:
    by_adversary = {row["adversary"]: row for row in data("show", "--client", "south")}
    for adversary in ("orchestrator", "trunk"):
        assert by_adversary[adversary]["epsilon"] is by_adversary[adversary]["left"] is None
    assert by_adversary["orchestrator"]["withheld"] == "totals of losses and counts have no noise"
    assert by_adversary["orchestrator"]["used"] == by_adversary["holder"]["used"]
    assert by_adversary["trunk"]["withheld"] == "the server can read the text"
    done = budget("show")
    assert "the trunk: no epsilon: the server can read the text (2 of the units)" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[4:7] == ["holder", "orchestrator", "trunk"]
    assert [line.split()[5:7] for line in lines[1:]] == [["-", "-"], ["-", "-"]]
    assert len(lines) == 3


def test_a_budget_that_is_watched_is_told_anew_when_something_was_spent(
    spent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pause(seconds: float) -> None:
        """Another run spends between the first look and the second, and the watcher goes after the third."""
        pauses.append(seconds)
        if len(pauses) == 1:
            ledger = open_ledger()
            charge(ledger, config(CLIENT, metrics="off"), "run-2", 1, (NORTH,), runs=database_url())
            ledger.close()
        if len(pauses) == 3:
            raise KeyboardInterrupt

    pauses: list[float] = []
    before = data("show", "--client", "north")
    monkeypatch.setattr(watching.time, "sleep", pause)
    done = budget("show", "--client", "north", "--watch", "-o", "jsonl")
    first, second = [json.loads(line)["data"] for line in done.stdout.splitlines()]
    assert first == before
    assert second == data("show", "--client", "north")
    assert first[0]["epsilon"] < second[0]["epsilon"]


def test_channels_are_told_apart_and_together() -> None:
    ledger, of = open_ledger(), config(WIRE)
    unit = Unit("north", "letters", level_of(of))
    charge(ledger, of, "run-1", 3, (unit,))
    ledger.close()
    rows = {(row["adversary"], row["channel"]): row["epsilon"] for row in data("show")}
    for adversary, total in expected_spend(of, scale=None, size=1000).items():
        assert rows[adversary, "all"] == total
        parts = [rows[adversary, channel] for channel in ("adapter_sum", "wire_backward", "wire_forward")]
        assert max(parts) < total < sum(parts) + 1e-9
    table = budget("show").stdout.splitlines()
    assert [line.split()[3] for line in table[1:]] == ["adapter_sum", "wire_backward", "wire_forward", "all"]


def test_a_second_run_goes_on_with_the_same_budget_and_can_be_shown_alone(spent: None) -> None:
    ledger = open_ledger()
    charge(ledger, config(CLIENT, metrics="off", dp_epsilon=4.0), "run-2", 2, (NORTH,), runs=database_url())
    ledger.close()
    (whole,) = [row for row in data("show", "--client", "north") if row["adversary"] == "holder"]
    told = expected_spend(config(CLIENT, num_rounds=ROUNDS + 2), scale=2.0**20, size=1000)
    assert (whole["epsilon"], whole["last_run"], whole["last_round"]) == (told["holder"], "run-2", 2)
    rows = {row["adversary"]: row for row in data("show", "--run", "run-2")}
    assert rows["holder"]["budget"] == 4.0
    assert rows["orchestrator"]["epsilon"] == rows["holder"]["epsilon"] < whole["epsilon"]
    both = {row["adversary"]: row for row in data("show", "--client", "north")}
    assert both["orchestrator"]["withheld"] == "run run-1: totals of losses and counts have no noise"
    refused(1, "run run-9 spent nothing", "show", "--run", "run-9")


def test_a_budget_over_all_datasets_is_shown_with_what_they_spent_together(spent: None) -> None:
    data("set", "north", "--all-datasets", *("--level", "client", "--epsilon", "9", "--delta", "1e-5", "--reason", "x"))
    ledger = open_ledger()
    charge(ledger, config(CLIENT), "run-2", 2, (Unit("north", "diary", "client"),), runs=database_url())
    ledger.close()
    rows = {row["dataset"]: row for row in data("show", "--client", "north") if row["adversary"] == "holder"}
    assert set(rows) == {ALL_DATASETS, "diary", "letters"}
    assert rows["diary"]["used"] < rows["letters"]["used"]
    assert rows[ALL_DATASETS]["budget"] == 9.0
    assert rows[ALL_DATASETS]["epsilon"] > rows["letters"]["epsilon"] > rows["diary"]["epsilon"]


def test_a_site_shows_its_own_ledger_and_withholds_what_its_rows_leave_open(site: Path) -> None:
    rows = {row["adversary"]: row for row in data("show", "--site", site)}
    assert rows["holder"]["epsilon"] is not None
    assert rows["orchestrator"]["withheld"] == "whether losses and counts were told is not in these rows"
    assert rows["trunk"]["withheld"] == "what it is sent over the wire was not charged for"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    refused(1, "there is no Trunkline database", "show")
    refused(2, "there is no ledger", "show", "--site", tmp_path)
    assert not (tmp_path / "ledger.db").exists()
    open_ledger().close()
    assert data("show") == []


# ---- set -------------------------------------------------------------------------------------------------------------

EIGHT = ("--level", "client", "--epsilon", "8", "--delta", "1e-6")


def test_a_budget_is_set_and_raised_by_a_logged_action_that_tells_old_and_new() -> None:
    first = budget("set", "north", "--dataset", "letters", *EIGHT, "--reason", "contract 12")
    assert first.exit_code == 0, first.output
    assert "the budget was none; it is epsilon 8 at delta 1e-06 now, set by ada" in first.stderr
    raised = data(
        "set", "north", "--dataset", "letters", "--level", "client", "--epsilon", "10", "--delta", "1e-6",
        "--reason", "contract 13", "--operator", "bob",
    )  # fmt: skip
    assert raised["before"] == {"epsilon": 8.0, "delta": 1e-6, "order": raised["order"]}
    assert raised["epsilon"] == 10.0
    ledger = open_ledger()
    rows = list(ledger.rows(NORTH))
    assert [(row.kind, row.operator, row.reason) for row in rows] == [
        ("budget", "ada", "contract 12"),
        ("budget", "bob", "contract 13"),
    ]
    assert ledger.budgets() == {NORTH: operators_budget(10.0, 1e-6, "client", ledger.budgets()[NORTH])}
    assert ledger.heads(NORTH)[-1].signer == open_ledger_key().public_key_text
    ledger.close()
    shown = data("show")
    assert [(row["channel"], row["epsilon"], row["left"]) for row in shown] == [("all", 0.0, 10.0)] * 3


def test_an_example_level_budget_holds_the_trunk_to_the_gaussian_filter_and_keeps_its_order() -> None:
    order = data(
        "set", "north", "--dataset", "letters", "--level", "example", "--epsilon", "40", "--delta", "1e-5",
        "--reason", "x",
    )["order"]  # fmt: skip
    assert order < 3
    again = data(
        "set", "north", "--dataset", "letters", "--level", "example", "--epsilon", "1", "--delta", "1e-5",
        "--reason", "x",
    )  # fmt: skip
    assert again["order"] == order
    ledger = open_ledger()
    (found,) = ledger.budgets().values()
    ledger.close()
    assert found.gaussian_share == {"holder": 0.0, "orchestrator": 0.0, "trunk": 1.0}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("north", *EIGHT, "--reason", "x"), "give either --dataset or --all-datasets"),
        (("north", "--dataset", "a", "--all-datasets", *EIGHT, "--reason", "x"), "give either --dataset or"),
        (("north", "--dataset", "a", *EIGHT, "--reason", " "), "--reason is empty"),
        (("north", "--dataset", "a", *EIGHT, "--reason", "x", "--operator", ""), "--operator is empty"),
        (("north", "--dataset", "a", *EIGHT, "--reason", "x", "--operator", "run 7"), "which stands for settings"),
        (("no/rth", "--dataset", "a", *EIGHT, "--reason", "x"), "client id is 'no/rth'"),
        (
            ("north", "--dataset", "a", "--level", "client", "--epsilon", "-1", "--delta", "1e-5", "--reason", "x"),
            "the budget's epsilon is -1.0; it must be a number above 0",
        ),
        (("north", "--dataset", "a", *EIGHT, "--reason", "x", "--site", "nowhere"), "there is no directory nowhere"),
    ],
)
def test_what_is_no_budget_is_refused(arguments: tuple[str, ...], told: str) -> None:
    refused(2, told, "set", *arguments)


def test_a_site_sets_its_own_budget(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    data("set", "north", "--dataset", "letters", *EIGHT, "--reason", "ours", "--site", tmp_path / "site")
    ledger = open_ledger(f"sqlite:///{tmp_path / 'site' / 'ledger.db'}")
    assert ledger.budgets()[NORTH].epsilon == 8.0
    ledger.close()
    refused(1, "there is no Trunkline database", "show")


# ---- plan ------------------------------------------------------------------------------------------------------------

PLAN = ("--epsilon", "8", "--delta", "1e-5")


def test_a_plan_answers_noise_its_cost_and_whether_it_is_of_use() -> None:
    found = data("plan", *PLAN, "--rounds", "50", "--clients", "100", "--size", "10000")
    assert 4.4 < found["noise_multiplier"] < 4.6
    assert found["epsilon"]["holder"] == found["epsilon"]["orchestrator"] == pytest.approx(8.0, rel=1e-3)
    assert found["unprotected"] == {"trunk": "the server can read the text"}
    assert found["pld"] == {}
    (use,) = found["usability"]
    assert use["noise_to_signal"] == pytest.approx(found["noise_multiplier"] * (100 / 66) ** 0.5)
    assert use["verdict"].startswith("doubtful: ")
    assert found["settings"]["dp-noise-multiplier"] == found["noise_multiplier"]
    RunConfig.from_flower(found["settings"])


def test_the_table_says_it_in_words_and_has_the_settings_to_paste() -> None:
    table = budget("plan", "--epsilon", "1", *PLAN[2:], "--rounds", "9", "--level", "example").stdout
    assert "against who holds the released adapter" in table
    assert "(pld " in table
    assert "against the trunk" in table
    assert "no epsilon: the server can read the text" in table
    assert 'dp="example"' in table
    assert "in the whole run's change of the adapter" in table


def test_a_plan_with_noise_on_the_wire_protects_from_the_trunk_too() -> None:
    found = data("plan", *PLAN, "--rounds", "1", "--level", "example", "--wire", "dp")
    assert found["wire_noise_multiplier"] == found["noise_multiplier"]
    assert found["epsilon"]["trunk"] == pytest.approx(8.0, rel=1e-3)
    assert found["unprotected"] == {}
    assert [use["verdict"].partition(":")[0] for use in found["usability"]] == [
        "useless", "useless for learning to write",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--epsilon", "0", "--delta", "1e-5", "--rounds", "5"), "dp-epsilon is 0.0"),
        ((*PLAN, "--rounds", "5", "--wire", "dp"), "wire is dp while dp is client"),
        ((*PLAN, "--rounds", "5", "--clients", "5", "--threshold", "6"), "secagg-threshold is 6; among 5 who"),
        ((*PLAN, "--rounds", "5", "--clients", "300", "--threshold", "201"), "secagg-threshold is 201; among 57 who"),
        ((*PLAN, "--rounds", "5", "--clients", "5", "--colluders", "4"), "dp-colluders is 4"),
        (
            ("--epsilon", "0.001", "--delta", "1e-5", "--rounds", "5"),
            "no noise that can be added keeps to epsilon",
        ),
    ],
)
def test_an_impossible_plan_is_refused(arguments: tuple[str, ...], told: str) -> None:
    refused(2, told, "plan", *arguments)
