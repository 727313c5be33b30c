"""The dashboard as an ASGI application: GET alone, known hosts alone, and a policy that lets no other site in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contract.errors import SchemaError, TrunklineError
from storage.store import utc_now
from storage.view import View
from trunkline.pages.facts import read_run, read_runs
from trunkline.pages.health import examine
from trunkline.pages.render import QUIET_S, STATIC, health_page, problem_page, run_page, runs_page
from trunkline.pages.shelf import Page, Shelf

MOST_REFERENCE = 128
THREADS = 4
PROBLEM_S = 5
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_Made = TypeVar("_Made")
log = logging.getLogger("trunkline.dashboard")


def site(view: View, hosts: Collection[str]) -> Starlette:
    """The dashboard over `view`, for browsers that call it by one of `hosts` (names or addresses, without a port)."""
    pages = _Pages(view)
    return Starlette(
        routes=[
            Route("/", pages.runs, methods=["GET"]),
            Route("/runs/{reference}", pages.run, methods=["GET"]),
            Route("/health", pages.health, methods=["GET"]),
            Route("/healthz", pages.probe, methods=["GET"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(_Guard, hosts=frozenset(host.lower() for host in hosts))],
        exception_handlers={404: _not_there},
    )


class _Pages:
    def __init__(self, view: View) -> None:
        self._view = view
        self._shelf = Shelf()
        self._threads = CapacityLimiter(THREADS)

    async def runs(self, request: Request) -> Response:
        return await self._shown(request, "runs", lambda: Page.of(runs_page(read_runs(self._view, utc_now()))))

    async def run(self, request: Request) -> Response:
        reference = request.path_params["reference"]
        if len(reference) > MOST_REFERENCE:
            return await _not_there(request, None)
        return await self._shown(request, f"run {reference}", lambda: self._run(reference))

    def _run(self, reference: str) -> Page:
        run = self._view.reader.find_run(reference)
        if run is None:
            return _no_such_page(f"There is no run {reference}.")
        return Page.of(run_page(read_run(self._view, run, utc_now())))

    async def health(self, request: Request) -> Response:
        page = await self._in_thread(lambda: Page.of(health_page(examine(self._view, utc_now()))))
        return _answer(request, page)

    async def probe(self, request: Request) -> Response:
        """Whether SQL answers; of runs it says nothing, for a dashboard that is restarted makes none of them well."""
        found = (await self._in_thread(lambda: examine(self._view, utc_now())))[0]
        return PlainTextResponse(("ok" if found.ok else found.found) + "\n", 200 if found.ok else 503)

    async def _shown(self, request: Request, name: str, make: Callable[[], Page]) -> Response:
        def look() -> Page:
            try:
                self._view.require_current()
                return make()
            except TrunklineError as error:
                log.warning("no page: %s", error)
                return _problem(error)

        return _answer(request, await self._in_thread(lambda: self._shelf.page(name, look)))

    async def _in_thread(self, work: Callable[[], _Made]) -> _Made:
        # Who is told to end does not wait for a database that does not answer.
        return await to_thread.run_sync(work, limiter=self._threads, abandon_on_cancel=True)


def _answer(request: Request, page: Page) -> Response:
    headers = {"ETag": page.tag}
    if page.status == 200 and request.headers.get("if-none-match") == page.tag:
        return Response(status_code=304, headers=headers)
    return Response(page.body, page.status, headers, "text/html; charset=utf-8")


def _problem(error: TrunklineError) -> Page:
    hint = "The page asks again by itself."
    if isinstance(error, SchemaError):
        hint = f"The database is of another version than this dashboard. {hint}"
    return Page.of(problem_page("The database cannot be shown", str(error), hint, refresh_s=PROBLEM_S), 503)


def _no_such_page(reason: str) -> Page:
    return Page.of(problem_page("Not here", reason, "The list of runs has those there are.", refresh_s=QUIET_S), 404)


async def _not_there(request: Request, error: Exception | None) -> Response:
    return _answer(request, _no_such_page("There is no such page."))


class _Guard:
    """Lets in what calls the dashboard by a name of its own, and puts the headers on every answer.

    A page of another site whose name was made to point here still calls it by that other name. Starlette's own check
    of hosts reads no IPv6 address.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        named = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if _host_of(named) in self._hosts:
            await self._app(scope, receive, send_guarded)
        else:
            refused = PlainTextResponse("this dashboard is not called by that name\n", 421)
            await refused(scope, receive, send_guarded)


def _host_of(named: Sequence[str]) -> str | None:
    """The host in a request's one Host header, without its port and an IPv6 address' brackets."""
    if len(named) != 1:
        return None
    host = named[0].strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
