"""The weighted mean of adapters, summed in float64 one after the other, so that only one more is held at a time.

A trunk averages its clients' adapters by it, and the orchestrator the averages of several trunks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from contract.adapter import from_bytes, to_bytes
from contract.errors import AgreementError, UpdateError


class AdapterMean:
    """A running mean. Equal values stay bit for bit what they are, as long as the weights sum to less than 2^29."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._first = ""
        self.weight = 0

    def add(self, whose: str, data: bytes, weight: int) -> None:
        """Add an adapter (safetensors, float32); `whose` it is, is named where it does not fit the first one.

        Raises AgreementError for other names or shapes than the first one's, ModelError for bytes that are no adapter.
        """
        tensors = from_bytes(data)
        if not self._sums:
            self._sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in tensors.items()}
            self._first = whose
        if _shapes(tensors) != _shapes(self._sums):
            raise AgreementError(f"the adapters of {self._first} and {whose} have different tensors")
        for name, tensor in tensors.items():
            self._sums[name].add_(tensor.to(torch.float64), alpha=weight)
        self.weight += weight

    def to_bytes(self) -> bytes:
        """The mean, rounded to float32 (safetensors). Raises UpdateError where all weights were zero."""
        if self.weight == 0:
            raise UpdateError("the weights sum to 0, so there is nothing to average")
        return to_bytes({name: (total / self.weight).to(torch.float32) for name, total in self._sums.items()})


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
