"""How a session asks its trunk to compute: by autocast or not, and on passes of its own or shared ones.

No torch: a run's settings, a client and the trunk read the same names here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from contract.errors import AgreementError, ConfigError
from contract.records import DELTA_CODEC

TRUNK_AUTOCAST: Mapping[str, str] = {"off": "", "bfloat16": "bfloat16", "auto": "auto"}
"""What a setting calls it -> what the hello does."""
_GRANTED: Mapping[str, tuple[str, ...]] = {"off": ("",), "bfloat16": ("bfloat16",), "auto": ("", "bfloat16")}


@dataclass(frozen=True, slots=True)
class TrunkArithmetic:
    """`autocast` is a key of TRUNK_AUTOCAST, else ConfigError; `deterministic`: the same bits whoever else is there."""

    autocast: str = "off"
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.autocast not in TRUNK_AUTOCAST:
            raise ConfigError(f"trunk-autocast is {self.autocast!r}; it must be {' or '.join(TRUNK_AUTOCAST)}")

    def check_beside(self, codec: str, codec_backward: str) -> None:
        """Raise ConfigError where `deterministic` stands beside what goes by the clock, or by who else is there."""
        if not self.deterministic:
            return
        moving = "what crosses by it depends on what else goes on: name another codec"
        for key, name in (("codec", codec), ("codec-backward", codec_backward)):
            if name in ("auto", DELTA_CODEC):
                raise ConfigError(f"deterministic is true and {key} is {name}; {moving}")
        if self.autocast == "auto":
            raise ConfigError(
                "deterministic is true and trunk-autocast is auto; each start of a trunk measures anew what it gains "
                "from: name bfloat16 or off"
            )

    def told(self, autocast_dtype: str, address: str) -> str:
        """What the trunk at `address` answered, in words; empty where nothing was asked for.

        Raises AgreementError where that is not what was asked for.
        """
        if autocast_dtype not in _GRANTED[self.autocast]:
            raise AgreementError(
                f"trunk-autocast is {self.autocast}, but the trunk at {address} computes in "
                f"{autocast_dtype or 'the type of its weights'}: both sides need the same trunkline"
            )
        if self.autocast == "off":
            return ""
        if autocast_dtype:
            return f"the trunk at {address} computes in {autocast_dtype}, not as an un-split model does in float32"
        return f"the trunk at {address} computes in the type of its weights: it knows of no gain in bfloat16"


PLAIN = TrunkArithmetic()
