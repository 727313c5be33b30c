"""The pages in a real Chromium: the numbers are SQL's, a page follows its run, and nobody else is asked or let in."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.budget_cli import app as budget_app
from orchestrator.metrics import judged_losses
from storage.store import open_store, utc_now
from tests.orchestrator.conftest import (
    LiveTrunk,
    inside_a_flower_task,
    live_trunk,  # noqa: F401
    make_bench_at,
    tiny_model,  # noqa: F401
)
from tests.trunkline.pages.cases import EVIL, EVIL_NAME, case_at, eventful, long
from tests.trunkline.pages.conftest import PATIENCE_S, Browser, Dashboard, until
from trunkline.runs import runs_app

RUN = "20260101-120000-abcd"
Start = Callable[..., Dashboard]

# A table's cells by heading: the exact value where the cell has one, else its text.
READ_TABLE = """
const table = document.querySelector(arguments[0]);
const names = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
const told = (cell) => cell.querySelector("data")?.value ?? cell.textContent.trim();
return [...table.tBodies[0].rows].map((row) =>
  Object.fromEntries([...row.cells].map((cell, at) => [names[at], told(cell)])));
"""


def rows_of(browser: Browser, table: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = browser.run(READ_TABLE, table)
    return found


def sql(url: str, query: str, *values: object) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        return connection.execute(query, values).fetchall()


def report_of(run: str, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    done = CliRunner().invoke(runs_app, ["report", run, "--out", str(path)])
    assert done.exit_code == 0, done.output
    return path


def number(text: str) -> float | None:
    return None if text == "–" else float(text)


@pytest.fixture(params=["report", "dashboard"])
def opened(
    request: pytest.FixtureRequest, url: str, browser: Browser, dashboard: Start, tmp_path: Path
) -> Callable[[str], None]:
    """Opens a run's page, of either kind."""

    def show(run: str) -> None:
        if request.param == "report":
            browser.open(report_of(run, tmp_path).as_uri())
        else:
            browser.open(f"{dashboard().url}runs/{run}")

    return show


def test_every_number_on_the_page_is_that_in_sql(url: str, browser: Browser, opened: Callable[[str], None]) -> None:
    with case_at(url) as case:
        eventful(case)
    opened(RUN)
    attempts = sql(
        url,
        "SELECT number, attempt, status, received_bytes, sent_bytes, seconds, phase_seconds, tokens, trained_tokens, "
        "threshold FROM rounds WHERE run_id = ? ORDER BY number, attempt",
        RUN,
    )
    losses = dict(sql(url, "SELECT number, value FROM metrics WHERE name = 'eval_loss' AND attempt = 0"))
    trained = dict(sql(url, "SELECT number, value FROM metrics WHERE name = 'train_loss'"))
    told = {
        int(row["round"]): (number(row["held-out"]), number(row["training"])) for row in rows_of(browser, "#loss table")
    }
    assert told == {key: (losses.get(key), trained.get(key)) for key in sorted(losses | trained)}

    traffic = rows_of(browser, "#traffic table")
    assert [(one["status"], one["clients to trunk"], one["trunk to clients"]) for one in traffic] == [
        (row[2], str(row[3]), str(row[4])) for row in attempts
    ]
    for shown, row in zip(rows_of(browser, "#time table"), attempts, strict=True):
        phases = json.loads(row[6])
        assert number(shown["in all (s)"]) == row[5]
        assert {name: number(shown[f"{name} (s)"]) for name in phases} == phases
    for shown, row in zip(rows_of(browser, "#attempts table"), attempts, strict=True):
        assert (int(shown["round"]), int(shown["attempt"]), shown["status"]) == row[:3]
        assert number(shown["wire (MB)"]) == pytest.approx((row[3] + row[4]) / 1e6)
        assert (number(shown["tokens"]), number(shown["threshold"])) == (row[8] or row[7], row[9])

    counted = sql(
        url,
        "SELECT p.node_id, c.name, p.status, count(*) FROM participations p JOIN clients c USING (node_id) "
        "WHERE run_id = ? GROUP BY 1, 2, 3",
        RUN,
    )
    by_node = {row["node"]: row for row in rows_of(browser, "#participation-table table")}
    assert {(node, name, status, str(count)) for node, name, status, count in counted} == {
        (node, row["client"], status, row[status])
        for node, row in by_node.items()
        for status in ("trained", "late", "failed", "refused", "invited")
        if row[status] != "0"
    }
    hashes = sql(url, "SELECT number, client_sha256, trunk_sha256 FROM adapter_versions WHERE run_id = ?", RUN)
    assert [
        (int(row["round"]), row["clients' half, SHA-256"], row["trunk's half, SHA-256"])
        for row in rows_of(browser, "#versions")
    ] == sorted(hashes)
    assert browser.text("#summary .tiles dd") == "4 of 6"


