"""How much memory sessions may hold between their frames, so that no number of clients takes the trunk out of it.

Half of the budget is for what a pass needs while it runs. The other half is for what waits: requests, inputs and graphs
of forwards whose backward has not come, and adapters. A graph is kept while there is room; with less room its input
alone is, and the backward computes the forward again; with none a session waits for its turn, or, where it holds
something already and so could wait for itself, has its input put on disk. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import threading
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from contract.errors import CapacityError, ConfigError, DeadlineError, StorageError
from contract.failpoint import failpoint

_OF_AVAILABLE = 0.6
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SMALLEST = 64 << 20
_SPILL_PREFIX = "spill-"


def parse_size(name: str, text: str) -> int:
    """Bytes of "8G", "512MiB" or a plain number. Raises ConfigError, naming the option."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    digits, unit = number.rstrip("KMGT"), number[len(number.rstrip("KMGT")) :]
    try:
        return int(float(digits) * _UNITS[unit])
    except (KeyError, ValueError):
        raise ConfigError(f"{name} is {text!r}; it must be bytes, such as 8G or 512M") from None


def choose_budget(asked: str, device: str) -> int:
    """Bytes of `--memory-budget`; "auto" is 60 % of what is free once the model is loaded, on the GPU where it is used.

    Raises ConfigError below 64 MiB, in which no pass would fit.
    """
    if asked == "auto":
        free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
        return max(_SMALLEST, int(free * _OF_AVAILABLE))
    limit = parse_size("memory-budget", asked)
    if limit < _SMALLEST:
        raise ConfigError(f"memory-budget is {asked!r}; it must be at least {_SMALLEST >> 20}M, or auto")
    return limit


