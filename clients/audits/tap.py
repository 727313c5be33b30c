"""What a trunk gets of rows: head, wire mechanism and codec as in a run, then the trunk's answer, loss and gradient.

The trunk runs in this process and nothing is sent. The site's adapter is left out: a fresh one changes nothing, and an
attacker who knows the head exactly is the stronger one. So are buckets of lengths: the attacker is told how long each
row is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clients.data import IGNORED, TokenRow, collate
from clients.link import AUTO, AUTO_CODECS, DELTA_START
from clients.wire_privacy import wire_mechanism
from contract import codec
from contract.architecture import decoder_layers
from contract.config import RunConfig
from contract.partition import TrunkPart, attach_remote, load_part
from contract.records import DELTA_CODEC
from privacy.wire import Off, WireMechanism

Singles = npt.NDArray[np.float32]
MechanismOf = Callable[[RunConfig], WireMechanism]

_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class Clear:
    """A row's hidden states at the head cut and gradient at the tail cut before the wire mechanism, as means too."""

    hidden_TD: Singles
    gradient_TD: Singles


@dataclass(frozen=True, slots=True)
class Crossed:
    """One row, and what the trunk was sent of it, as the mean over all passes: noise averages out for an attacker.

    `hidden_TD` came through the head cut, `gradient_TD` through the tail cut. `answered_TD` is what the trunk itself
    made of the hidden states, and `expected_TD` the output embedding that the public tail expects next, given that: the
    trunk can compute both. The gradient is that of the row's mean loss over `targets` tokens. `clear` is there only for
    rows that an attacker made up: its own simulation.
    """

    row: TokenRow
    hidden_TD: Singles
    gradient_TD: Singles
    answered_TD: Singles
    expected_TD: Singles
    clear: Clear | None

    @property
    def targets(self) -> int:
        return self.row.targets