def test_what_was_spent_is_what_budget_show_tells(url: str, browser: Browser, opened: Callable[[str], None]) -> None:
    with case_at(url) as case:
        eventful(case)
    opened(RUN)
    for table, arguments in (("#spent-in-run", ["--run", RUN]), ("#spent-in-all", [])):
        done = CliRunner().invoke(budget_app, ["show", *arguments, "-o", "json"])
        wanted = {(row["client"], row["adversary"]): row for row in json.loads(done.stdout)["data"]}
        shown = rows_of(browser, table)
        assert [row["client"] for row in shown] == ["clinic-north", "clinic-south", "lab", "ward-7"]
        for row in shown:
            holder = wanted[row["client"], "holder"]
            assert number(row["epsilon, against who holds the released adapter"]) == holder["epsilon"] > 1
            assert (number(row["budget"]), number(row["left"])) == (holder["budget"], holder["left"])
            for adversary, words in (
                ("orchestrator", "the orchestrator and the other clients"),
                ("trunk", "the trunk"),
            ):
                assert row[f"epsilon, against {words}"] == "no epsilon"
                assert f"{words}: no epsilon: {wanted[row['client'], adversary]['withheld']}" in browser.text(
                    "#privacy"
                )
    shown_run = CliRunner().invoke(runs_app, ["show", RUN, "-o", "json"])
    lines = browser.run("return [...document.querySelectorAll('#privacy .lines')][0].innerText.split('\\n')")
    assert "; ".join(lines) == json.loads(shown_run.stdout)["data"]["privacy"].replace("`", "")


def test_what_clients_call_themselves_and_say_is_text_and_nothing_else(
    url: str, browser: Browser, opened: Callable[[str], None]
) -> None:
    with case_at(url) as case:
        eventful(case)
        case.store.finish_run(RUN, "failed", EVIL)
    opened(RUN)
    assert EVIL in browser.text("#failures")
    assert EVIL_NAME in browser.text("#failures")
    assert EVIL in browser.text("#attempts")
    assert EVIL in browser.text("#summary .reason")
    assert EVIL in str(browser.run("return [...document.querySelectorAll('td.failed')].map((one) => one.title)"))
    assert browser.run("return document.querySelectorAll('main script, main img, [onerror]').length") == 0
    assert browser.driver.title == f"{RUN} · failed · Trunkline"


def test_nothing_is_asked_of_anybody_else_and_the_console_stays_silent(
    url: str, browser: Browser, opened: Callable[[str], None]
) -> None:
    with case_at(url) as case:
        eventful(case)
    opened(RUN)
    for details in ("#loss-table", "#time-table", "#attempts-table", "#settings-table"):
        browser.run("document.querySelector(arguments[0] + ' summary').click()", details)
    if browser.driver.current_url.startswith("http"):
        until("the page to ask again", lambda: browser.text("#checked"))
    browser.note()
    own = browser.driver.current_url.split("/runs/")[0]
    assert [asked for asked in browser.asked if not asked.startswith((own, "data:", "about:"))] == []
    assert browser.complaints == []


def test_a_page_follows_its_run_as_it_goes(url: str, browser: Browser, dashboard: Start) -> None:
    with case_at(url) as case:
        page = f"{dashboard().url}runs/{RUN}"
        browser.open(page)
        assert "There is no run" in browser.text("#problem")
        case.now = utc_now()
        case.begin(num_rounds=2)
        browser.open(page)
        assert "No round has been opened yet" in browser.text("#loss")
        browser.run("document.querySelector('#settings-table summary').click(); window.kept = true")

        attempt, left = case.attempt(1, ["1", "2", "3"], {"3": ("late", "no answer in 60 s")})
        until("the open attempt", lambda: "attempt under way" in browser.text("#time"))
        assert "No round has been committed yet" in browser.text("#time")
        assert "no answer in 60 s" in browser.text("#failures")
        case.store.abort_round(RUN, 1, attempt, "too few of them")
        until("the abort", lambda: "Round 1, attempt 1 was aborted: too few of them" in browser.text("#attempts"))
        case.commit(1, ["1", "2", "3"])
        until("the commit", lambda: browser.text("#summary .tiles dd") == "1 of 2")
        assert len(rows_of(browser, "#versions")) == 2
        assert browser.run("return document.querySelector('#settings-table').open"), "what was opened stays open"
        case.commit(2, ["1", "2", "3"])
        case.store.finish_run(RUN, "finished", "both rounds were played")
        until("the end", lambda: browser.text("#status") == "finished")
        assert "both rounds were played" in browser.text("#summary")
        assert browser.text("#told") == "it is finished now"
        assert browser.run("return window.kept"), "the page was not loaded anew"
    browser.note()
    assert [one for one in browser.complaints if "404" not in one] == []


