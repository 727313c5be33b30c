"""`trunkline budget verify` and `export` as an auditor uses them: what was changed is found."""

from __future__ import annotations

import json
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from contract.identity import create_private_key, public_key_text
from contract.privacy_records import ALL_DATASETS, Unit
from orchestrator.budget_report import write_report
from orchestrator.ledger_key import LedgerKey, open_ledger_key
from privacy.accountant import ACCOUNTANT
from privacy.plan import operators_budget, round_releases
from storage.ledger import open_ledger
from storage.records import Charge
from tests.orchestrator.budget_cases import CLIENT, NORTH, ROUNDS, ROWS, budget, charge, config, data, refused

pytestmark = pytest.mark.usefixtures("ledger_home")


# ---- verify ----------------------------------------------------------------------------------------------------------


def altered(database: Path, *statements: str) -> None:
    """What somebody with the file can do to it, triggers or not."""
    with sqlite3.connect(database) as connection:
        for (trigger,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {trigger}")
        for statement in statements:
            connection.execute(statement)
    connection.close()


def findings(*arguments: str | Path) -> list[str]:
    found = data("verify", *arguments, code=1)
    assert found["ok"] is False
    assert found["findings"]
    lines: list[str] = found["findings"]
    return lines


def test_a_sound_ledger_is_called_so(spent: None) -> None:
    assert data("verify") == {"ok": True, "units": 2, "rows": ROWS, "findings": []}
    assert "ok     yes" in budget("verify").stdout


def test_a_row_that_was_edited_or_deleted_is_found(spent: None, ledger_home: Path) -> None:
    altered(ledger_home / "trunkline.db", "UPDATE privacy_rows SET round = 99 WHERE client = 'north' AND seq = 7")
    assert any("client north" in line and "row 7 was changed" in line for line in findings())
    done = budget("verify")
    assert done.exit_code == 1
    assert "row 7 was changed" in done.stdout


def test_a_tail_that_is_gone_is_found(spent: None, ledger_home: Path) -> None:
    altered(ledger_home / "trunkline.db", "DELETE FROM privacy_rows WHERE client = 'south' AND seq > 9")
    assert any("client south" in line and "ends at row 9" in line for line in findings())


def test_a_tail_that_is_gone_with_its_heads_is_found_by_what_a_site_was_sent(
    spent: None, ledger_home: Path, site: Path, tmp_path: Path
) -> None:
    orchestrators, sites = open_ledger(), open_ledger(f"sqlite:///{site / 'ledger.db'}")
    sites.note_peer_head(NORTH, orchestrators.heads(NORTH)[-1])
    rows = {row.seq: row for row in orchestrators.rows(NORTH)}
    orchestrators.close()
    sites.close()
    data("export", "--site", site, "--out", tmp_path / "site.json")
    assert data("verify", "--heads", tmp_path / "site.json")["ok"]
    altered(
        ledger_home / "trunkline.db",
        "DELETE FROM privacy_rows WHERE client = 'north' AND seq > 9",
        f"DELETE FROM privacy_heads WHERE unit_id = '{rows[1].unit_id}' AND seq > 9",
        f"UPDATE privacy_units SET seq = 9, hash = '{rows[9].hash}' WHERE client = 'north'",
        f"UPDATE privacy_tallies SET count = 4 WHERE unit_id = '{rows[1].unit_id}'",
    )
    assert data("verify")["ok"], "the ledger alone cannot know"
    assert any("ends at row 9" in line for line in findings("--heads", tmp_path / "site.json"))


def test_a_charge_over_its_budget_is_found_though_the_chain_is_sound() -> None:
    """Whoever writes rows past the filter, by a program of their own."""
    ledger, of = open_ledger(), config(CLIENT, dp_epsilon=4.0)
    charge(ledger, of, "run-1", 9, (NORTH,))
    ledger.close()
    (only,) = findings()
    assert "client north, dataset letters, row 18: epsilon " in only
    assert "is reserved against who holds the released adapter, over the budget of 4" in only


def test_a_budget_that_was_lowered_later_does_not_make_earlier_charges_wrong(spent: None) -> None:
    data(
        "set",
        "north",
        "--dataset",
        "letters",
        *("--level", "client"),
        "--epsilon",
        "1",
        "--delta",
        "1e-5",
        "--reason",
        "x",
    )
    assert data("verify")["ok"]
    (row,) = [row for row in data("show", "--client", "north") if row["adversary"] == "holder"]
    assert (row["budget"], row["left"]) == (1.0, 0.0)
    assert row["used"] is None or row["used"] > 1.0


def test_what_was_given_back_is_counted_at_its_highest() -> None:
    ledger, of = open_ledger(), config(CLIENT, dp_epsilon=4.0)
    charge(ledger, of, "run-1", 2, (NORTH,))
    (release,) = round_releases(of, scale=2.0**20, size=1000)
    many = [Charge(NORTH, "run-1", number, 1, release, ACCOUNTANT) for number in range(3, 11)]
    ledger.reserve(many, lambda standing, proposed: None)
    for number in range(3, 11):
        ledger.settle("run-1", number, 1, "VOID")
    ledger.close()
    assert any("row 13" in line and "over the budget of 4" in line for line in findings())
    (row,) = [row for row in data("show") if row["adversary"] == "holder"]
    assert row["epsilon"] < 4.0


def test_a_client_over_its_budget_for_all_datasets_is_found(spent: None) -> None:
    ledger = open_ledger()
    whole = Unit("north", ALL_DATASETS, "client")
    ledger.set_budget(whole, operators_budget(2.0, 1e-5, "client", None), "ada", "x")
    ledger.close()
    assert any("client north, all datasets: epsilon" in line for line in findings())


def test_a_head_that_another_key_signed_is_found(spent: None, ledger_home: Path) -> None:
    (ledger_home / "ledger-key.pem").unlink()
    other = open_ledger_key()
    assert any("none of the signers" in line for line in findings())
    assert any("none of the signers" in line for line in findings("--signer", other.public_key_text))


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def report(spent: None, tmp_path: Path) -> Path:
    told = data("export", "--out", tmp_path / "report.json")
    assert (told["rows"], told["signer"]) == (ROWS, open_ledger_key().public_key_text)
    return tmp_path / "report.json"


def test_a_report_is_checked_on_a_machine_without_a_database(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = open_ledger_key().public_key_text
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "elsewhere"))
    sound = {"ok": True, "units": 2, "rows": ROWS, "findings": []}
    assert data("verify", "--file", report, "--signer", signer) == sound
    done = budget("verify", "--file", report)
    assert done.exit_code == 0
    assert "is the report's own word" in done.stderr
    assert not (tmp_path / "elsewhere").exists()


