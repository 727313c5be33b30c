"""What a trunk's process writes to stderr."""

from __future__ import annotations

import logging

from grpc._cython import cygrpc  # type: ignore[attr-defined]  # the one place that has the error's class

from contract import logs


def is_of_a_vanished_client(error: BaseException | None) -> bool:
    """Whether gRPC raised `error` because a call was over that it had still something to send to."""
    return isinstance(error, cygrpc.ExecuteBatchError)


class _Vanished(logging.Filter):
    """Tells by one line what gRPC tells by a traceback: that a client went away before it had its answer."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and is_of_a_vanished_client(record.exc_info[1]):
            record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
            record.msg, record.args = "a client went away before it had its answer", ()
            record.exc_info = record.exc_text = None
        return True


def speak() -> None:
    """Let the trunk's log and other libraries' warnings reach stderr, in the format that was asked for.

    Raises ConfigError for an unknown TRUNKLINE_LOG_FORMAT.
    """
    handler = logs.handler("%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("trunkline").setLevel(logging.INFO)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_Vanished())
