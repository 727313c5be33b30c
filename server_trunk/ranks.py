"""The processes that hold one trunk together, started by `torchrun`: the first one leads, the others do as it tells.

Orders are JSON and tensors, never pickled objects: a header's length, the header, then each tensor it names.
"""

from __future__ import annotations

import json
import os
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

SILENCE_S = 1800.0
"""How long a process waits for the others, which load a model of any size; the leader is heard from far sooner."""
HEARTBEAT_S = 30.0

_TYPES: Mapping[str, torch.dtype] = {**DTYPES, "int64": torch.int64, "bool": torch.bool, "uint8": torch.uint8}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True, slots=True)
class Member:
    """Which of a trunk's processes this is, as `torchrun` says it."""

    rank: int = 0
    size: int = 1

    @classmethod
    def told(cls, environment: Mapping[str, str]) -> Member:
        """Raises ConfigError where the environment names several processes and not which one this is."""
        values = {name: environment.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
        for name, value in values.items():
            if not value.isdecimal():
                raise ConfigError(f"{name} is {value!r} in the environment; it must be a number, as torchrun sets it")
        member = cls(int(values["RANK"]), int(values["WORLD_SIZE"]))
        needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") if member.size > 1 else ()
        missing = ", ".join(name for name in needed if name not in environment)
        if missing or member.rank >= max(member.size, 1):
            raise ConfigError(
                f"WORLD_SIZE is {member.size} and RANK {member.rank} in the environment, {missing or 'nothing'} is "
                "missing: start a trunk of several processes with torchrun"
            )
        return member

    @property
    def leads(self) -> bool:
        return self.rank == 0


class Ranks:
    """The group. Every method but `leave` must be called by all its processes, in one order, each on one thread."""

    def __init__(self, member: Member, device: str) -> None:
        """Joins the group; waits for the others. Raises ConnectionFailedError."""
        self.member = member
        self._device = device
        self._lost = False
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", member.rank)))
        with self.in_step():
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=SILENCE_S), rank=member.rank
            )

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """What goes wrong within may leave the others behind: the group is then over.

        Raises ConnectionFailedError where it is over already, or where it is another process that is gone.
        """
        if self._lost:
            raise ConnectionFailedError("the processes of this trunk have lost each other: start it again")
        try:
            yield
        except BaseException as error:
            self._lost = True
            self.leave()
            if isinstance(error, (dist.DistError, RuntimeError)) and not isinstance(error, torch.OutOfMemoryError):
                raise ConnectionFailedError(
                    f"a process of this trunk is lost: {str(error).splitlines()[0]}; start the trunk again"
                ) from error
            raise

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
        dist.barrier()
        self.leave()

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
