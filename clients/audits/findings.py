"""What an audit found, as it is reported. Shares lie between 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from contract.config import ConfigValue
from contract.privacy_records import Adversary
from privacy.audits.intervals import Interval

Attack = Literal["enumeration", "inversion", "labels", "membership", "canaries"]
ATTACKS: tuple[Attack, ...] = ("enumeration", "inversion", "labels", "membership", "canaries")
WIRE_ATTACKS: frozenset[Attack] = frozenset({"enumeration", "inversion", "labels"})
"""Those at what the trunk is sent; the others are at the released adapter."""

CONTROL = "control"


@dataclass(frozen=True, slots=True)
class Finding:
    """One attack in one mode (`CONTROL`, or as the mode is called), 95 % intervals.

    `value` is what the attack got of `measure`, over `trials` of `unit`; `guessed` what the best guesser got that knows
    the same but for the wire or the adapter; `above` the one less the other. `least` is what a control must reach, else
    the attack is broken. Values are shares, or bits where `measure` says so.
    """

    attack: Attack
    variant: str
    mode: str
    measure: str
    value: Interval
    guesser: str
    guessed: float
    above: Interval
    trials: int
    unit: str
    least: float | None = None

    @property
    def in_shares(self) -> bool:
        return "bits" not in self.measure

    @property
    def works(self) -> bool:
        """Whether a control got what it must; a finding that is no control has nothing to reach."""
        return self.least is None or self.value.value >= self.least


@dataclass(frozen=True, slots=True)
class ModeSettings:
    """One audited mode: its name, its settings where they are not the defaults, how often each row was sent.

    `epsilon` is what a whole run by those settings comes to, by adversary; `withheld` says why others have none.
    """

    name: str
    settings: Mapping[str, ConfigValue]
    passes: int
    epsilon: Mapping[Adversary, float]
    withheld: Mapping[Adversary, str]
