"""The seam through which every value passes on its way from a client's model to the wire.

A mechanism maps what would leave to (what leaves, what that costs). Nothing but a mechanism makes noise. This package
knows no torch: a mechanism takes whatever carries the numbers and gives the same kind back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class PrivacyEvent:
    """One release that has a price: the mechanism and its parameters, as exact text that an accountant can replay."""

    mechanism: str
    parameters: Mapping[str, str]


class WireMechanism(Protocol):
    """What stands between a client's head or tail and the codec, on hidden states and on their gradients alike."""

    @property
    def name(self) -> str:
        """As in the run's configuration and records."""

    @property
    def summary(self) -> str:
        """One plain sentence on what the trunk's operator can learn; shown with every run."""

    def apply(self, value: Value) -> tuple[Value, PrivacyEvent | None]:
        """What may leave in place of `value`, same shape and type, and the event to be charged before it leaves.

        An event of None says that the release is not priced.
        """


class Off:
    """Lets everything pass as it is."""

    name = "off"
    summary = "wire privacy is off: the server can read the text"

    def apply(self, value: Value) -> tuple[Value, PrivacyEvent | None]:
        return value, None
