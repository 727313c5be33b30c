"""The C library's heap in a site's process: what one step frees is kept for the next.

As glibc comes, it gives the top of the heap back to the system whenever a few MiB of it are free. A training step frees
tens of MiB and asks for them again at once, as fresh pages: some 3,500 page faults a step at 4 x 128 tokens, and 440
where they are kept.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_MOST_FREE_BYTES = 64 << 20
_MAPPED_FROM_BYTES = 32 << 20
"""Larger tensors are mapped apart, and given back when they are freed; where glibc's own rule would end, too."""
_OPERATORS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed(environment: Mapping[str, str] = os.environ) -> None:
    """Have this process keep up to 64 MiB that it freed. Nothing where `environment` already says how, or no glibc."""
    if environment.keys() & set(_OPERATORS):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
    mallopt(_TRIM_THRESHOLD, _MOST_FREE_BYTES)
