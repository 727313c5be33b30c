"""Threads that a model's microbatches run in, and what of torch's state belongs to a thread or to a microbatch."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from contract.errors import SessionError

_JOIN_S = 5.0

Job = Callable[[], None]


class LanePool:
    """Threads that stay between two steps: one that starts anew also starts new OpenMP threads of its own."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def run(self, lanes: int, work: Job) -> Callable[[], None]:
        """Has `lanes` threads do `work`, each in a copy of the caller's context; answers what waits for all of them.

        `work` must raise nothing. Raises SessionError after `close`.
        """
        if self._closed:
            raise SessionError("the session with the trunk is over: start a new one")
        while len(self._threads) < lanes:
            name = f"trunk-lane-{len(self._threads)}"
            self._threads.append(threading.Thread(target=_serve, args=(self._jobs,), name=name, daemon=True))
            self._threads[-1].start()
        ended = [threading.Event() for _ in range(lanes)]
        for event in ended:
            self._jobs.put(partial(_work, contextvars.copy_context(), work, event))

        def wait() -> None:
            for event in ended:
                event.wait()

        return wait

    def close(self) -> None:
        """Ends the threads that have no work, at once, and waits a little for them. Safe to call more than once."""
        self.let_go()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_JOIN_S)

    def let_go(self) -> None:
        """Ends the threads without waiting for them."""
        if not self._closed:
            self._closed = True
            for _ in self._threads:
                self._jobs.put(None)


def _work(context: contextvars.Context, work: Job, ended: threading.Event) -> None:
    try:
        context.run(work)
    finally:
        ended.set()


def _serve(jobs: queue.SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # an idle thread keeps no model alive


class ThreadState:
    """What of torch's state belongs to the calling thread: other threads may enter it."""

    def __init__(self, devices: Collection[torch.device]) -> None:
        """`devices` are those that are computed on."""
        self._threads = torch.get_num_threads()
        self._grad = torch.is_grad_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
            for kind in sorted({"cpu", *(device.type for device in devices)})
            if torch.is_autocast_enabled(kind)
        ]
        cuda = any(device.type == "cuda" for device in devices)
        self._stream = torch.cuda.current_stream() if cuda else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))  # and its device
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, dtype, cached in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cached))
            yield


class Randomness:
    """Torch's random numbers on `devices` for one microbatch: what it draws depends on its own seed alone."""

    def __init__(self, seed: int, devices: Collection[torch.device]) -> None:
        self._states = {device: torch.Generator(device).manual_seed(seed).get_state() for device in devices}

    def enter(self) -> None:
        """From here on, what is drawn is this microbatch's."""
        _set_states(self._states)

    def leave(self) -> None:
        """What is drawn afterwards is another's."""
        self._states = _states(self._states)


@contextmanager
def randomness_kept(devices: Collection[torch.device]) -> Iterator[None]:
    """After the block, torch's random numbers on `devices` go on as if nothing had been drawn in it."""
    before = _states(devices)
    try:
        yield
    finally:
        _set_states(before)


def random_devices(model: torch.nn.Module) -> list[torch.device]:
    """The CPU, and the CUDA devices that hold any of `model`."""
    held = {parameter.device for parameter in model.parameters()}
    return [torch.device("cpu"), *sorted((one for one in held if one.type == "cuda"), key=lambda one: one.index or 0)]


def _states(devices: Collection[torch.device]) -> dict[torch.device, torch.Tensor]:
    return {
        device: torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        for device in devices
    }


def _set_states(states: dict[torch.device, torch.Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
