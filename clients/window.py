"""How many microbatches of a step to have under way at once."""

from __future__ import annotations

FIRST_SIZE = 2
_WAITED, _BUSY = 0.05, 0.01  # shares of a step: above the one a client waits, below the other it does not
_CALM_STEPS = 4
_FORGETFUL_STEPS = 32


class Window:
    """Grows while the client waits for the trunk with work in hand that only the window keeps back; else it shrinks.

    Each microbatch under way costs the trunk a graph's memory, so that no more are wanted than hide the round trip. A
    size that made the client wait is not tried again before many steps have gone without a wait.
    """

    def __init__(self) -> None:
        self.size = FIRST_SIZE
        self._too_small = 0
        self._calm = 0

    def observe(self, waited_s: float, wall_s: float, most: int) -> bool:
        """Learns from a step that took `wall_s`, of which the client lost `waited_s` to the window; its size is new?

        `most` is what the step could have had under way: the window does not grow beyond what is of use.
        """
        before = self.size
        share = waited_s / wall_s if wall_s > 0 else 0.0
        if share > _WAITED:
            self._calm = 0
            self._too_small = max(self._too_small, self.size)
            self.size = max(self.size, min(2 * self.size, most))
        elif share < _BUSY:
            self._calm += 1
            if self._calm >= (_FORGETFUL_STEPS if self.size - 1 <= self._too_small else _CALM_STEPS):
                self._calm = 0
                self.size = max(FIRST_SIZE, self.size - 1)
                self._too_small = min(self._too_small, self.size - 1)
        else:
            self._calm = 0
        return self.size != before
