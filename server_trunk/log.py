"""What a trunk's process writes to stderr."""

from __future__ import annotations

import logging

import grpc

from contract import logs


class _Vanished(logging.Filter):
    """Tells by one line what gRPC tells by a traceback: that a client went away before it had its answer."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError):
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
