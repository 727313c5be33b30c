"""Pages without a browser: what they say where there is little or much to say, and what they can never hold."""

from __future__ import annotations

import base64
import hashlib
import re
from contextlib import closing
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest

from storage.store import open_store
from storage.view import View
from tests.storage.conftest import database_url  # noqa: F401
from tests.trunkline.pages.cases import BEGAN, EVIL, EVIL_NAME, PRIVATE, Case, case_at, eventful, long
from trunkline.pages import participation, render
from trunkline.pages.facts import RunFacts, read_run, read_runs
from trunkline.pages.health import examine
from trunkline.pages.render import health_page, run_page, runs_page


class Outline(HTMLParser):
    """The ids of a page, its elements by name, and the attributes that name other places."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.names: list[str] = []
        self.places: list[str] = []
        self.labels: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.names.append(tag)
        self.attributes |= told.keys()
        self.ids += [told["id"] or ""] if "id" in told else []
        self.places += [
            told[name] or "" for name in ("href", "src", "action", "data") if name in told and tag != "data"
        ]
        self.labels += (told.get("aria-labelledby") or "").split()


def facts_of(case: Case) -> RunFacts:
    with closing(View(case.url)) as view:
        return read_run(view, view.reader.get_run(case.run_id), case.now)


def page_of(case: Case, *, report: bool = True) -> str:
    return run_page(facts_of(case), report=report)


def test_a_run_that_has_just_begun_says_what_is_missing(url: str) -> None:
    with case_at(url) as case:
        page = page_of(case.begin())
    for told in ("No round has been opened yet", "No client has been asked yet", "No attempt" not in page and "–"):
        assert str(told) in page
    assert "0 of 3" in page
    assert "<polyline" not in page


def test_a_run_that_could_not_start_has_a_page(url: str) -> None:
    with case_at(url) as case:
        case.store.create_run(case.run_id, "7", {"num-round": 3}, "unknown", "")
        case.store.finish_run(case.run_id, "failed", "unknown setting 'num-round'; did you mean 'num-rounds'?")
        page = page_of(case)
    assert "did you mean" in page
    assert "0 of ?" in page
    assert "The first adapter has not been drawn yet" in page


def test_one_round_is_drawn(url: str) -> None:
    with case_at(url) as case:
        case.begin().commit(1, ["1", "2"])
        page = page_of(case)
    assert page.count('class="dot held-out"') == 1
    assert page.count('class="dot training"') == 1
    assert "No attempt was aborted" in page


def test_a_private_run_says_why_there_are_no_losses_and_no_bytes(url: str) -> None:
    with case_at(url) as case:
        case.begin(metrics="off", **{key.replace("-", "_"): value for key, value in PRIVATE.items()})
        attempt = case.store.open_round(case.run_id, 1, ["1", "2", "3"], threshold=3)
        page = page_of(case)
        case.store.abort_round(case.run_id, 1, attempt, "enough")
    assert "<code>metrics</code> is off" in page
    assert "under <code>dp</code> the trunk does not tell the orchestrator its counters" in page
    assert "epsilon 0 at delta 1e-05" in page


def test_long_runs_of_many_clients_stay_one_page(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(participation, "MOST_CELLS", 400)
    monkeypatch.setattr(participation, "MOST_CLIENTS", 40)
    monkeypatch.setattr(render, "MOST_ATTEMPTS", 30)
    with case_at(url) as case:
        long(case, rounds=50, clients=64)
        facts = facts_of(case)
        page = run_page(facts, report=True)
    found = participation.participation(facts)
    assert (len(found.clients), found.left_out_clients) == (40, 24)
    assert (found.headings[-1], len(found.headings), found.left_out_attempts) == ("50", 10, 40)
    assert "40 older attempts are not shown here" in page
    assert "21 older adapters are not shown here" in page
    assert "24 more clients are not shown here" in page


def test_two_hundred_rounds_of_sixty_four_clients_are_drawn_whole(url: str) -> None:
    with case_at(url) as case:
        long(case, rounds=200, clients=64)
        page = page_of(case)
    assert "not shown here" not in page
    assert page.count('<td class="trained">') + page.count('<td class="late"') == 200 * 64
    assert len(page) < 1_500_000
    (points,) = re.findall(r'class="line held-out" points="([^"]*)"', page)
    assert len(points.split()) == 201


def test_no_number_of_a_client_can_break_a_page(url: str) -> None:
    with case_at(url) as case:
        case.begin().commit(1, ["1", "2"])
        case.store.record_metrics(case.run_id, 1, None, {"eval_loss": 1.7e308})
        page = page_of(case)
    assert "1.7e+308" in page
    assert not re.search(r"\b(nan|inf|NaN|Infinity)\b", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))


@pytest.mark.parametrize("report", [True, False])
def test_what_comes_from_clients_is_escaped_everywhere(url: str, report: bool) -> None:
    with case_at(url) as case:
        eventful(case).store.add_event(case.run_id, EVIL_NAME, EVIL)
        case.store.finish_run(case.run_id, "failed", EVIL)
        page = page_of(case, report=report)
        with closing(View(url)) as view:
            others = runs_page(read_runs(view, case.now)) + health_page(examine(view, case.now))
    for text in (page, others):
        assert EVIL not in text
        assert EVIL_NAME not in text
        assert "<img" not in text
    assert page.count("&lt;script&gt;") >= 5
    assert Outline(page).names.count("script") == (0 if report else 1)


def test_a_report_holds_all_that_it_needs_and_allows_nothing_else(url: str) -> None:
    with case_at(url) as case:
        page = page_of(eventful(case))
    outline = Outline(page)
    assert [place for place in outline.places if not place.startswith(("#", "data:"))] == []
    assert set(re.findall(r"https?://[a-z.]+", page)) == {"http://evil.example"}, "which is a client's text"
    (style,) = re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f'content="default-src &#39;none&#39;; style-src &#39;sha256-{allowed}&#39;; img-src data:;' in page
    assert "url(" not in style


@pytest.mark.parametrize("report", [True, False])
def test_pages_are_well_formed_for_who_reads_them_by_ear_or_keyboard(url: str, report: bool) -> None:
    with case_at(url) as case:
        page = page_of(eventful(case), report=report)
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.labels) <= set(outline.ids)
    assert not {"style", "onclick", "onload"} & outline.attributes, "a strict policy would drop them"
    assert outline.names.count("h1") == outline.names.count("main") == 1
    assert {place[1:] for place in outline.places if place.startswith("#")} <= set(outline.ids)
    for picture in re.findall(r'<svg[^>]*role="img"[^>]*>', page):
        assert "aria-label" in picture


def test_attempts_of_one_round_are_told_apart_and_the_resumed_run_is_marked(url: str) -> None:
    with case_at(url) as case:
        page = page_of(eventful(case))
    for heading in ("3.1", "3.2", "3.3"):
        assert f'<th scope="row">{heading}</th>' in page
    assert 'class="moment"' in page
    assert "interrupted; the run was resumed" in page


def test_the_page_of_a_silent_run_says_so_and_its_timeline_ends_where_it_was_last_heard(url: str) -> None:
    with case_at(url) as case:
        case.begin().attempt(1, ["1", "2"])
        soon = page_of(case)
        heard = case.now - timedelta(seconds=13)
        case.passes(86_400)
        late = facts_of(case)
    assert "was last heard" not in soon
    assert "was last heard 1 d ago" in run_page(late)
    assert late.silent_s == pytest.approx(86_400 + 15, abs=3)
    assert late.heard_at <= heard + timedelta(seconds=3)


def test_health_tells_of_silent_runs_and_of_a_database_that_is_not_there(url: str, tmp_path: Path) -> None:
    with case_at(url) as case:
        case.begin()
        with closing(View(url)) as view:
            assert [one.ok for one in examine(view, case.now)] == [True, True]
            silent = examine(view, case.now + timedelta(hours=1))
    assert [one.ok for one in silent] == [True, False]
    assert f"trunkline runs resume {case.run_id}" in silent[1].found
    with closing(View(f"sqlite:///{tmp_path / 'absent.db'}")) as view:
        (only,) = examine(view, BEGAN)
    assert (only.ok, "the first run makes it" in only.found) == (False, True)


def test_both_databases_make_the_same_page(database_url: str, tmp_path: Path) -> None:  # noqa: F811
    pages = []
    for place in (database_url, f"sqlite:///{tmp_path / 'other.db'}"):
        with case_at(place) as case:
            pages.append(page_of(eventful(case)))
    assert pages[0] == pages[1]


def test_an_empty_database_says_that_there_is_no_run(url: str) -> None:
    open_store(url).close()
    with closing(View(url)) as view:
        assert "There is no run yet" in runs_page(read_runs(view, BEGAN))
