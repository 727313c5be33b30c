"""Attacks on a trunk that takes callers by certificate and sessions by ticket alone: none of them may be let in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contract import trunk_pb2 as pb
from contract.errors import AccessError, TicketError
from contract.ticket import renewed, signed_ticket
from contract.wire import ERROR_KEY, SESSION_METHOD
from tests.contract.ticket_cases import RENEWAL_KEY, SIGNER
from tests.hostile.attacks import Attack
from tests.hostile.caller import OPTIONS, ending
from tests.hostile.rights import presented, ticket_for
from tests.pki import Pki

_AT_ONCE = 8
_ROUND = pb.RoundId(run="impostor", round=1, attempt=1)


@dataclass
class Impostor:
    """A client with a certificate of its own, and a ticket that is none of its own, or none any more."""

    attack: Attack
    stranger: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def hello(self) -> pb.Hello:
        """Without a ticket."""
        return self.attack.target.hello(client_id="impostor", round=_ROUND)

    def rightful(self, challenge: bytes) -> pb.Hello:
        """By a ticket of its own, as good as an honest client's."""
        return presented(self.hello(), signed_ticket(ticket_for(self.hello()), SIGNER), challenge)

    def forged(self, challenge: bytes) -> pb.Hello:
        good = signed_ticket(ticket_for(self.hello()), SIGNER)
        place = good.index(b'"max_steps":') + len(b'"max_steps":')
        digit = b"1" if good[place : place + 1] != b"1" else b"2"
        return presented(self.hello(), good[:place] + digit + good[place + 1 :], challenge)

    def by_a_stranger(self, challenge: bytes) -> pb.Hello:
        signer = self.stranger.public_key().public_bytes_raw()
        return presented(self.hello(), signed_ticket(ticket_for(self.hello(), signer=signer), self.stranger), challenge)

    def expired(self, challenge: bytes) -> pb.Hello:
        ticket = ticket_for(self.hello(), issued_at=int(time.time()) - 3600)
        return presented(self.hello(), signed_ticket(ticket, SIGNER), challenge)

    def too_early(self, challenge: bytes) -> pb.Hello:
        ticket = ticket_for(self.hello(), issued_at=int(time.time()) + 3600)
        return presented(self.hello(), signed_ticket(ticket, SIGNER), challenge)

    def of_another(self, challenge: bytes) -> pb.Hello:
        """A ticket that was stolen, without its holder's key."""
        return presented(self.hello(), signed_ticket(ticket_for(self.hello()), SIGNER), challenge, self.stranger)

    def for_another(self, challenge: bytes) -> pb.Hello:
        return presented(self.hello(), signed_ticket(ticket_for(self.hello(), client_id="ada"), SIGNER), challenge)

    def for_another_round(self, challenge: bytes) -> pb.Hello:
        return presented(self.hello(), signed_ticket(ticket_for(self.hello(), round=2), SIGNER), challenge)

    def for_another_certificate(self, challenge: bytes) -> pb.Hello:
        ticket = ticket_for(self.hello(), certificate_key_sha256="0" * 64)
        return presented(self.hello(), signed_ticket(ticket, SIGNER), challenge)

    def renewed_elsewhere(self, challenge: bytes) -> pb.Hello:
        return presented(self.hello(), renewed(ticket_for(self.hello()), RENEWAL_KEY), challenge)

    def with_a_made_up_challenge(self, challenge: bytes) -> pb.Hello:
        """One that no trunk made since it started."""
        changed = bytes(len(challenge) - 1) + bytes([challenge[-1] ^ 1])
        return presented(self.hello(), signed_ticket(ticket_for(self.hello()), SIGNER), changed)

    def without(self, challenge: bytes) -> pb.Hello:
        return self.hello()

    def of_noise(self, challenge: bytes) -> pb.Hello:
        draw = self.attack.draw
        return presented(self.hello(), draw.randbytes(draw.randrange(8192)), challenge)

    @property
    def ways(self) -> tuple[Callable[[bytes], pb.Hello], ...]:
        return (
            *(self.forged, self.by_a_stranger, self.expired, self.too_early, self.of_another, self.for_another),
            *(self.for_another_round, self.for_another_certificate, self.renewed_elsewhere),
            *(self.with_a_made_up_challenge, self.without, self.of_noise),
        )


async def tickets(attack: Attack) -> None:
    """Hellos by tickets that do not hold, by a client of the trunk's own CA; and a good one, said again."""
    impostor, pki = Impostor(attack), Pki(Path(attack.target.keys))
    channels = [_channel(attack, pki.unchecked("south")) for _ in range(2)]

    async def present(number: int) -> None:
        channel = channels[number % len(channels)]
        challenge = (await _describe(channel)).challenge
        if number == 0:
            await _replay(attack, channel, impostor.rightful(challenge))
            return
        way = attack.draw.choice(impostor.ways)
        await _refused(attack, channel, way(challenge), way.__name__)

    await attack.all(present, _AT_ONCE)
    for channel in channels:
        await channel.close()