def test_a_report_tells_rows_heads_budgets_settings_and_epsilons_but_no_paths(report: Path) -> None:
    body = json.loads(report.read_bytes())["body"]
    assert body["accountant"] == ACCOUNTANT
    assert datetime.fromisoformat(body["made_at"]) <= datetime.now(UTC)
    assert {name: len(part) for name, part in body["ledger"].items() if name != "format"} == {
        "units": 2, "rows": ROWS, "heads": 2 + 2 * ROUNDS, "budgets": 2,
    }  # fmt: skip
    assert body["settings"]["run-1"]["dp-noise-multiplier"] == 2.0
    assert not {"model", "data", "trunk-address"} & body["settings"]["run-1"].keys()
    assert body["spending"] == data("show")


def test_one_clients_report_is_of_it_alone(spent: None, tmp_path: Path) -> None:
    data("export", "--client", "south", "--out", tmp_path / "south.json")
    assert b"north" not in (tmp_path / "south.json").read_bytes()
    assert data("verify", "--file", tmp_path / "south.json")["units"] == 1


def test_every_change_of_a_report_is_found(report: Path, tmp_path: Path) -> None:
    whole = report.read_bytes()
    for before, after in ((b'"round":5,', b'"round":4,'), (b'"epsilon":', b'"epsilon": '), (b"run-1", b"run-2")):
        assert before in whole
        report.write_bytes(whole.replace(before, after, 1))
        findings("--file", report)
    report.write_bytes(whole[:-1])
    assert any("is no trunkline privacy report 1" in line for line in findings("--file", report))
    report.write_bytes(whole)
    other = public_key_text(create_private_key(tmp_path / "other.pem"))
    assert any("none of those that were named" in line for line in findings("--file", report, "--signer", other))


def resigned(report: Path, tmp_path: Path, change: Any) -> list[str]:
    """What is found where whoever holds the key signs something else."""
    body = json.loads(report.read_bytes())["body"]
    change(body)
    write_report(tmp_path / "resigned.json", body, open_ledger_key())
    return findings("--file", tmp_path / "resigned.json", "--signer", open_ledger_key().public_key_text)


def test_a_signature_is_not_enough(report: Path, tmp_path: Path) -> None:
    def cheaper(body: Any) -> None:
        body["spending"][0]["epsilon"] /= 2

    def shorter(body: Any) -> None:
        body["spending"].pop()

    def other_row(body: Any) -> None:
        body["ledger"]["rows"][5]["round"] = 99

    def no_tail(body: Any) -> None:
        body["ledger"]["rows"].pop()

    def no_ledger(body: Any) -> None:
        body["ledger"] = []

    def other_settings(body: Any) -> None:
        body["settings"]["run-1"]["metrics"] = "off"

    assert any("its rows come to" in line for line in resigned(report, tmp_path, cheaper))
    assert any("just those units" in line for line in resigned(report, tmp_path, shorter))
    assert any("was changed" in line for line in resigned(report, tmp_path, other_row))
    assert resigned(report, tmp_path, no_tail)
    assert resigned(report, tmp_path, no_ledger)
    assert any("its rows come to" in line for line in resigned(report, tmp_path, other_settings))


def test_a_site_exports_its_own_ledger_under_its_own_key(site: Path, tmp_path: Path) -> None:
    signer = data("export", "--site", site, "--out", tmp_path / "report.json")["signer"]
    assert signer == open_ledger_key(site / "ledger-key.pem").public_key_text
    assert data("verify", "--file", tmp_path / "report.json", "--signer", signer)["ok"]
    assert data("verify", "--site", site)["ok"]


def test_what_cannot_be_read_or_written_is_said(spent: None, tmp_path: Path) -> None:
    refused(2, "cannot read the report", "verify", "--file", tmp_path / "none.json")
    refused(2, "--file and --site are two ledgers", "verify", "--file", tmp_path / "a", "--site", tmp_path)
    refused(1, "cannot write the report", "export", "--out", tmp_path / "none" / "report.json")
    refused(2, "--signer does not begin with ed25519:", "verify", "--signer", "me")
    (tmp_path / "odd.json").write_text("{}\n")
    refused(1, "is no trunkline privacy report 1", "verify", "--heads", tmp_path / "odd.json")


def test_the_ledgers_key_is_made_once_and_never_shown(ledger_home: Path) -> None:
    made = open_ledger_key()
    assert (ledger_home / "ledger-key.pem").stat().st_mode & 0o777 == 0o600
    assert open_ledger_key().public_key_text == made.public_key_text
    assert "key" not in repr(LedgerKey(made.key)).removeprefix("LedgerKey").lower()
