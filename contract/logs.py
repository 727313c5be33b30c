"""How every process of ours writes its log: as text, or as one JSON object a line, with what it worked on.

Never a prompt, a tensor or a key: a message is one that this program wrote, and of an exception that is none of ours
the JSON format tells its kind and its places in the code, for its own words may quote what it choked on.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from contract.errors import ConfigError, TrunklineError

VARIABLE = "TRUNKLINE_LOG_FORMAT"
FIELDS = ("run", "round", "attempt", "client")
"""What a line names where it is known, beside `time`, `level`, `logger` and `message`."""

_ROOT = Path(__file__).resolve().parents[1]
_known: ContextVar[Mapping[str, str | int]] = ContextVar("trunkline_log_fields", default={})  # noqa: B039 (never changed)


def wants_json() -> bool:
    """Whether TRUNKLINE_LOG_FORMAT asks for JSON. Raises ConfigError for what it does not know."""
    asked = os.environ.get(VARIABLE, "") or "text"
    if asked not in ("json", "text"):
        raise ConfigError(f"{VARIABLE} is {asked!r}; it must be json or text")
    return asked == "json"


def handler(text_format: str) -> logging.Handler:
    """A handler to stderr: in JSON where that is asked for, else by `text_format`. Raises as `wants_json`."""
    made = logging.StreamHandler(sys.stderr)
    made.setFormatter(JsonFormatter() if wants_json() else logging.Formatter(text_format))
    return made


@contextmanager
def about(**fields: str | int) -> Iterator[None]:
    """Name `fields` (of FIELDS) in all lines that the block logs, in this thread or task."""
    token = _known.set({**_known.get(), **fields})
    try:
        yield
    finally:
        _known.reset(token)


def note(**fields: str | int) -> None:
    """Name `fields` (of FIELDS) in all lines that this thread or task logs from now on."""
    _known.set({**_known.get(), **fields})


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        told: dict[str, object] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_known.get(),
        }
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            told["error"] = type(error).__name__
            if isinstance(error, TrunklineError):
                told["reason"] = str(error)
            told["trace"] = _places(error.__traceback__)
        return json.dumps(told, ensure_ascii=False)


def _places(trace: TracebackType | None) -> list[str]:
    """FILE:LINE FUNCTION of each call, the outermost first; no source, no values."""
    return [f"{_shown(frame.filename)}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)]


def _shown(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else path.name
