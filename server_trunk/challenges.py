"""What a session's proof must sign, so that no proof is of use twice: nothing is kept of it until one has verified."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from contract.errors import CapacityError, TicketError

GOOD_FOR_S = 60.0
MOST_USED = 1 << 16
"""As many as may be used in GOOD_FOR_S; one takes about 200 bytes here."""

_TIME_BYTES, _CHANCE_BYTES, _MAC_BYTES = 8, 16, 32


class Challenges:
    """Makes challenges by a key of this process: a time, chance, and a MAC over both. Those that were used are kept.

    Not safe to use from several threads; the servicer's event loop owns it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that never go back."""
        self._clock = clock
        self._key = secrets.token_bytes(_MAC_BYTES)
        self._used: OrderedDict[bytes, float] = OrderedDict()  # by when they were made known as used

    def new(self) -> bytes:
        """A challenge that is good for GOOD_FOR_S seconds, once."""
        made = int(1000 * self._clock()).to_bytes(_TIME_BYTES, "big") + secrets.token_bytes(_CHANCE_BYTES)
        return made + self._mac(made).finalize()

    def require_fresh(self, challenge: bytes) -> None:
        """Raise TicketError unless this process made it, less than GOOD_FOR_S ago, and it was not used."""
        made, mac = challenge[:-_MAC_BYTES], challenge[-_MAC_BYTES:]
        if len(challenge) != _TIME_BYTES + _CHANCE_BYTES + _MAC_BYTES:
            raise TicketError(f"the challenge is of {len(challenge)} bytes; it must be one of this trunk's")
        try:
            self._mac(made).verify(mac)
        except InvalidSignature:
            raise TicketError("the challenge is not one that this trunk made since it started: ask it anew") from None
        age_s = self._clock() - int.from_bytes(made[:_TIME_BYTES], "big") / 1000
        if age_s > GOOD_FOR_S:
            raise TicketError(f"the challenge is {age_s:.0f} s old, and good for {GOOD_FOR_S:g} s: ask it anew")
        if challenge in self._used:
            raise TicketError("the challenge was used by another session already: each session needs its own")

    def use(self, challenge: bytes) -> None:
        """Note that a session with a valid proof used it. Raises CapacityError where too many were used just now."""
        oldest = self._clock() - GOOD_FOR_S - 1.0
        while self._used and next(iter(self._used.values())) < oldest:
            self._used.popitem(last=False)
        if len(self._used) >= MOST_USED:
            raise CapacityError(f"{len(self._used)} sessions began within a minute, which is this trunk's limit")
        self._used[challenge] = self._clock()

    def _mac(self, made: bytes) -> HMAC:
        mac = HMAC(self._key, SHA256())
        mac.update(made)
        return mac
