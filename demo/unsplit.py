"""Many clients' rounds in one process, on one whole model instead of a split one.

A split model is the whole one to the bit, so that its rounds come to the same. Each client trains by the product's own
classes, and its update goes through the product's encoding; a secure sum returns the ring sum of the encodings, which
is taken directly. Only the noise is another: its streams' keys come from a seed, so that a measurement can be
repeated, where a run's come from the operating system.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aggregation.encoding import noisy_encoding
from aggregation.graph import full_threshold
from aggregation.noisy_sum import NoisySum
from aggregation.ring import RingVector, plan
from aggregation.rules import trainable_factor
from clients.data import TokenRow, order_key
from clients.private_training import train_privately
from clients.trainer import judge, tell_nobody, train
from clients.update import encode_update
from contract.adapter import (
    adapter_parameters,
    adapter_shapes,
    add_lora,
    flatten,
    initial_adapter,
    load_adapter_,
    resolve_lora,
    run_lora,
    split_adapter,
    trainable_names,
    unflatten,
)
from contract.architecture import probe
from contract.config import RunConfig
from demo.solo import whole_model
from privacy.skellam import SkellamShare, skellam_event
from privacy.stream import SecretStream

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Update:
    """What one client's training of `tokens` tokens changed, shape (d,)."""

    change_d: Vector
    tokens: int


class UnsplitModel:
    """The whole model with one adapter, on which the clients of any number of runs train in turn.

    The runs' configs may differ in all but the model, its adapter, the cut and the averaging rule.
    """

    def __init__(self, config: RunConfig) -> None:
        spec = resolve_lora(config.model, run_lora(config))
        self._first = initial_adapter(adapter_shapes(config.model, spec), config.seed)
        self._model = add_lora(whole_model(config), spec)
        self._live = adapter_parameters(self._model)
        self._client_part = frozenset(split_adapter(self._first, probe(config.model), config.cut)[0])

    def start(self, config: RunConfig) -> Vector:
        """The values that a run by `config` trains, shape (d,), as they are before its first round."""
        return flatten(self._first, self._names(config, 1)).astype(np.float64)

    def round_updates(
        self, config: RunConfig, clients: Sequence[Sequence[TokenRow]], number: int, before_d: Vector, seed: int
    ) -> Iterator[Update]:
        """Every client's update in round `number`, from `before_d` on; `seed` is of the noise where it is example's."""
        names = self._names(config, number)
        for place, rows in enumerate(clients):
            self._load(names, before_d)
            for name, parameter in self._live.items():
                parameter.requires_grad_(name in names)
            if config.dp == "example":
                stream = _stream(seed, number, place)
                training = train_privately(self._model, rows, config, stream, tell_nobody)
            else:
                key = order_key(config.seed, "unsplit", number, str(place))
                training = train(self._model, rows, config, key)
            yield Update(flatten(self._live, names).astype(np.float64) - before_d, training.trained_tokens)

    def loss(self, config: RunConfig, adapter_d: Vector, rows: Sequence[TokenRow]) -> float:
        """Mean loss per token on `rows` with the values `adapter_d` in place of those that `config` trains."""
        self._load(self._names(config, 1), adapter_d)
        return judge(self._model, rows, config).loss

    def _names(self, config: RunConfig, number: int) -> tuple[str, ...]:
        names = trainable_names(self._first, trainable_factor(config.aggregation, number))
        if config.trunk_adapter == "trained":
            return names
        return tuple(name for name in names if name in self._client_part)

    def _load(self, names: Sequence[str], values_d: Vector) -> None:
        shapes = {name: tuple(self._live[name].shape) for name in names}
        load_adapter_(self._model, self._first | unflatten(values_d, shapes, names))


def run(
    model: UnsplitModel,
    config: RunConfig,
    clients: Sequence[Sequence[TokenRow]],
    seed: int,
    first: Sequence[Update] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Vector:
    """All of a run's rounds over `clients`, of whom none drops out: the trained values at its end, shape (d,).

    `first`: the first round's updates, where they are known already. `seed` is the noise's. `tell` gets a line a round.
    """
    values_d = model.start(config)
    for number in range(1, config.num_rounds + 1):
        updates = first if first and number == 1 else model.round_updates(config, clients, number, values_d, seed)
        mean_d = mean_update(updates, config, len(clients), seed, number)
        # The adapter is float32 wherever it is stored and sent.
        values_d = (values_d + mean_d).astype(np.float32).astype(np.float64)
        tell(f"round {number} of {config.num_rounds}")
    return values_d


def mean_update(updates: Iterable[Update], config: RunConfig, clients: int, seed: int, number: int) -> Vector:
    """What round `number` makes of all `clients`' updates, shape (d,), by way of the ring."""
    if config.dp != "client":
        fixed_point = plan(clients, config.max_weight(), config.update_clip)
        encoded = (encode_update(each.change_d, each.tokens, clients, config, None) for each in updates)
        return fixed_point.decode(_ring_sum(encoded))[0]
    noisy = noisy_encoding(config, clients, full_threshold(clients))
    return noisy.decode(_ring_sum(_noised(updates, config, noisy, seed, number)))[0]


def _noised(
    updates: Iterable[Update], config: RunConfig, noisy: NoisySum, seed: int, number: int
) -> Iterator[RingVector]:
    """The updates as clients.update encodes them, with noise of `seed`."""
    for place, update in enumerate(updates):
        event = skellam_event(config.dp_noise_multiplier, config.dp_clip, noisy.scale, update.change_d.size)
        share = SkellamShare(event, noisy.fewest, _stream(seed, number, place))
        yield noisy.encode(share.apply(update.change_d)[0])


def _ring_sum(encoded: Iterable[RingVector]) -> RingVector:
    return functools.reduce(np.add, encoded)


def _stream(seed: int, number: int, place: int) -> SecretStream:
    """The chance that client `place` has in round `number`."""
    told = f"trunkline unsplit noise {seed}/{number}/{place}"
    return SecretStream(lambda count: hashlib.shake_256(told.encode()).digest(count))
