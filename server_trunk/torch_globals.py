"""What of PyTorch belongs to the whole process, for lanes that compute side by side: one at a time may use it.

Its random numbers come from one generator. Adapters of fused experts are computed by `torch.nn.utils.parametrize`,
whose cache is one for all threads and is emptied when the last of them leaves it: with a second lane in it a session
would be given the expert weights of the one before, with that one's adapter in them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.nn.utils import parametrize

_DRAWING = threading.Lock()
_PARAMETRIZING = threading.Lock()
_PLAIN_SET = parametrize._maybe_set


@contextmanager
def drawing(seed: int, device: str) -> Iterator[None]:
    """Within, what is drawn follows from `seed`; PyTorch's own state stays as it was."""
    with _DRAWING, torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        torch.manual_seed(seed)
        yield


def parametrizing() -> AbstractContextManager[object]:
    """Within, expert weights are computed with their adapters."""
    return _PARAMETRIZING


def keep_versions() -> None:
    """Have a parametrization that leaves a weight as it is not count as a change of it.

    PyTorch sets the frozen weight to itself, after which no graph that a session keeps through it can go backward.
    """
    parametrize._maybe_set = _set_to_another


def _set_to_another(dest: Tensor, src: Tensor) -> None:
    if dest is not src:
        _PLAIN_SET(dest, src)