def test_a_real_run_is_followed_from_round_to_round_to_its_end(
    url: str,
    browser: Browser,
    dashboard: Start,
    tmp_path: Path,
    tiny_model: Path,  # noqa: F811
    live_trunk: LiveTrunk,  # noqa: F811
) -> None:
    """Orchestrator, trunk and SQL are the real ones; the clients' training waits until the page was looked at."""
    looked: dict[int, threading.Event] = {number_: threading.Event() for number_ in (2, 3)}
    with inside_a_flower_task(), contextlib.closing(open_store(url)) as store:
        bench = make_bench_at(
            tmp_path, tiny_model, live_trunk, {1: 100, 2: 60}, {"num_rounds": 3, "quorum": 2}, store=store
        )

        def judge(version: int) -> float:
            if version in looked:
                assert looked[version].wait(PATIENCE_S)
            return 5.0 - version

        bench.clients[1].lost = judge
        bench.tell_shapes_ahead()
        with ThreadPoolExecutor(1) as pool:
            playing = pool.submit(bench.conduct)
            until("the run", lambda: playing.done() or store.list_runs(1))
            run_id = store.get_run("last").run_id
            browser.open(f"{dashboard().url}runs/{run_id}")
            for committed in (2, 3):
                until("a commit", lambda told=f"{committed} of 3": browser.text("#summary .tiles dd") == told)
                shown = {int(row["round"]): row for row in rows_of(browser, "#versions")}
                for row in store.adapter_versions(run_id):
                    assert shown[row.number]["clients' half, SHA-256"] == row.client_sha256
                looked[committed].set()
            playing.result(PATIENCE_S)
            until("the end", lambda: browser.text("#status") == "finished")
        until("the last loss", lambda: browser.text("#summary .tiles div:nth-child(2) dd").startswith("2.0000"))
        losses = {int(row["round"]): number(row["held-out"]) for row in rows_of(browser, "#loss table")}
        assert losses == judged_losses(store.metrics(run_id, over_clients=True))
        told = {one.node_id: one.status for one in store.participations(run_id, 3)}
        assert {row["node"] for row in rows_of(browser, "#participation-table table")} == set(told) == {"1", "2"}


def test_a_focused_part_that_changes_keeps_the_focus_and_its_place(
    url: str, browser: Browser, dashboard: Start
) -> None:
    with case_at(url) as case:
        case.now = utc_now()
        case.begin(num_rounds=60)
        for number_ in range(1, 31):
            case.commit(number_, ["1", "2"])
        browser.open(f"{dashboard().url}runs/{RUN}", width=390)
        browser.run(
            "const part = document.getElementById('participation-scroll'); part.focus({preventScroll: true});"
            "part.scrollLeft = 77;"
        )
        case.commit(31, ["1", "2"])
        until("the commit", lambda: browser.text("#summary .tiles dd") == "31 of 60")
        assert browser.run("return [document.activeElement.id, document.activeElement.scrollLeft]") == [
            "participation-scroll",
            77,
        ]


def test_a_dashboard_that_ends_is_told_and_comes_back(url: str, browser: Browser, dashboard: Start) -> None:
    with case_at(url) as case:
        case.now = utc_now()
        case.begin()
        first = dashboard()
        browser.open(f"{first.url}runs/{RUN}")
        first.end()
        until("the loss", lambda: "does not answer" in browser.text("#told"))
        dashboard("--listen", f"127.0.0.1:{first.port}")
        until("the return", lambda: "does not answer" not in browser.text("#told"))
        case.commit(1, ["1", "2"])
        until("the commit", lambda: browser.text("#summary .tiles dd") == "1 of 3")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_pages_fit_their_window_and_can_be_read(
    url: str, browser: Browser, dashboard: Start, tmp_path: Path, width: int, dark: bool
) -> None:
    with case_at(url) as case:
        eventful(case)
    with case_at(url, run_id="many") as case:
        long(case, rounds=40, clients=12)
    started = dashboard()
    pages = [started.url, f"{started.url}health", f"{started.url}runs/{RUN}", f"{started.url}runs/many"]
    pages += [f"{started.url}nowhere", report_of(RUN, tmp_path).as_uri()]
    for page in pages:
        browser.open(page, width=width, dark=dark)
        browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
        assert browser.run("return document.documentElement.scrollWidth") <= width, page
        back, ink = browser.run(
            "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
        )
        assert (_lightness(back) < 0.2) is dark, page
        assert _contrast(back, ink) > 7, page
        assert browser.run(UNREADABLE) == [], page


# Text that stands on a background of its own, or on its card's, with less contrast than 4.5.
UNREADABLE = """
const light = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((one) => one / 255)
    .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (one) => {
  for (; one; one = one.parentElement) {
    const back = getComputedStyle(one).backgroundColor;
    if (!back.endsWith(", 0)")) return back;
  }
  return "rgb(255, 255, 255)";
};
const found = [];
for (const one of document.querySelectorAll("main *:not(svg *)")) {
  const own = [...one.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  if (!own || one.closest(".dense td, .unseen")) continue;
  const [a, b] = [light(getComputedStyle(one).color), light(behind(one))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) found.push(`${one.tagName} ${one.className} ${ratio.toFixed(2)}: ${one.textContent.slice(0, 40)}`);
}
return found;
"""


def _lightness(colour: str) -> float:
    parts = [float(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_lightness(one), _lightness(other)))
    return (high + 0.05) / (low + 0.05)
