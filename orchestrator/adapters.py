"""The adapter as the orchestrator handles it: drawn once, split, moved by a mean, joined again.

torch is imported inside the functions: commands that only read SQL must not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from contract import collector
from contract.config import RunConfig
from contract.errors import IntegrityError
from contract.records import Factor, LoraSpec


@dataclass(frozen=True, slots=True)
class FirstAdapter:
    """Version 0: its structure and the bytes of its two parts."""

    spec: LoraSpec
    client: bytes
    trunk: bytes


@dataclass(frozen=True, slots=True)
class ClientPart:
    """The client part of one version: a flat float32 vector, tensors in sorted-name order."""

    names: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    vector_d: npt.NDArray[np.float32]

    @classmethod
    def from_bytes(cls, data: bytes) -> ClientPart:
        """Raises ModelError when `data` is no adapter."""
        from contract import adapter

        tensors = adapter.from_bytes(data)
        names = tuple(sorted(tensors))
        shapes = {name: tuple(tensors[name].shape) for name in names}
        return cls(names, shapes, adapter.flatten(tensors, names))

    def to_bytes(self) -> bytes:
        from contract import adapter

        return adapter.to_bytes(adapter.unflatten(self.vector_d, self.shapes, self.names))

    def trained(self, factor: Factor) -> npt.NDArray[np.bool_]:
        """Which coordinates, shape (d,), a round trains that trains `factor`."""
        from contract import adapter

        trainable = set(adapter.trainable_names(self.names, factor))
        pieces = [np.full(math.prod(self.shapes[name]), name in trainable) for name in self.names]
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.bool_)

    def moved(self, factor: Factor, mean: npt.NDArray[np.float64]) -> ClientPart:
        """The next version: `mean`, the mean change of the trained coordinates in their order, added to this one."""
        where = self.trained(factor)
        if mean.shape != (int(where.sum()),):
            raise IntegrityError(f"the mean update has shape {mean.shape}; {int(where.sum())} values were trained")
        vector_d = self.vector_d.copy()
        vector_d[where] = (vector_d[where].astype(np.float64) + mean).astype(np.float32)
        return ClientPart(self.names, self.shapes, vector_d)


def weighted_mean(parts: Sequence[tuple[str, bytes, int]]) -> bytes:
    """The mean of (whose, safetensors, weight), summed in float64 in that order.

    Raises AgreementError for adapters of different tensors, ModelError for bytes that are none.
    """
    from contract.adapter_mean import AdapterMean

    mean = AdapterMean()
    for whose, data, weight in parts:
        mean.add(whose, data, weight)
    return mean.to_bytes()


def draw_first_adapter(config: RunConfig, model_dir: Path) -> FirstAdapter:
    """Version 0, drawn from (seed, parameter name); `model_dir` needs config.json only.

    Raises ModelError, UnsupportedModelError or ConfigError where the model cannot be split or adapted as asked.
    """
    with collector.paused():
        from contract import adapter
        from contract.architecture import probe

    found = probe(model_dir)
    config.cut.check(found.layers)
    spec = adapter.resolve_lora(model_dir, adapter.run_lora(config))
    tensors = adapter.initial_adapter(adapter.adapter_shapes(model_dir, spec), config.seed)
    client, trunk = adapter.split_adapter(tensors, found, config.cut)
    return FirstAdapter(spec, adapter.to_bytes(client), adapter.to_bytes(trunk))
