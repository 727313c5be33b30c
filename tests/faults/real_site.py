"""A real site behind the scripted grid: the ClientApp itself, with its data, its vault and its ledger.

The site that is killed answers each message in a process of its own, as in a deployment: only so it dies alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Error, Message, RecordDict

from contract import failpoint
from contract.config import RunConfig
from contract.failpoint import failpoint as come_by
from contract.secure_records import order_from, reply_from
from tests.clients.sites import Site, write_texts
from tests.faults.forking import FORKING, LIMIT_S, begun, ended, was_killed
from tests.orchestrator.conftest import inside_a_flower_task
from tests.orchestrator.fakes import Content

RELEASED, DEATHS = "released.jsonl", "deaths"
DIED = 8
"""Flower's code for a ClientApp whose process died."""
_ROWS = 12


@dataclass
class RealSite:
    """`order` is a failpoint's, its place "MESSAGE/NAME#N"; with None the site is never killed.

    What left the site, and how often it died, is noted in `home`.
    """

    site: Site
    config: RunConfig
    home: Path
    order: str | None = None
    again: bool = False
    messages: int = 0

    def __call__(self, message: Message) -> Content:
        self.messages += 1
        if self._alone:
            content = _answered(message, self.site, self.config)
        else:
            content = self._apart(message, self._order_now())
            if content is None and self.again:
                content = self._apart(message, "")
        if content is None:
            return Error(DIED, "SIGKILL")
        self._note(message, content)
        return content

    @property
    def _alone(self) -> bool:
        """Whether this process answers: nobody is killed here, or not yet."""
        if self.order is None:
            return True
        what, _, where = self.order.partition(":")
        return what == "kill" and self.messages < int(where.partition("/")[0])

    def _order_now(self) -> str:
        what, _, where = str(self.order).partition(":")
        if what == "trace":
            return f"trace:{where}.{self.messages}"
        at, _, place = where.partition("/")
        return f"kill:{place}" if at == str(self.messages) else ""

    def _apart(self, message: Message, order: str) -> Content | None:
        """What a process of its own answered; None where it was killed before."""
        here, there = FORKING.Pipe(duplex=False)
        process = begun(_answer, there, message, self.site, self.config, order)
        there.close()
        try:
            if not here.poll(LIMIT_S):
                raise RuntimeError(f"a site did not answer within {LIMIT_S:g} s")
            content: Content | None = here.recv()
        except EOFError:
            content = None
        code = ended(process)
        if was_killed(code):
            with (self.home / DEATHS).open("a") as file:
                file.write(f"{order}\n")
        elif code:
            raise RuntimeError(f"the process of a site ended with {code}")
        self._gather_trace(order)
        return content

    def _gather_trace(self, order: str) -> None:
        own = Path(order.removeprefix("trace:"))
        if order.startswith("trace:") and own.exists():
            with Path(str(self.order).removeprefix("trace:")).open("a") as file:
                file.writelines(f"{self.messages}/{line}\n" for line in own.read_text().splitlines())

    def _note(self, message: Message, content: Content) -> None:
        """Keep what left of a secure sum, by its session: hashes, which are all that is compared."""
        asked, order = message.content.get("secure"), message.content.get("round")
        if not isinstance(asked, ConfigRecord) or isinstance(content, Error):
            return
        record = content["secure"]
        reply = reply_from(record if isinstance(record, ConfigRecord) else {})
        said = order_from(asked)
        left = [
            (said.session, "confirmation", reply.confirmation),
            (said.session, "answer", reply.answer),
            (said.session, "upload", _upload(content)),
            (said.next_session, "shares", reply.shares),
        ]
        what = dict(order.items()) if isinstance(order, ConfigRecord) else {}
        with (self.home / RELEASED).open("a") as file:
            for session, name, data in left:
                if data:
                    key = [what.get(part) for part in ("run", "round", "attempt")]
                    told = [self.site.node_id, session.hex(), name, hashlib.sha256(data).hexdigest(), key]
                    file.write(json.dumps(told) + "\n")


def make_site(number: int, model: Path, trunk: str, home: Path, sites: int) -> Site:
    """One of `sites` sites, its texts and its state below `home`."""
    texts = home / f"texts-{number}.jsonl"
    if not texts.exists():
        write_texts(texts, _ROWS, number)
    return Site(
        number,
        {
            "model": str(model),
            "data": str(texts),
            "name": f"client-{number}",
            "dataset": "texts",
            "state-dir": str(home / "sites" / str(number)),
            "trunk-address": trunk,
            "allow-deterministic": True,
            "secagg-min-members": sites,
            "secagg-min-threshold": 2,
        },
    )


def _answer(there: Any, message: Message, site: Site, config: RunConfig, order: str) -> None:
    """A process's whole life: one message."""
    logging.getLogger("trunkline").addHandler(logging.NullHandler())
    failpoint.arm(order)
    with inside_a_flower_task():
        content = _answered(message, site, config)
        come_by("flower.answer.send")
        there.send(content)
        come_by("flower.answer.sent")


def _answered(message: Message, site: Site, config: RunConfig) -> Content:
    from clients.app import app

    reply = app(message, site.context(config))
    return reply.error if reply.has_error() else reply.content


def _upload(content: RecordDict) -> bytes:
    arrays = content.get("update")
    return b"" if arrays is None else bytes(next(iter(arrays.values())).data)  # type: ignore[union-attr]
