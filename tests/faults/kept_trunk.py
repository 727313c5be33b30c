"""A trunk in a process of its own, which is started again where it was killed, as a service manager would."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from contract import failpoint
from contract.records import CutLayers
from server_trunk import server as serving
from server_trunk.server import ServeOptions, TrunkServer
from tests.faults.forking import FORKING, LIMIT_S, begun, ended, was_killed

_CRAMPED_BYTES = 300_000
_CRAMPED_WAITING, _CRAMPED_ADAPTERS = 0.05, 0.0001
"""Shares of it: room for a pass and for one request, and for no adapter beside those of a lane."""


class KeptTrunk:
    """Serves `model` at `listen` from `state`; `order` is a failpoint's, for the first process alone."""

    def __init__(self, model: Path, listen: str, state: Path, order: str, *, cramped: bool) -> None:
        self._options = ServeOptions(
            str(model), CutLayers(1, 1), listen, state, device="cpu", threads=1, lanes=1, batch_tokens=512
        )
        self._cramped = cramped
        self._ending = False
        self.deaths = 0
        self._process = self._started(order)
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def _started(self, order: str) -> Any:
        here, there = FORKING.Pipe(duplex=False)
        process = begun(_serve, there, self._options, order, self._cramped)
        there.close()
        if not here.poll(LIMIT_S) or not here.recv():
            raise RuntimeError("a trunk did not come up")
        return process

    def _keep(self) -> None:
        while True:
            code = ended(self._process, None)
            if self._ending or not was_killed(code):
                return
            self.deaths += 1
            self._process = self._started("")

    def end(self) -> None:
        self._ending = True
        self._process.kill()
        self._keeper.join(LIMIT_S)


@contextmanager
def kept_trunk(model: Path, listen: str, state: Path, order: str, *, cramped: bool) -> Iterator[KeptTrunk]:
    trunk = KeptTrunk(model, listen, state, order, cramped=cramped)
    try:
        yield trunk
    finally:
        trunk.end()


def _serve(there: Any, options: ServeOptions, order: str, cramped: bool) -> None:
    """A process's whole life."""
    torch.set_num_threads(1)
    if cramped:
        vars(serving).update(choose_budget=lambda asked, device: _CRAMPED_BYTES)
        vars(serving).update(_FOR_WAITING=_CRAMPED_WAITING, _FOR_ADAPTERS=_CRAMPED_ADAPTERS)
    failpoint.arm(order)

    async def serve() -> None:
        await TrunkServer(options).start()
        there.send(True)
        await asyncio.Event().wait()

    asyncio.run(serve())
