"""How many bytes a forward's graph holds, measured once for each kind of pass and scaled by its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_GUESSED_VALUES = 40
"""Values kept per token, layer and hidden unit before the first measurement: twice what LoRA on all linear layers keeps
of a Llama-class layer in float32."""


class GraphMeter:
    """Bytes per token of passes that were measured, by kind: the LoRA's layout, the autocast type, and the length."""

    def __init__(self, model: nn.Module, layers: int, hidden_size: int) -> None:
        self._frozen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._guess = float(_GUESSED_VALUES * 4 * layers * hidden_size)
        self._per_token: dict[tuple[str, str, int], float] = {}

    def estimate(self, kind: tuple[str, str, int], tokens: int) -> int:
        """Bytes for `tokens` of a kind; from above where that kind was never seen."""
        return int(tokens * self._per_token.get(self._bucket(kind), self._guess))

    def knows(self, kind: tuple[str, str, int]) -> bool:
        return self._bucket(kind) in self._per_token

    @contextmanager
    def measuring(self, kind: tuple[str, str, int], tokens: int) -> Iterator[None]:
        """Counts what autograd saves within, each storage once, the frozen weights not at all."""
        seen: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._frozen:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            yield
        self._per_token[self._bucket(kind)] = sum(seen.values()) / tokens

    @staticmethod
    def _bucket(kind: tuple[str, str, int]) -> tuple[str, str, int]:
        """Eager attention keeps a square of the length, so that lengths are told apart by powers of two."""
        layout, autocast, length = kind
        return layout, autocast, length.bit_length()
