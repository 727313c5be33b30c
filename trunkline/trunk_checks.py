"""Whether a trunk elsewhere and this machine go together: versions, and clocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contract.errors import TrunklineError
from contract.ticket import LEEWAY_S
from contract.tls import TlsFiles
from contract.version import VERSION
from contract.wire import PROTOCOL, library_versions
from trunkline.clocks import judge_skew
from trunkline.finding import DoubtfulError, NotReadyError, SkippedError

if TYPE_CHECKING:
    from server_trunk.status import TrunkStatus


def check_trunk_version(address: str, tls: TlsFiles | None = None) -> str:
    """The trunk speaks this installation's protocol, by libraries that give the same results."""
    told = _asked(address, tls)
    fix = "install the same trunkline, and its packages, on both sides"
    if told.protocol != PROTOCOL:
        raise NotReadyError(f"{address} speaks protocol {told.protocol}, this installation {PROTOCOL}", fix)
    ours = library_versions()
    theirs = {"torch": told.torch, "transformers": told.transformers, "peft": told.peft}
    differ = [
        f"{name} {theirs[name]} there, {here} here"
        for name in theirs
        if (here := ours[f"{name}_version"]) != theirs[name]
    ]
    if differ:
        raise NotReadyError(f"{address} has {'; '.join(differ)}: it refuses clients of this machine", fix)
    if told.version != VERSION:
        raise DoubtfulError(f"{address} is trunkline {told.version or 'of an earlier version'}, here is {VERSION}", fix)
    return f"{address} is trunkline {told.version}, as here; protocol {told.protocol}"


def check_trunk_clock(address: str, tls: TlsFiles | None = None) -> str:
    """The trunk's clock agrees with this machine's, as far as a round trip can tell."""
    told = _asked(address, tls)
    if told.clock_skew_s is None:
        raise SkippedError(f"{address} does not tell its time: it is of an earlier version")
    return judge_skew(f"the clock of {address}", told.clock_skew_s, told.clock_error_s, LEEWAY_S)


def _asked(address: str, tls: TlsFiles | None) -> TrunkStatus:
    from server_trunk.status import ask

    try:
        return ask(address, tls)
    except TrunklineError as error:
        raise SkippedError(f"not asked: {error}") from None