class Tap:
    """A client and a trunk in one process, with an ear on the wire between them."""

    def __init__(self, model_dir: str | Path, config: RunConfig, mechanism_of: MechanismOf = wire_mechanism) -> None:
        """Loads both parts of a whole checkpoint. Raises ConfigError, ModelError and UnsupportedModelError."""
        self._config, self._mechanism_of = config, mechanism_of
        client, trunk_model = (
            load_part(model_dir, config.cut, side, dtype=config.dtype, attn_implementation=config.attn_implementation)
            for side in ("client", "trunk")
        )
        self._client = client
        trunk = TrunkPart(trunk_model, config.cut)
        self._wire = _Loopback(trunk)
        attach_remote(self._client, self._wire)
        self._backbone = decoder_layers(self._client)[0]
        self.output_VD: Tensor = self._client.get_output_embeddings().weight.detach()
        self.input_VD: Tensor = self._client.get_input_embeddings().weight.detach()

    def with_config(self, config: RunConfig, mechanism_of: MechanismOf | None = None) -> Tap:
        """The same models with other wire settings; cut, dtype and attention must be the same."""
        other = object.__new__(Tap)
        other.__dict__.update(self.__dict__)
        other._config, other._mechanism_of = config, mechanism_of or self._mechanism_of
        return other

    def simulate(self, rows: Sequence[TokenRow], passes: int = 1) -> list[Crossed]:
        """What an attacker learns from text of its own: `cross`, and what it was before."""
        sent = self._sent(rows, passes)
        return [
            Crossed(row, hidden, gradient, answered, expected, Clear(clear_hidden, clear_gradient))
            for row, (hidden, gradient, answered, expected, clear_hidden, clear_gradient) in zip(
                rows, sent, strict=True
            )
        ]

    def cross(self, rows: Sequence[TokenRow], passes: int = 1) -> list[Crossed]:
        """Each of `rows` sent `passes` times, in the order given, as the trunk sees it.

        A pass beyond `wire-releases` belongs to a later round, with a mechanism of its own. Raises what the mechanism
        and the codec raise, NonFiniteError for one.
        """
        sent = self._sent(rows, passes)
        return [
            Crossed(row, hidden, gradient, answered, expected, None)
            for row, (hidden, gradient, answered, expected, *_) in zip(rows, sent, strict=True)
        ]

    def _sent(self, rows: Sequence[TokenRow], passes: int) -> list[list[Singles]]:
        in_a_round = self._config.wire_releases if self._config.wire == "dp" else passes
        sums: list[list[npt.NDArray[np.float64]]] = [[] for _ in rows]
        self._wire.use(self._config)
        mechanism: WireMechanism = Off()
        for number in range(passes):
            if number % in_a_round == 0:
                mechanism = self._mechanism_of(self._config)
            for places in batches_of_one_length(rows):
                for place, values in zip(places, self._pass(rows, places, mechanism), strict=True):
                    sums[place] = [*(a + b for a, b in zip(sums[place], values, strict=True))] if number else values
        return [[(total / passes).astype(np.float32) for total in totals] for totals in sums]

    def simulate_hidden(self, rows: Sequence[TokenRow], passes: int = 1) -> list[tuple[Singles, Singles]]:
        """For an attacker's own rows only what crosses the head cut, and what it was before: (sent, clear), [T, D]."""
        found: list[tuple[Singles, Singles]] = [(np.empty(0, np.float32),) * 2] * len(rows)
        self._wire.use(self._config)
        for places in batches_of_one_length(rows):
            tokens_BT = collate([rows[place] for place in places])["input_ids"]
            clear_BTD = self._wire.hidden_only(self._backbone, tokens_BT)
            sent_BTD = torch.zeros_like(clear_BTD, dtype=torch.float64)
            for _ in range(passes):
                sent_BTD += self._wire.sent_forward(clear_BTD, self._mechanism_of(self._config), places).double()
            pairs = zip((sent_BTD / passes).float().numpy(), clear_BTD.float().numpy(), strict=True)
            for place, pair in zip(places, pairs, strict=True):
                found[place] = pair
        return found

    def log_odds_of_next(self, crossed: Sequence[Crossed]) -> list[Singles]:
        """[T, V] for each row: what the public tail makes of `answered_TD`, as log probabilities of the next token."""
        found: list[Singles] = [np.empty(0, np.float32)] * len(crossed)
        rows = [one.row for one in crossed]
        for places in batches_of_one_length(rows):
            self._wire.replayed = torch.from_numpy(np.stack([crossed[place].answered_TD for place in places]))
            batch = collate([rows[place] for place in places])
            with torch.no_grad():
                logits_BTV = self._client(input_ids=torch.zeros_like(batch["input_ids"])).logits
            self._wire.replayed = None
            for place, odds_TV in zip(places, logits_BTV.float().log_softmax(-1).numpy(), strict=True):
                found[place] = odds_TV
        return found

    def _pass(
        self, rows: Sequence[TokenRow], places: Sequence[int], mechanism: WireMechanism
    ) -> list[list[npt.NDArray[np.float64]]]:
        """[hidden, gradient, answered, expected, clear hidden, clear gradient] of the rows at `places`, float64."""
        batch = collate([rows[place] for place in places])
        self._wire.mechanism, self._wire.rows = mechanism, places
        logits_BTV = self._client(input_ids=batch["input_ids"]).logits.float()
        _sum_of_mean_losses(logits_BTV, batch["labels"]).backward()  # type: ignore[no-untyped-call]
        clear_BTD, gradient_BTD = self._wire.gradients()
        with torch.no_grad():
            expected_BTD = logits_BTV.softmax(-1) @ self.output_VD.float()
        wire = self._wire
        parts = (wire.hidden_BTD, gradient_BTD, wire.answered_BTD, expected_BTD, wire.clear_BTD, clear_BTD)
        arrays = [part.detach().double().numpy() for part in parts]
        return [[array[index] for array in arrays] for index in range(len(places))]


