"""How many bytes a forward's graph holds, measured once for each kind of pass and scaled by its tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class PassKind(NamedTuple):
    """What decides how many bytes a token's graph has. `length` is T, and `draws` whether there is dropout."""

    layout: str
    autocast_dtype: str
    draws: bool
    length: int

    @property
    def bucket(self) -> PassKind:
        """Eager attention keeps a square of the length, so that lengths are told apart by powers of two."""
        return self._replace(length=self.length.bit_length())


_NUMBERED = re.compile(r".*?\.\d+\.")
_KINDS = 256
"""How many are remembered: a kind goes by what a session asks for, of which there is no end."""


class GraphMeter:
    """Bytes per token of passes that were measured, by kind."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._frozen = {
            part.untyped_storage().data_ptr() for parameter in model.parameters() for part in _parts(parameter)
        }
        self._values, self._squares = _most_values(model)
        self._layer_values, self._layer_squares = _most_values_of_a_layer(model)
        self._per_token: dict[PassKind, float] = {}

    def estimate(self, kind: PassKind, tokens: int) -> int:
        """Bytes for `tokens` of a kind; from above where that kind was never seen."""
        measured = self._per_token.get(kind.bucket)
        if measured is None:
            measured = 4.0 * (2 if kind.draws else 1) * (self._values + self._squares * kind.length)
        return int(tokens * measured)

    def transient(self, kind: PassKind, tokens: int) -> int:
        """Bytes that a forward without a graph holds at once, about: what goes into one layer's matrices and comes out.

        That is more than is ever there at once, but for squares of the length (the masks of padded rows), and for whole
        weights where an adapter makes such (DoRA, experts).
        """
        values = self._layer_values + self._layer_squares * kind.length
        return min(int(4.0 * tokens * values), self.estimate(kind, tokens))

    def knows(self, kind: PassKind) -> bool:
        return kind.bucket in self._per_token

    @contextmanager
    def measuring(self, kind: PassKind, tokens: int) -> Iterator[None]:
        """Counts what autograd saves within, each storage once, the frozen weights not at all."""
        seen: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            for part in _parts(tensor):
                storage = part.untyped_storage()
                if storage.data_ptr() not in self._frozen:
                    seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            yield
        self._per_token[kind.bucket] = sum(seen.values()) / tokens
        while len(self._per_token) > _KINDS:
            self._per_token.pop(next(iter(self._per_token)), None)


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors in memory: of one that is made of others (a share of a weight, 8 bits and scales), those."""
    made_of = getattr(tensor, "__tensor_flatten__", None)
    parts = [tensor] if made_of is None else [getattr(tensor, name) for name in made_of()[0]]
    return [part for part in parts if isinstance(part, Tensor)]


def _most_values(model: PreTrainedModel) -> tuple[int, int]:
    """Values that a graph can hold of each token, and those of each token and position that it attends to.

    Of the first: what goes into each matrix and comes out, which LoRA keeps in float32 whatever the weights are, and
    for each norm as much again. Of the second: eager attention's probabilities.
    """
    heads = _eager_heads(model)
    return sum(_values_by_layer(model).values()), 3 * int(model.config.num_hidden_layers) * heads


def _most_values_of_a_layer(model: PreTrainedModel) -> tuple[int, int]:
    """The same of the largest of its layers alone."""
    return max(_values_by_layer(model).values(), default=0), 3 * _eager_heads(model)


def _values_by_layer(model: PreTrainedModel) -> dict[str, int]:
    """By the name up to a layer's number; what is in no layer stands for itself."""
    experts = int(getattr(model.config, "num_experts_per_tok", None) or 1)
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            values = 2 * len(parameter)
        else:
            values = sum(parameter.shape[-2:]) * (experts if parameter.dim() == 3 else 1)
        numbered = _NUMBERED.match(name)
        layer = name if numbered is None else numbered[0]
        found[layer] = found.get(layer, 0) + values
    return found


def _eager_heads(model: PreTrainedModel) -> int:
    """Heads of a layer whose attention keeps a square of the length; 0 for any but eager attention."""
    config = model.config
    return int(config.num_attention_heads) if config._attn_implementation == "eager" else 0
