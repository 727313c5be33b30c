"""Whether the trunk's part of a model fits into this machine."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass

import psutil

from contract.records import CutLayers
from trunkline.finding import DoubtfulError, NotReadyError, SkippedError

LIMIT_S = 120
LITTLE_BYTES = 10**9
"""With less than this beside the weights few sessions find room at once."""
SMALLER = "serve a smaller part (--head-layers, --tail-layers), in bfloat16, or by several GPUs (torchrun)"


@dataclass(frozen=True, slots=True)
class AskedModel:
    """The checkpoint that a trunk would serve, and how."""

    model: str
    cut: CutLayers
    dtype: str


def check_gpu_memory(asked: AskedModel | None) -> str:
    """The weights of the trunk's part against what the GPU has free."""
    weights, gpu = _footprint(_named(asked))
    if gpu is None:
        raise SkippedError("no CUDA here")
    free, whole = gpu
    return _judge(weights, free, f"of {whole / 1e9:.1f} GB on the GPU")


def check_model_memory(asked: AskedModel | None) -> str:
    """The weights of the trunk's part against this machine's memory, where no GPU would hold them."""
    weights, gpu = _footprint(_named(asked))
    if gpu is not None:
        raise SkippedError("the GPU would hold them")
    return _judge(weights, psutil.virtual_memory().available, "of this machine's memory")


def _named(asked: AskedModel | None) -> AskedModel:
    if asked is None:
        raise SkippedError("name the trunk's model with --model")
    return asked


def _judge(weights: int, free: int, where: str) -> str:
    told = f"the trunk's weights take {weights / 1e9:.2f} GB; {free / 1e9:.1f} GB are free {where}"
    if weights > free:
        raise NotReadyError(told, SMALLER)
    if free - weights < LITTLE_BYTES:
        raise DoubtfulError(f"{told}, which leaves little for sessions", SMALLER)
    return told


@functools.cache
def _footprint(asked: AskedModel) -> tuple[int, tuple[int, int] | None]:
    """Bytes of the weights, and (free, whole) of the GPU, by a process that loads torch."""
    arguments = [asked.model, str(asked.cut.head), str(asked.cut.tail), asked.dtype]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "server_trunk.footprint", *arguments],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotReadyError(
            f"it was not read within {LIMIT_S} s", "see the check of torch, and the model's disk"
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise NotReadyError(f"it could not be read: {last}", "see the check of torch")
    told = json.loads(done.stdout)
    if "error" in told:
        raise NotReadyError(told["error"], "name the checkpoint, or trunk part, that `trunk serve --model` is given")
    gpu = told["gpu"]
    return told["weights"], None if gpu is None else (gpu[0], gpu[1])