class _Loopback(nn.Module):
    """Stands for the remote layers: what would leave passes mechanism and codec, as in `clients.remote_trunk`."""

    def __init__(self, trunk: TrunkPart) -> None:
        super().__init__()
        self._trunk = trunk
        self._codec = self._gradient_codec = "identity"
        self._casts = False
        self.mechanism: WireMechanism = Off()
        self.rows: Sequence[int] = ()
        self.replayed: Tensor | None = None
        self._head_only = False
        self.clear_BTD = self.hidden_BTD = self.answered_BTD = torch.empty(0)

    def use(self, config: RunConfig) -> None:
        """Cross by the codecs of `config`: the least lossy that `auto` may pick, and what int4-delta begins with.

        Under `trunk-autocast="auto"` the trunk does not cast, for the same reason.
        """
        most_told = {AUTO: AUTO_CODECS[0], DELTA_CODEC: DELTA_START}
        self._codec = most_told.get(config.codec, config.codec)
        self._gradient_codec = most_told.get(config.gradient_codec, config.gradient_codec)
        self._casts = config.trunk_autocast == "bfloat16"

    def forward(self, hidden_BTD: Tensor, attention_mask_BT: Tensor | None, position_ids: Tensor | None) -> Tensor:
        if self.replayed is not None:
            return self.replayed.to(hidden_BTD.dtype)
        self.clear_BTD = hidden_BTD.detach()
        if self._head_only:
            return hidden_BTD
        self.hidden_BTD = self.sent_forward(hidden_BTD, self.mechanism, self.rows)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._casts):
            answered_BTD = self._trunk(self.hidden_BTD, attention_mask_BT, position_ids)
        self.answered_BTD = answered_BTD.detach().to(hidden_BTD.dtype).requires_grad_()
        return self.answered_BTD

    def hidden_only(self, backbone: nn.Module, tokens_BT: Tensor) -> Tensor:
        """The clear hidden states at the head cut, without the trunk's work."""
        self._head_only = True
        try:
            with torch.no_grad():
                backbone(input_ids=tokens_BT, use_cache=False)
        finally:
            self._head_only = False
        return self.clear_BTD

    def sent_forward(self, hidden_BTD: Tensor, mechanism: WireMechanism, rows: Sequence[int]) -> Tensor:
        return self._cross(hidden_BTD, mechanism.forward, rows, self._codec)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The gradient at the tail cut of the last forward, in clear and as the trunk gets it."""
        grad_BTD = self.answered_BTD.grad
        clear_BTD = torch.zeros_like(self.answered_BTD) if grad_BTD is None else grad_BTD
        return clear_BTD, self._cross(clear_BTD, self.mechanism.backward, self.rows, self._gradient_codec)

    def _cross(
        self,
        value_BTD: Tensor,
        mechanism: Callable[[Singles, Sequence[int]], Singles],
        rows: Sequence[int],
        codec_name: str,
    ) -> Tensor:
        value_BTD = value_BTD.detach()
        released = torch.from_numpy(mechanism(value_BTD.float().numpy(), rows)).to(value_BTD.dtype)
        codec.require_finite(released, "what crosses the wire")
        header, data = codec.encode(released, codec_name)
        return codec.decode(header, memoryview(bytearray(data)))


def batches_of_one_length(rows: Sequence[TokenRow], tokens_at_once: int = _TOKENS_AT_ONCE) -> Iterator[list[int]]:
    """Places in `rows` of rows that are equally long, up to `tokens_at_once` tokens together: nothing is padded."""
    by_length: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_length.setdefault(len(row.tokens_T), []).append(place)
    for length, places in sorted(by_length.items()):
        together = max(1, tokens_at_once // length)
        for start in range(0, len(places), together):
            yield places[start : start + together]


def passes_of(config: RunConfig, rows: int) -> int:
    """How often the trunk is sent each of a site's `rows` rows in a whole run, at most.

    With `wire` off once tells all. Under `dp` it is what the budget is charged for, `wire-releases` a round.
    """
    if config.wire == "off":
        return 1
    if config.wire == "dp":
        return config.num_rounds * config.wire_releases
    if not config.local_steps:
        return config.num_rounds * config.local_epochs
    sent = config.local_steps * config.gradient_accumulation_steps * config.per_device_train_batch_size
    return config.num_rounds * math.ceil(sent / rows)


def _sum_of_mean_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Each row's own mean loss: no other row's length scales its gradient."""
    targets_BT = labels_BT[:, 1:]
    losses_BT = nn.functional.cross_entropy(
        logits_BTV[:, :-1].transpose(1, 2), targets_BT, reduction="none", ignore_index=IGNORED
    )
    return (losses_BT.sum(dim=1) / (targets_BT != IGNORED).sum(dim=1)).sum()
