"""Python's collector of cyclic garbage, kept out of the way while modules are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No collection within: thousands of modules are made, none of them garbage, and to look through them again and
    again takes a sixth of the time in which torch, transformers and peft are imported."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
