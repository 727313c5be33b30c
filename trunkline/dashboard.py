"""`trunkline dashboard`: what SQL has of all runs, as pages that follow the runs as they go."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import Annotated

import typer

from contract.errors import SchemaError, StorageError
from contract.output import cli_errors, talk
from storage.view import View

app = typer.Typer()


@app.command()
@cli_errors
def dashboard(
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 takes a free one.")] = "127.0.0.1:8088",
    insecure_listen: Annotated[
        bool,
        typer.Option("--insecure-listen", help="Allow an address that other machines reach, without TLS or a login."),
    ] = False,
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name or address that browsers call it by; repeatable."),
    ] = None,
) -> None:
    """Serve the dashboard until Ctrl-C or SIGTERM: runs, a page for each that follows it as it goes, and health.

    It only reads, and only SQL: it asks no trunk and no site for anything. Whoever reaches its port can look.
    """
    from contract.addresses import is_loopback
    from trunkline.pages.serving import dashboard_address, host_names, listening, serve, url_of
    from trunkline.pages.site import site

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    name, port = dashboard_address(listen, insecure_listen)
    hosts = host_names(name, host or ())
    with closing(View()) as view:
        _require_readable(view)
        with listening(name, port) as listener:
            if not is_loopback(name):
                talk("warning: no TLS and no login: whoever reaches this port can read what SQL has of every run")
            serve(site(view, hosts), listener, lambda: talk(f"dashboard at {url_of(listener)} (Ctrl-C ends it)"))
    talk("the dashboard has ended")


def _require_readable(view: View) -> None:
    """Raise what view.require_current raises, but for a database that the first run has yet to make."""
    try:
        view.require_current()
    except SchemaError:
        raise
    except StorageError as error:
        if type(error) is not StorageError:
            raise
        talk(f"note: {error}")
