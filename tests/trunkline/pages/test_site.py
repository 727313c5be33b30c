"""Who is let in and how far: GET alone, by known names alone, read-only, and every answer with its policy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from storage.engine import make_engine
from storage.revisions import VERSION_TABLE
from storage.view import View
from tests.trunkline.pages.cases import case_at, eventful
from trunkline.pages.site import HEADERS, MOST_REFERENCE, site

RUN = "20260101-120000-abcd"


@pytest.fixture
def client(url: str) -> Iterator[TestClient]:
    view = View(url)
    with TestClient(site(view, ["127.0.0.1", "::1", "board.example"]), base_url="http://127.0.0.1:8088") as opened:
        yield opened
    view.close()


@pytest.fixture
def filled(url: str, client: TestClient) -> TestClient:
    with case_at(url) as case:
        eventful(case)
    return client


@pytest.mark.parametrize("path", ["/", "/health", "/healthz", f"/runs/{RUN}", "/static/page.css", "/static/live.js"])
def test_every_page_is_there_with_its_policy_and_no_other_site_is_let_in(filled: TestClient, path: str) -> None:
    answer = filled.get(path, headers={"Origin": "http://evil.example"})
    assert answer.status_code == 200
    for name, value in HEADERS.items():
        assert answer.headers[name] == value
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/", f"/runs/{RUN}", "/health", "/static/page.css"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_nothing_but_get_is_taken(filled: TestClient, path: str, method: str) -> None:
    answer = filled.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("127.0.0.1:8088", 200), ("[::1]:8088", 200), ("BOARD.example", 200),
        ("evil.example", 421), ("evil.example:8088", 421), ("127.0.0.1.evil.example", 421), ("", 421), ("[::1", 200),
        ("board.example@evil.example", 421),
    ],
)  # fmt: skip
def test_who_calls_it_by_another_name_is_refused(filled: TestClient, host: str, status: int) -> None:
    answer = filled.get("/", headers={"Host": host})
    assert answer.status_code == status
    assert ("Runs" in answer.text) == (status == 200)


def test_a_page_that_did_not_change_is_not_sent_again(filled: TestClient) -> None:
    tag = filled.get("/").headers["etag"]
    again = filled.get("/", headers={"If-None-Match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert again.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/nowhere", "/runs/", "/runs/x/y", "/static/../site.py", "/static/%2e%2e/site.py"])
def test_what_is_not_there_is_told(filled: TestClient, path: str) -> None:
    answer = filled.get(path)
    assert answer.status_code == 404
    assert "def site" not in answer.text


@pytest.mark.parametrize("reference", ["nobody", "<script>alert(1)</script>", "x" * (MOST_REFERENCE + 1), "a%00b"])
def test_a_run_that_is_not_there_is_told_and_its_name_is_text(filled: TestClient, reference: str) -> None:
    answer = filled.get(f"/runs/{reference}")
    assert answer.status_code == 404
    assert "<script>alert" not in answer.text


def test_a_run_is_found_by_its_flower_run_too(filled: TestClient) -> None:
    assert filled.get("/runs/flower-resumed").text == filled.get(f"/runs/{RUN}").text


def test_without_a_database_the_page_says_what_makes_one_and_makes_none(client: TestClient, tmp_path: Path) -> None:
    answer = client.get("/")
    assert answer.status_code == 503
    assert "the first run makes it" in answer.text
    assert 'data-refresh-s="5"' in answer.text
    assert client.get("/healthz").status_code == 503
    assert list(tmp_path.iterdir()) == []
    with case_at(f"sqlite:///{tmp_path / 'trunkline.db'}") as case:
        case.begin()
        assert client.get("/").status_code == 200


@pytest.mark.parametrize(("revision", "told"), [("0001", "trunkline db upgrade"), ("9999", "newer than")])
def test_a_schema_that_changes_under_it_is_told(filled: TestClient, url: str, revision: str, told: str) -> None:
    assert filled.get(f"/runs/{RUN}").status_code == 200
    engine = make_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = :of"), {"of": revision})
    engine.dispose()
    answer = filled.get("/runs/last")
    assert answer.status_code == 503
    assert told in answer.text
    assert "of another version than this dashboard" in answer.text
    assert told in filled.get("/healthz").text


def test_looking_changes_nothing_in_the_database(filled: TestClient, url: str) -> None:
    path = Path(url.removeprefix("sqlite:///"))

    def content() -> str:
        engine = make_engine(url)
        with engine.connect() as connection:
            lines = "\n".join(connection.connection.driver_connection.iterdump())  # type: ignore[union-attr]
        engine.dispose()
        return hashlib.sha256(lines.encode()).hexdigest()

    before = content()
    for page in ("/", f"/runs/{RUN}", "/health", "/healthz"):
        assert filled.get(page).status_code == 200
    assert content() == before
    assert path.is_file()
