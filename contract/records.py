"""Small frozen records that separate processes exchange or compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from contract.errors import ConfigError

Factor = Literal["A", "B", "AB"]
Trainable = Literal["A", "B", "AB", "none"]
"""What a session with the trunk trains of the trunk's half: LoRA factors, or nothing."""
Side = Literal["client", "trunk"]

DELTA_CODEC = "int4-delta"
"""The one codec that is for activations alone, and needs what both ends keep."""
MOST_TOKENS = 1 << 32
OUTSIDE_ROUNDS = 0
"""The attempt that a final judgement names: it is no attempt at a round."""
SMALLEST_CLIP, LARGEST_CLIP = 2.0**-40, 2.0**40
"""What the fixed point of a round's sum can hold."""


@dataclass(frozen=True, slots=True)
class CutLayers:
    """Where the model is cut: `head` layers before the trunk, `tail` layers after it."""

    head: int
    tail: int

    def check(self, layers: int) -> None:
        """Raise ConfigError unless head >= 0, tail >= 0 and at least one layer is left for the trunk."""
        for name, value in (("head-layers", self.head), ("tail-layers", self.tail)):
            if value < 0:
                raise ConfigError(f"{name} is {value}; it must be 0 or more")
        if self.head + self.tail >= layers:
            raise ConfigError(
                f"head-layers {self.head} + tail-layers {self.tail} leave no layer for the trunk: "
                f"the model has {layers} layers, so their sum must be at most {layers - 1}"
            )

    def kept(self, layers: int, side: Side) -> frozenset[int]:
        """Absolute indices of the decoder layers that `side` holds, of `layers` in all."""
        trunk = frozenset(range(self.head, layers - self.tail))
        return trunk if side == "trunk" else frozenset(range(layers)) - trunk


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """A LoRA adapter's structure with every target spelled out, so that two halves built apart agree.

    `target_modules` and `target_parameters` are full module names of the whole model, sorted. `rank_pattern` and
    `alpha_pattern` hold full module names too and list only the modules that differ from `rank` and `alpha`.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False

    def scale_of(self, target: str) -> float:
        """What the product B A of one target module is multiplied by: alpha / r, with rsLoRA alpha / sqrt(r).

        Hu et al. 2021, arXiv 2106.09685, section 4.1; Kalajdzievski 2023, arXiv 2312.03732.
        """
        rank = self.rank_pattern.get(target, self.rank)
        alpha = self.alpha_pattern.get(target, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def only(self, held: Callable[[str], bool]) -> LoraSpec:
        """What of it is on the modules that `held` says yes to."""
        return replace(
            self,
            target_modules=tuple(filter(held, self.target_modules)),
            target_parameters=tuple(filter(held, self.target_parameters)),
            rank_pattern={name: rank for name, rank in self.rank_pattern.items() if held(name)},
            alpha_pattern={name: alpha for name, alpha in self.alpha_pattern.items() if held(name)},
        )


@dataclass(frozen=True, slots=True)
class RoundKey:
    """Names one attempt at one round of one run."""

    run: str
    round: int
    attempt: int


@dataclass(frozen=True, slots=True)
class AdamWSettings:
    """What one AdamW step needs; both sides of the cut use the same."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class RoundProgress:
    """What the trunk has seen of one round so far."""

    sessions: int
    steps: int
    tokens: int
    received_bytes: int
    sent_bytes: int

    def __add__(self, other: RoundProgress) -> RoundProgress:
        return RoundProgress(*(getattr(self, of.name) + getattr(other, of.name) for of in fields(self)))


NOTHING_SEEN = RoundProgress(sessions=0, steps=0, tokens=0, received_bytes=0, sent_bytes=0)


def gradient_codec(codec: str, codec_backward: str) -> str:
    """What gradients cross the wire by; `same` as int4-delta is the codec that it begins with."""
    if codec_backward != "same":
        return codec_backward
    return "int8" if codec == DELTA_CODEC else codec
