"""How far two clocks may be apart."""

from __future__ import annotations

from trunkline.finding import DoubtfulError, NotReadyError

DOUBTFUL_SKEW_S = 2.0


def judge_skew(whose: str, skew_s: float, error_s: float, refused_s: float) -> str:
    """What is told of a clock that is `skew_s` ahead, right to `error_s`.

    Raises NotReadyError where it is surely `refused_s` or more off, DoubtfulError from DOUBTFUL_SKEW_S on.
    """
    way = "ahead of" if skew_s >= 0 else "behind"
    told = f"{whose} is {abs(skew_s):.3f} s {way} this machine's, right to {error_s:.3f} s"
    surely_s = max(0.0, abs(skew_s) - error_s)
    fix = "let both machines keep time by NTP: `timedatectl set-ntp true`"
    if surely_s >= refused_s:
        raise NotReadyError(told, fix)
    if surely_s >= DOUBTFUL_SKEW_S:
        raise DoubtfulError(told, fix)
    return told
