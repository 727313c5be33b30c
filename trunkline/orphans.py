"""Orphans that the kernel gave to this process: their end is taken note of, so that who watches for it sees it.

Flower's programs end once the process that started them is gone. One that has ended but was not reaped is still there
to who asks by its number, so that a ServerApp would outlive its SuperLink for as long as we live.
"""

from __future__ import annotations

import contextlib
import os
import threading

import psutil

LOOK_S = 0.5


class Orphans:
    """Reaps, as long as it is entered, what this process adopted, and nothing that it started: that has its own waiter.

    Adopted is what was seen below this process with another parent before.
    """

    def __init__(self) -> None:
        self._me = psutil.Process()
        self._others: set[psutil.Process] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="orphans", daemon=True)

    def __enter__(self) -> Orphans:
        self._thread.start()
        return self

    def __exit__(self, *ending: object) -> None:
        self._ended.set()
        self._thread.join()

    def look(self) -> None:
        """Note who has another parent by now, and reap those that are our own and have ended.

        Who was noted is so until it is gone: while a process between is just ending, psutil's list lacks all below it.
        """
        self._others = {process for process in self._others if process.is_running()}
        for process in self._me.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # gone meanwhile
                if process.ppid() != self._me.pid:
                    self._others.add(process)
        for process in self._others:
            with contextlib.suppress(psutil.Error, ChildProcessError):  # gone meanwhile, or reaped by another
                if process.ppid() == self._me.pid and process.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(process.pid, os.WNOHANG)

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.look()
