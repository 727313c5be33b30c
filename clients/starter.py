"""The process that started this one: a ClientApp ends after it, even where no signal reaches the main thread.

Flower has such a process end by a signal that it raises on a thread of its own. While Flower hands a reply over, the
main thread sits in a wait that this does not interrupt, and with the SuperNode gone the reply is offered again without
end: the model would stay in memory for good.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from functools import cache

LOOK_S = 1.0
GRACE_S = 15.0
"""What Flower's own end takes at most, and then some."""
WATCHES = "--parent-pid"
"""Flower's own option for a process that is to end after who started it."""


@cache
def end_after_starter(grace_s: float = GRACE_S) -> None:
    """Watch the process that started this one, where Flower was told to; asked again, it is watched already.

    `grace_s` after that is gone the main thread is interrupted, and as long after that this process is ended.
    """
    if WATCHES in sys.argv:
        threading.Thread(target=_watch, args=(os.getppid(), grace_s), name="starter", daemon=True).start()


def _watch(starter: int, grace_s: float) -> None:
    while os.getppid() == starter:
        time.sleep(LOOK_S)
    time.sleep(grace_s)
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, signal.SIGINT)
    time.sleep(grace_s)
    os._exit(1)