async def certificates(attack: Attack) -> None:
    """Callers without a certificate, with one that is not to be taken, and with one of another role."""
    pki = Pki(Path(attack.target.keys))
    strangers = pki.refused(pki.folder.parent)
    roles = {name: _channel(attack, pki.unchecked(name)) for name in ("south", "orchestrator", "operator")}

    async def knock(what: str) -> None:
        channel = _channel(attack, strangers[what])
        try:
            await _describe(channel)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                attack.outcomes.faults.append(f"a caller with {what}: {error.code().name}: {error.details()}")
            raise
        finally:
            await channel.close()
        attack.outcomes.faults.append(f"a caller with {what} was let in")

    async def overreach(number: int) -> None:
        name = attack.draw.choice(tuple(roles))
        if name == "south" or number % 2:
            method = attack.draw.choice(_NOT_FOR[name])
            await _not_allowed(attack, roles[name].unary_unary(method)(b"", timeout=60), f"{name} called {method}")
            return
        stream = roles[name].stream_stream(SESSION_METHOD)(timeout=60)
        await _not_allowed(attack, stream.read(), f"{name} opened a session")

    async def either(number: int) -> None:
        await (knock(attack.draw.choice(tuple(strangers))) if number < 2 else overreach(number))

    await attack.all(either, _AT_ONCE)
    for channel in roles.values():
        await channel.close()


_TRUNK, _ADMIN = "/trunkline.v1.Trunk/", "/trunkline.v1.TrunkAdmin/"
_ORCHESTRATORS = ("CommitRound", "Progress", "EndBefore")
_NOT_FOR = {
    "south": tuple(f"{_TRUNK}{name}" for name in _ORCHESTRATORS) + (f"{_ADMIN}Sessions", f"{_ADMIN}Drain"),
    "orchestrator": (f"{_ADMIN}Sessions", f"{_ADMIN}Drain"),
    "operator": tuple(f"{_TRUNK}{name}" for name in _ORCHESTRATORS),
}


def _channel(attack: Attack, credentials: grpc.ChannelCredentials | None) -> Any:
    if credentials is None:
        return grpc.aio.insecure_channel(attack.target.address, OPTIONS)
    return grpc.aio.secure_channel(attack.target.address, credentials, OPTIONS)


async def _describe(channel: Any) -> pb.TrunkDescription:
    answer = await channel.unary_unary(f"{_TRUNK}Describe")(b"", timeout=60)
    return pb.TrunkDescription.FromString(answer)


async def _opened(channel: Any, hello: pb.Hello) -> Any:
    """A session that the trunk welcomed. Raises grpc.aio.AioRpcError as the trunk ended it."""
    stream = channel.stream_stream(SESSION_METHOD)(timeout=60)
    await stream.write(pb.ClientFrame(hello=hello).SerializeToString())
    if await stream.read() is grpc.aio.EOF:
        raise await ending(stream)
    return stream


async def _refused(attack: Attack, channel: Any, hello: pb.Hello, what: str) -> None:
    """Raises how the trunk refused such a hello; another end than TicketError is a fault."""
    try:
        stream = await _opened(channel, hello)
    except grpc.aio.AioRpcError as error:
        _require(attack, error, TicketError, what)
        raise
    stream.cancel()
    attack.outcomes.faults.append(f"a session was opened by a ticket {what}")


async def _replay(attack: Attack, channel: Any, hello: pb.Hello) -> None:
    """A good hello opens one session; the same bytes open none, while it lasts and after it."""
    stream = await _opened(channel, hello)
    await attack.outcomes.of(_refused(attack, channel, hello, "said again"), "a replay")
    stream.cancel()
    await _refused(attack, channel, hello, "said again afterwards")


async def _not_allowed(attack: Attack, call: Any, what: str) -> None:
    """Raises how the trunk refused the call; another end than AccessError is a fault."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        _require(attack, error, AccessError, what)
        raise
    attack.outcomes.faults.append(f"{what}, and was answered")


def _require(attack: Attack, error: grpc.aio.AioRpcError, wanted: type[Exception], what: str) -> None:
    named = dict(error.trailing_metadata() or ()).get(ERROR_KEY, error.code().name)
    if named != wanted.__name__:
        attack.outcomes.faults.append(f"{what}: {named}: {error.details()}")


LOCKED = {"tickets": tickets, "certificates": certificates}
