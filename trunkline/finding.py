"""What a check of the doctor comes to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found: PASS, WARN, FAIL or SKIP. `fix` says what to do after a WARN or a FAIL."""

    check: str
    result: str
    detail: str
    fix: str | None = None


class NotReadyError(Exception):
    """A check failed: what was found, and its fix."""

    result = "FAIL"

    def __init__(self, detail: str, fix: str) -> None:
        super().__init__(detail)
        self.fix = fix


class DoubtfulError(NotReadyError):
    """What was found works, and may not for long or not for all."""

    result = "WARN"


class SkippedError(Exception):
    """There is nothing to check here, and why."""
