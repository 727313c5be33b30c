"""Pages as they were last made: however many browsers ask, one thread at a time reads SQL for them, not too often."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MOST_KEPT = 16
FRESH_S = 1.0
# A page that took long to make is kept for four times as long: who looks must not slow a run down.
FRESH_SHARE = 4.0
MOST_FRESH_S = 30.0


@dataclass(frozen=True, slots=True)
class Page:
    """A page's bytes, and a tag that changes with them."""

    status: int
    body: bytes
    tag: str

    @classmethod
    def of(cls, text: str, status: int = 200) -> Page:
        body = text.encode()
        return cls(status, body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')


class Shelf:
    """The newest MOST_KEPT pages by name. One is made at a time; who asks for it meanwhile gets the same one."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._making = threading.Lock()
        self._kept: OrderedDict[str, tuple[float, Page]] = OrderedDict()

    def page(self, name: str, make: Callable[[], Page]) -> Page:
        """The page `name`, made anew by `make` where the one that is kept is no longer fresh; raises what `make` does.

        A page with another status than 200 is not kept.
        """
        with self._making:
            fresh_until, page = self._kept.get(name, (0.0, None))
            began = self._now_s()
            if page is not None and began < fresh_until:
                return page
            made = make()
            self._kept.pop(name, None)
            if made.status == 200:
                ended = self._now_s()
                self._kept[name] = ended + min(max(FRESH_S, FRESH_SHARE * (ended - began)), MOST_FRESH_S), made
                if len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)
            return made
