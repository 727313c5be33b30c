"""A site's right to the sessions of one round, at trunks that take sessions by ticket."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contract.errors import FrameError
from contract.ticket import MAX_TICKET_BYTES, prove
from contract.trunk_pb2 import Hello


@dataclass(slots=True)
class Admission:
    """The ticket that came with the round's order, and the key that it was issued for.

    A trunk that admitted this site once renews the ticket for itself: that one is presented to it from then on, since
    the ticket's own time may be over when a session is lost.
    """

    ticket: bytes
    identity: Ed25519PrivateKey = field(repr=False)
    _renewals: dict[str, bytes] = field(default_factory=dict)

    def presented(self, hello: Hello, address: str, challenge: bytes) -> Hello:
        """`hello` as the trunk at `address` wants it, with a proof for its `challenge`; as it is where it made none."""
        if not challenge:
            return hello
        presented = self._renewals.get(address, self.ticket)
        admitted = Hello()
        admitted.CopyFrom(hello)
        admitted.ticket, admitted.challenge = presented, challenge
        admitted.proof = prove(self.identity, presented, challenge)
        return admitted

    def keep(self, address: str, renewal: bytes) -> None:
        """Present `renewal` to the trunk at `address` from now on; nothing is kept of an empty one.

        Raises FrameError for one that is longer than any ticket.
        """
        if len(renewal) > MAX_TICKET_BYTES:
            raise FrameError(f"the trunk at {address} gave a renewal of {len(renewal)} bytes; none is so long")
        if renewal:
            self._renewals[address] = renewal