class MemoryBudget:
    """Bytes that are held between frames, over all sessions. Who waits for some gets them in the order of asking."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None], float]] = deque()

    def try_take(self, size: int) -> bool:
        """Take `size` bytes if they are free and nobody waits for them."""
        if self._waiting or self.taken + size > self.limit:
            return False
        self.taken += size
        return True

    async def take(self, size: int, timeout_s: float) -> None:
        """Take `size` bytes once they are free.

        Raises CapacityError where they never can be, DeadlineError after `timeout_s`.
        """
        if size > self.limit:
            raise CapacityError(
                f"this microbatch needs {size} bytes at the trunk while it waits, whose memory-budget leaves "
                f"{self.limit} for all sessions: use a smaller one"
            )
        if self.try_take(size):
            return
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        entry = (size, turn, loop.time())
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.give_back(size)
            else:
                if entry in self._waiting:
                    self._waiting.remove(entry)
                self._serve()
            if isinstance(error, TimeoutError):
                raise DeadlineError(f"the trunk had no memory to spare for {timeout_s:g} s: try again later") from None
            raise

    def give_back(self, size: int) -> None:
        self.taken -= size
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            size, turn, _ = self._waiting[0]
            if not turn.cancelled():  # a cancelled one is still here until its task runs
                if self.taken + size > self.limit:
                    return
                self.taken += size
                turn.set_result(None)
            self._waiting.popleft()

    @property
    def waited_s(self) -> float:
        """How long the first in the line has waited; 0 where nobody does."""
        return asyncio.get_running_loop().time() - self._waiting[0][2] if self._waiting else 0.0

    @property
    def scarce(self) -> bool:
        """Whether somebody waits, or little is left."""
        return bool(self._waiting) or 4 * self.taken > 3 * self.limit


class Hold:
    """What one request holds of a budget, from its header to the end of its backward."""

    __slots__ = ("_budget", "_released", "keeps_graph", "size")

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.size = 0
        self._released = False
        self.keeps_graph = False

    @property
    def occupies(self) -> bool:
        """Whether memory is taken on its account: its own, or with others that of a graph which they share."""
        return bool(self.size) or self.keeps_graph

    def grow(self, size: int) -> bool:
        """Hold `size` bytes more, if they are free."""
        if self._released or not self._budget.try_take(size):
            return False
        self.size += size
        return True

    async def wait(self, size: int, timeout_s: float) -> None:
        """As `grow`, once they are free. Raises what MemoryBudget.take raises."""
        await self._budget.take(size, timeout_s)
        self.size += size

    def keep_graph(self, size: int) -> bool:
        """Hold the room of a graph of `size` bytes, if it is free."""
        self.keeps_graph = self.grow(size)
        return self.keeps_graph

    def beside(self) -> Hold:
        """A hold of nothing yet, of the same budget."""
        return Hold(self._budget)

    def release(self) -> None:
        """Give everything back; once."""
        if not self._released:
            self._released = True
            self.keeps_graph = False
            self._budget.give_back(self.size)
            self.size = 0


class Spilled:
    """Bytes on disk, there until this object is gone."""

    def __init__(self, spill: Spill, path: Path, size: int) -> None:
        self._spill, self._path, self._size = spill, path, size

    def append(self, data: memoryview | bytes) -> None:
        """Raises StorageError."""
        failpoint("spill.write")
        try:
            with self._path.open("ab") as file:
                file.write(data)
        except OSError as error:
            raise StorageError(f"a request cannot be put aside on disk: {error.strerror}") from error
        failpoint("spill.written")

    def read(self, start: int = 0, size: int = -1) -> memoryview:
        """All of it, or `size` bytes from `start` on, writable. Raises StorageError."""
        try:
            with self._path.open("rb") as file:
                file.seek(start)
                return memoryview(bytearray(file.read(size)))
        except OSError as error:
            raise StorageError(f"a request put aside on disk cannot be read: {error.strerror}") from error

    def __del__(self) -> None:
        self._spill.forget(self._path, self._size)


class Spill:
    """A folder for what memory has no room for, empty at start, at most `limit` bytes.

    It holds clients' activations: those of a trunk that was killed are removed by the next one that starts here.
    """

    def __init__(self, parent: Path, limit: int) -> None:
        """Raises StorageError when the folder cannot be made."""
        self._held = ExitStack()
        try:
            self._folder = TemporaryDirectory(prefix=_SPILL_PREFIX, dir=parent, ignore_cleanup_errors=True)
            self._lock_folder()
            _remove_leftovers(parent)
        except OSError as error:
            raise StorageError(f"state-dir {parent} cannot be written to: {error.strerror}") from error
        self.limit = limit
        self.taken = 0
        self.put_bytes = 0  # in all
        self._made = 0
        self._lock = threading.RLock()  # lanes put aside, and whichever thread drops a graph last forgets its file

    def _lock_folder(self) -> None:
        """Held as long as this process lives, so that no other trunk takes the folder for a leftover."""
        descriptor = os.open(self._folder.name, os.O_RDONLY)
        self._held.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def folder(self) -> Path:
        return Path(self._folder.name)

    def put(self, data: memoryview) -> Spilled:
        """Raises CapacityError when the folder is full, StorageError when it cannot be written."""
        kept = self.place(len(data))
        kept.append(data)
        return kept

    def place(self, size: int) -> Spilled:
        """Room for `size` bytes, to be appended. Raises CapacityError when the folder is full."""
        with self._lock:
            if self.taken + size > self.limit:
                raise CapacityError(
                    f"{self.taken} bytes of requests wait on the trunk's disk, and {size} more are over its "
                    f"spill-budget of {self.limit}: try again later"
                )
            self.taken += size
            self.put_bytes += size
            self._made += 1
            return Spilled(self, self.folder / f"request-{self._made}", size)

    def forget(self, path: Path, size: int) -> None:
        path.unlink(missing_ok=True)
        with self._lock:
            self.taken -= size

    def close(self) -> None:
        self._folder.cleanup()
        self._held.close()


def _remove_leftovers(parent: Path) -> None:
    """Remove the folders below `parent` that no living process holds."""
    for folder in parent.glob(f"{_SPILL_PREFIX}*"):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
