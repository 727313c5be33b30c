"""Processes that begin with everything imported, so that one costs a fork and not the seconds that torch takes."""

from __future__ import annotations

import multiprocessing
import signal
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


def ended(process: Any) -> int:
    """The exit code of a process that has been started. Raises RuntimeError, and kills it, where it never ends."""
    process.join(LIMIT_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise RuntimeError(f"a process did not end within {LIMIT_S:g} s")
    return int(process.exitcode)


def was_killed(code: int) -> bool:
    return code == -signal.SIGKILL
