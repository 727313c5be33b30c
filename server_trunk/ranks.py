"""The processes that hold one trunk together, started by `torchrun`: the first one leads, the others do as it tells.

Orders are JSON and tensors, never pickled objects: a header's length, the header, then each tensor it names.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contract.codec import DTYPES
from contract.errors import ConfigError, ConnectionFailedError

logger = logging.getLogger("trunkline.server_trunk")

SILENCE_S = 1800.0
"""How long a process waits for the others, which load a model of any size; the leader is heard from far sooner."""
HEARTBEAT_S = 30.0

_TYPES: Mapping[str, torch.dtype] = {**DTYPES, "int64": torch.int64, "bool": torch.bool, "uint8": torch.uint8}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


_TOLD = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAST_WORDS_S = 2.0
_FAREWELL_S = 10.0


@dataclass(frozen=True, slots=True)
class Member:
    """Which of a trunk's processes this is, as `torchrun` says it."""

    rank: int = 0
    size: int = 1

    @classmethod
    def told(cls, environment: Mapping[str, str]) -> Member:
        """Raises ConfigError where the environment names several processes and not which one this is."""
        size = _number(environment, "WORLD_SIZE", "1")
        if size <= 1:
            return cls()
        missing = ", ".join(name for name in _TOLD if name not in environment)
        member = cls(_number(environment, "RANK", "0"), size)
        if missing or member.rank >= size:
            raise ConfigError(
                f"WORLD_SIZE is {size} and RANK {member.rank} in the environment, {missing or 'nothing'} is missing: "
                "start a trunk of several processes with torchrun"
            )
        return member

    @property
    def leads(self) -> bool:
        return self.rank == 0


class Ranks:
    """The group. Every method must be called by all its processes, in one order, each on one thread."""

    def __init__(self, member: Member, device: str) -> None:
        """Joins the group; waits for the others. Raises ConfigError for a device that this process cannot have, and
        ConnectionFailedError."""
        self.member = member
        self._device = device
        self._lost = False
        _take_device(device)
        with self.in_step():
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=SILENCE_S), rank=member.rank
            )

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """What goes wrong within, at this process or at another, leaves the others behind: this process then ends.

        It does so in a moment, in which what is raised here, ConnectionFailedError, can be told. The others see it go;
        waiting for them first would take as long as they wait for this one.
        """
        if self._lost:
            raise ConnectionFailedError("the processes of this trunk have lost each other, and end: start it again")
        try:
            yield
        except Exception as error:
            self._lost = True
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.error("the processes of this trunk are out of step, and end: %s", reason)
            _end_after(_LAST_WORDS_S)
            raise ConnectionFailedError(
                f"a process of this trunk failed, and all end: {reason}; start the trunk again"
            ) from error

    def tell(self, order: Mapping[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """The leader's word to all others."""
        header = {**order, "tensors": [[_NAMES[one.dtype], list(one.shape)] for one in tensors]}
        text = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8).to(self._device)
        dist.broadcast(torch.tensor([len(text)], device=self._device), 0)
        dist.broadcast(text, 0)
        for one in tensors:
            dist.broadcast(one.detach().to(self._device).contiguous(), 0)

    def hear(self) -> tuple[dict[str, Any], list[Tensor]]:
        """What the leader tells."""
        length = torch.zeros(1, dtype=torch.int64, device=self._device)
        dist.broadcast(length, 0)
        text = torch.empty(int(length), dtype=torch.uint8, device=self._device)
        dist.broadcast(text, 0)
        order = json.loads(bytes(text.cpu().numpy()))
        tensors = []
        for name, shape in order.pop("tensors"):
            tensors.append(torch.empty(shape, dtype=_TYPES[name], device=self._device))
            dist.broadcast(tensors[-1], 0)
        return order, tensors

    def sum_(self, tensor: Tensor) -> None:
        """Adds up over all processes, in place."""
        dist.all_reduce(tensor)

    def part(self) -> None:
        """The end, once all others are here too: who went first would be taken for lost."""
        farewell = _end_after(_FAREWELL_S)
        dist.barrier()
        farewell.cancel()
        dist.destroy_process_group()


def _number(environment: Mapping[str, str], name: str, default: str) -> int:
    value = environment.get(name, default)
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value!r} in the environment; it must be a number, as torchrun sets it")
    return int(value)


def _take_device(device: str) -> None:
    if device == "cuda":
        local = _number(os.environ, "LOCAL_RANK", "0")
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"nproc-per-node is above {local}, and this machine has {torch.cuda.device_count()} CUDA devices: "
                "each process of a trunk needs one of its own"
            )
        torch.cuda.set_device(local)
    elif torch.cuda.is_available():
        raise ConfigError(
            f"device is {device!r}, and transformers parts a model among the CUDA devices that it sees: hide them with "
            "CUDA_VISIBLE_DEVICES="
        )


def _end_after(seconds: float) -> threading.Timer:
    """Ends this process, whatever its threads wait for."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
    return timer
