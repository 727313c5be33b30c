"""Processes that begin with everything imported, so that one costs a fork and not the seconds that torch takes."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

LIMIT_S = 180.0

FORKING: Any = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    [
        *("tests.faults.life", "clients.participation", "clients.spending", "server_trunk.server"),
        *("cryptography.hazmat.backends.openssl", "grpc._channel", "pyarrow.json"),
        *("peft.utils.transformers_weight_conversion", "tests.faults.warm"),
    ]
)


# Whoever starts a process also asks after all others, and of two threads that ask after one of them one hears its exit
# code and the other, who finds it read, 255.
_ASKING = threading.Lock()


def begun(target: Callable[..., object], *arguments: object) -> Any:
    """A process that does `target`; for threads side by side, together with `ended`."""
    process = FORKING.Process(target=target, args=arguments)
    with _ASKING:
        process.start()
    return process


def ended(process: Any, limit_s: float | None = LIMIT_S) -> int:
    """The exit code of a process that has begun. Raises RuntimeError, and kills it, where it does not end in time."""
    if not wait([process.sentinel], limit_s):
        process.kill()
        with _ASKING:
            process.join()
        raise RuntimeError(f"a process did not end within {limit_s:g} s")
    with _ASKING:
        process.join()
    return int(process.exitcode)


def was_killed(code: int) -> bool:
    return code == -signal.SIGKILL
