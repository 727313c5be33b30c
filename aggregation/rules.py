"""Averaging rules for LoRA: which factor the clients train, and average, in which round."""

from __future__ import annotations

from dataclasses import dataclass

from contract.errors import ConfigError
from contract.records import Factor


@dataclass(frozen=True, slots=True)
class Rule:
    """One averaging rule; `factors` is repeated over the rounds, `label` says in one line what it does."""

    name: str
    factors: tuple[Factor, ...]
    biased: bool
    label: str


# mean(B_i) A is the mean of B_i A; mean(B_i) mean(A_i) is not the mean of B_i A_i. Only a rule that holds one factor
# equal everywhere is exact.
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("ffa", ("B",), biased=False, label="A stays as drawn, B is trained and averaged: exact"),
        Rule("rolora", ("B", "A"), biased=False, label="B and A take turns, B first: exact"),
        Rule("fedavg", ("AB",), biased=True, label="A and B are averaged apart: biased"),
    )
}


def rule_named(name: str) -> Rule:
    """The rule called `name`; raises ConfigError naming those there are."""
    if name not in RULES:
        raise ConfigError(f"aggregation is {name!r}; it must be one of {', '.join(sorted(RULES))}")
    return RULES[name]


def trainable_factor(rule: str, round_number: int) -> Factor:
    """The factor that round `round_number` (the first is 1) trains under the rule called `rule`."""
    if round_number < 1:
        raise ConfigError(f"the round number is {round_number}; the first round is 1")
    factors = rule_named(rule).factors
    return factors[(round_number - 1) % len(factors)]
