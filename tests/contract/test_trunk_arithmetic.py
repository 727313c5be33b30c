"""What a session may ask of its trunk's arithmetic, and what the trunk may answer."""

from __future__ import annotations

import pytest

from contract.errors import AgreementError, ConfigError
from contract.trunk_arithmetic import TRUNK_AUTOCAST, TrunkArithmetic


def test_an_autocast_that_no_trunk_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="trunk-autocast is 'float16'; it must be off or bfloat16 or auto"):
        TrunkArithmetic("float16")


@pytest.mark.parametrize(
    ("asked", "answered", "told"),
    [
        ("off", "", ""),
        ("bfloat16", "bfloat16", "the trunk at here:1 computes in bfloat16"),
        ("auto", "bfloat16", "the trunk at here:1 computes in bfloat16"),
        ("auto", "", "the trunk at here:1 computes in the type of its weights"),
    ],
)
def test_an_answer_to_what_was_asked_is_told_in_words(asked: str, answered: str, told: str) -> None:
    found = TrunkArithmetic(asked).told(answered, "here:1")
    assert found.startswith(told)
    assert bool(found) == bool(told)


@pytest.mark.parametrize(
    ("asked", "answered"), [("off", "bfloat16"), ("bfloat16", ""), ("bfloat16", "float16"), ("auto", "float16")]
)
def test_an_answer_that_was_not_asked_for_is_refused(asked: str, answered: str) -> None:
    with pytest.raises(AgreementError, match=f"^trunk-autocast is {asked}, but the trunk at here:1 computes in "):
        TrunkArithmetic(asked).told(answered, "here:1")


def test_only_a_deterministic_session_refuses_what_goes_by_the_clock_or_by_others() -> None:
    for asked in TRUNK_AUTOCAST:
        TrunkArithmetic(asked).check_beside("auto", "auto")
    for exact in ("off", "bfloat16"):
        TrunkArithmetic(exact, deterministic=True).check_beside("int8", "bf16")
