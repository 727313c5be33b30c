"""How the pages write numbers, moments and other people's text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup, escape

from trunkline.live import wire_size
from trunkline.pages.scales import length_text

MOST_CHARACTERS = 600
NOTHING = "–"


def clip(text: object, most: int = MOST_CHARACTERS) -> str:
    """`text` cut to `most` characters, with a sign that it goes on."""
    whole = str(text)
    return whole if len(whole) <= most else whole[: most - 1] + "…"


def moment(when: datetime) -> str:
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def pixels(place: float) -> str:
    return f"{place:.2f}".rstrip("0").rstrip(".")


def word(kind: str) -> str:
    """A kind as the name of a style; one that no style can be named after is `other`."""
    return kind if re.fullmatch(r"[a-z][a-z-]{0,30}", kind) else "other"


def setting(value: Any) -> str:
    return NOTHING if value is None else json.dumps(value, ensure_ascii=False, default=str)


def ticks(text: str) -> Markup:
    """`text`, escaped, with what stands in backticks set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def pair(name: str) -> tuple[str, str]:
    """A legend's entry for a kind that is its own name."""
    return name, name


def _told(write: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: NOTHING if value is None else write(value)


FILTERS: dict[str, Callable[..., Any]] = {
    "clip": clip,
    "moment": moment,
    "px": pixels,
    "word": word,
    "setting": setting,
    "ticks": ticks,
    "pair": pair,
    "span": _told(length_text),
    "size": _told(wire_size),
    "loss": _told(lambda value: f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"),
    "seconds": _told(lambda value: f"{value:,.2f}"),
    "short": _told(lambda value: f"{value:.4g}"),
    "percent": _told(lambda value: f"{100 * value:.1f} %"),
}
