import numpy as np
import pytest

from aggregation.rules import RULES, rule_named, trainable_factor
from contract.errors import ConfigError


def test_ffa_trains_b_only() -> None:
    assert [trainable_factor("ffa", number) for number in range(1, 5)] == ["B", "B", "B", "B"]


def test_rolora_takes_turns_and_starts_with_b() -> None:
    assert [trainable_factor("rolora", number) for number in range(1, 5)] == ["B", "A", "B", "A"]


def test_fedavg_trains_both() -> None:
    assert [trainable_factor("fedavg", number) for number in range(1, 3)] == ["AB", "AB"]


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_is_labelled_biased_exactly_when_averaging_its_factors_is_not_averaging_the_products(name: str) -> None:
    generator = np.random.default_rng(0)
    shared = {"A": generator.normal(size=(2, 5)), "B": generator.normal(size=(4, 2))}
    for number in (1, 2):
        trained = trainable_factor(name, number)
        clients = [
            {f: generator.normal(size=v.shape) if f in trained else v for f, v in shared.items()} for _ in range(3)
        ]
        averaged = {f: np.mean([client[f] for client in clients], axis=0) for f in shared}
        exact = np.mean([client["B"] @ client["A"] for client in clients], axis=0)
        assert np.allclose(averaged["B"] @ averaged["A"], exact) is not rule_named(name).biased


def test_labels_say_so() -> None:
    assert [("biased" in rule.label, "exact" in rule.label) for rule in RULES.values()] == [
        (rule.biased, not rule.biased) for rule in RULES.values()
    ]


def test_an_unknown_rule_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="aggregation is 'fedprox'; it must be one of fedavg, ffa, rolora"):
        trainable_factor("fedprox", 1)


def test_round_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="the round number is 0"):
        trainable_factor("ffa", 0)
