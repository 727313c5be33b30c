"""The attacks at a released adapter: whether a row was among those that it was trained on.

The membership attack scores a row by its loss (Yeom et al., "Privacy Risk in Machine Learning", CSF 2018), once as it
is and once less the base model's, which tells hard rows from unseen ones. The guesser knows no adapter: it cannot tell
members from others of the same source, so that its AUC is a half and it catches as many members as it accuses others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from clients.audits.adapter_training import AdapterTrainer, Entropy, released_model, row_losses, whole_model
from clients.audits.canaries import UNSEEN, draw_canaries, insert
from clients.audits.findings import CONTROL, Attack, Finding
from clients.data import TokenRow
from contract.architecture import read_config
from contract.config import RunConfig
from privacy.audits.intervals import Interval
from privacy.audits.scoring import auc, caught_at, guessed_exposure, mean_exposure

Tell = Callable[[str], None]
Floats = npt.NDArray[np.float64]

_FALSE_ALARMS = (0.01, 0.001)
_CONTROL_ROWS, _CONTROL_TIMES = 24, 4
_LEAST_AUC = 0.9
"""What a control's AUC must be."""
_GUESSED_AUC = 0.5


@dataclass(frozen=True, slots=True)
class MemberRows:
    """Rows of one source, some of which are trained on; which of them was drawn at random."""

    members: Sequence[TokenRow]
    others: Sequence[TokenRow]


class AdapterBench:
    """Trains one adapter a mode for both attacks: on the members, with canaries among them."""

    def __init__(
        self, model_dir: str | Path, config: RunConfig, rows: MemberRows, seed: int, tell: Tell, entropy: Entropy
    ) -> None:
        self._model_dir, self._config, self._rows = model_dir, config, rows
        self._seed, self._tell, self._entropy = seed, tell, entropy
        vocabulary = read_config(model_dir).vocab_size
        self._canaries, self._unseen = draw_canaries(vocabulary, config.max_length, seed)

    def run(self, mode: str, config: RunConfig, attacks: Collection[Attack]) -> list[Finding]:
        """An adapter trained as in a run by `config`, each canary being one row of it."""
        self._tell(f"{mode}: training an adapter on {len(self._rows.members)} rows")
        inserted = self._canaries if "canaries" in attacks else []
        rows = insert(self._rows.members, inserted, 1, self._seed)
        model = AdapterTrainer(self._model_dir, config, self._entropy).as_in_a_run(rows)
        return self._attack(mode, model, self._rows.members, attacks)

    def control(self, attacks: Collection[Attack]) -> list[Finding]:
        """An adapter that knows a few rows by heart, and each canary from four."""
        members = self._rows.members[:_CONTROL_ROWS]
        self._tell(f"{CONTROL}: overfitting an adapter to {len(members)} rows")
        inserted = self._canaries if "canaries" in attacks else []
        rows = insert(members if "membership" in attacks else [], inserted, _CONTROL_TIMES, self._seed)
        plain = RunConfig.from_flower({**self._config.to_flower(), "dp": "off", "wire": "off"})
        model = AdapterTrainer(self._model_dir, plain, self._entropy).overfitted(rows)
        return self._attack(CONTROL, model, members, attacks)

    def released(self, mode: str, adapter_dir: str | Path) -> list[Finding]:
        """The membership attack at an adapter that was trained elsewhere."""
        model = released_model(self._model_dir, adapter_dir, self._config)
        return self._membership(mode, model, self._rows.members)

    def _attack(
        self, mode: str, model: torch.nn.Module, members: Sequence[TokenRow], attacks: Collection[Attack]
    ) -> list[Finding]:
        found: list[Finding] = []
        if "membership" in attacks:
            found += self._membership(mode, model, members)
        if "canaries" in attacks:
            found += self._exposure(mode, model)
        return found

    def _membership(self, mode: str, model: torch.nn.Module, members: Sequence[TokenRow]) -> list[Finding]:
        inside = -np.asarray(row_losses(model, members))
        outside = -np.asarray(row_losses(model, self._rows.others))
        base_inside, base_outside = self._base[0][: len(members)], self._base[1]
        scored = {
            "loss": (inside, outside),
            "loss less the base model's": (inside + base_inside, outside + base_outside),
        }
        return [
            finding
            for variant, scores in scored.items()
            for finding in self._told_apart("membership", variant, mode, scores, "rows trained on")
        ]

    @cached_property
    def _base(self) -> tuple[Floats, Floats]:
        model = whole_model(self._model_dir, self._config)
        return (np.asarray(row_losses(model, self._rows.members)), np.asarray(row_losses(model, self._rows.others)))

    def _told_apart(
        self,
        attack: Attack,
        variant: str,
        mode: str,
        scores: tuple[Floats, Floats],
        unit: str,
    ) -> list[Finding]:
        inside, outside = scores
        unit = f"{unit}, against {len(outside)} others"
        measured = [("AUC", auc(inside, outside, self._seed), _GUESSED_AUC)]
        measured += [
            (f"found at {share:.1%} false alarms", caught_at(inside, outside, share, self._seed), share)
            for share in _FALSE_ALARMS
            if len(outside) * share >= 1
        ]
        return [
            Finding(
                attack=attack,
                variant=variant,
                mode=mode,
                measure=measure,
                value=value,
                guesser="a coin",
                guessed=guessed,
                above=_less(value, guessed),
                trials=len(inside),
                unit=unit,
                least=_LEAST_AUC if mode == CONTROL and measure == "AUC" else None,
            )
            for measure, value, guessed in measured
        ]

    def _exposure(self, mode: str, model: torch.nn.Module) -> list[Finding]:
        inside, outside = (-np.asarray(row_losses(model, rows)) for rows in (self._canaries, self._unseen))
        found = self._told_apart("canaries", "loss", mode, (inside, outside), "canaries")
        bits, guessed = mean_exposure(inside, outside, self._seed), guessed_exposure(UNSEEN)
        unit = f"canaries, against {UNSEEN} others"
        measure = "mean exposure, bits"
        return [
            found[0],
            Finding(
                "canaries", "loss", mode, measure, bits, "a coin", guessed, _less(bits, guessed), len(inside), unit
            ),
        ]


def _less(value: Interval, guessed: float) -> Interval:
    return Interval(value.value - guessed, value.lower - guessed, value.upper - guessed)
