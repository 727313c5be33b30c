"""The orchestrator's side of the trunk: a description, adapters by hash, commits, progress. Every call is bounded."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar, cast

import grpc

from contract import trunk_pb2 as pb
from contract import wire
from contract.config import RunConfig
from contract.errors import (
    AgreementError,
    ConnectionFailedError,
    DeadlineError,
    FrameTooLargeError,
    IntegrityError,
    TrunklineError,
    error_named,
)
from contract.failpoint import failpoint
from contract.records import NOTHING_SEEN, CutLayers, RoundKey, RoundProgress
from contract.tls import TlsFiles, open_channel, told_failure
from contract.trunk_pb2_grpc import TrunkStub

MAX_ADAPTER_BYTES = 1 << 30
ANSWER_TIMEOUT_S = 10.0
TRANSFER_TIMEOUT_S = 600.0
LOOK_S = 1.0

Answer = TypeVar("Answer")

log = logging.getLogger("trunkline.orchestrator")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a trunk says that it serves. `ticket_signers` are the public lines whose tickets sessions need, if any."""

    fingerprint: str
    cut: CutLayers
    dtype: str
    attn_implementation: str
    layers: int
    hidden_size: int
    ticket_signers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TrunkAverage:
    """What a trunk answers to a commit: its averaged part's id, and the weights it averaged with, summed."""

    sha256: str
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class TrunkPart:
    """What one of several trunks answers to a commit: the average over those survivors, `clients`, that it knows.

    Where they trained no tokens, or nobody is known there, `sha256` is empty.
    """

    sha256: str
    trained_tokens: int
    clients: tuple[str, ...]


class Trunk:
    """A connection to one trunk. Each method raises the error that the trunk named.

    ConnectionFailedError when nothing answers at the address, DeadlineError when an answer takes too long. What brings
    or takes adapters, and a commit, are asked again for `patience_s`: all of them may be asked twice.
    """

    def __init__(
        self,
        address: str,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        *,
        patience_s: float = 0.0,
        tls: TlsFiles | None = None,
        channel: grpc.Channel | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """By TLS alone where `tls` is given; raises ConfigError for its files.

        `channel` and the two of time stand in for the wire and the clock, so that a simulation need not wait.
        """
        self.address = address
        self._by_tls = tls is not None
        self._answer_timeout_s = answer_timeout_s
        self._patience_s = patience_s
        # A proxy between us and a trunk would be asked for by name in the address, not by the environment.
        options = [("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", int(1000 * LOOK_S))]
        self._channel = channel or open_channel(address, tls, [*wire.message_limits(), *options])
        self._monotonic, self._sleep = monotonic, sleep
        self._stub = TrunkStub(self._channel)
        self._counted: tuple[RoundKey | None, RoundProgress, RoundProgress] = (None, NOTHING_SEEN, NOTHING_SEEN)

    def describe(self) -> ServedModel:
        """What the trunk serves. Raises AgreementError when it speaks another protocol."""
        with _told_by(self.address, by_tls=self._by_tls):
            told: pb.TrunkDescription = self._stub.Describe(pb.DescribeRequest(), timeout=self._answer_timeout_s)
        if told.protocol != wire.PROTOCOL:
            raise AgreementError(
                f"trunk at {self.address} speaks protocol {told.protocol}, this orchestrator {wire.PROTOCOL}: "
                "install the same trunkline on both sides"
            )
        model = told.model
        return ServedModel(
            fingerprint=model.fingerprint,
            cut=CutLayers(model.head_layers, model.tail_layers),
            dtype=model.dtype,
            attn_implementation=model.attn_implementation,
            layers=told.layers,
            hidden_size=told.hidden_size,
            ticket_signers=tuple(told.ticket_signer.split(",")) if told.ticket_signer else (),
        )

    def put_adapter(self, data: bytes) -> str:
        """Store an adapter's trunk part at the trunk and return its id; storing it again changes nothing."""
        sha256 = hashlib.sha256(data).hexdigest()
        receipt: pb.AdapterReceipt = self._patiently(
            lambda: self._stub.PutAdapter(_chunks(data, sha256), timeout=TRANSFER_TIMEOUT_S)
        )
        if receipt.sha256 != sha256:
            raise IntegrityError(f"trunk at {self.address} stored {receipt.sha256} when given {sha256}")
        return sha256

    def get_adapter(self, sha256: str) -> bytes:
        """An adapter's trunk part by its id. Raises IntegrityError when the bytes do not hash to it."""
        data = self._patiently(lambda: self._downloaded(sha256))
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise IntegrityError(f"trunk at {self.address} sent {found} for adapter {sha256}")
        return data

    def _downloaded(self, sha256: str) -> bytes:
        data = bytearray()
        for chunk in self._stub.GetAdapter(pb.GetAdapterRequest(sha256=sha256), timeout=TRANSFER_TIMEOUT_S):
            if len(data) + len(chunk.data) > MAX_ADAPTER_BYTES:
                raise FrameTooLargeError(
                    f"trunk at {self.address} sends more than {MAX_ADAPTER_BYTES} bytes for adapter {sha256}"
                )
            data += chunk.data
        return bytes(data)

    def commit_round(self, key: RoundKey, base_sha256: str, survivors: Sequence[str]) -> TrunkAverage:
        """Average the trunk parts of exactly `survivors`, which all started from `base_sha256`. Idempotent."""
        reply = self._commit(key, base_sha256, survivors, partial=False)
        return TrunkAverage(reply.adapter_sha256, reply.trained_tokens)

    def commit_part(self, key: RoundKey, base_sha256: str, survivors: Sequence[str]) -> TrunkPart:
        """Average the trunk parts of those of `survivors` that contributed to this trunk. Idempotent."""
        reply = self._commit(key, base_sha256, survivors, partial=True)
        return TrunkPart(reply.adapter_sha256, reply.trained_tokens, tuple(reply.clients))

    def _commit(
        self, key: RoundKey, base_sha256: str, survivors: Sequence[str], *, partial: bool
    ) -> pb.CommitRoundReply:
        request = pb.CommitRoundRequest(
            round=wire.round_to_wire(key), base_sha256=base_sha256, survivors=sorted(survivors), partial=partial
        )
        reply: pb.CommitRoundReply = self._patiently(
            lambda: self._stub.CommitRound(request, timeout=TRANSFER_TIMEOUT_S)
        )
        return reply

    def progress(self, key: RoundKey) -> RoundProgress:
        """What the trunk has seen of this attempt so far; it only rises, also where the trunk is seen to start anew."""
        with _told_by(self.address, by_tls=self._by_tls):
            seen: pb.ProgressReply = self._stub.Progress(wire.round_to_wire(key), timeout=self._answer_timeout_s)
        told = RoundProgress(
            sessions=seen.sessions,
            steps=seen.steps,
            tokens=seen.tokens,
            received_bytes=seen.received_bytes,
            sent_bytes=seen.sent_bytes,
        )
        counted, before, last = self._counted
        if counted != key:
            before = NOTHING_SEEN
        elif told.received_bytes < last.received_bytes:
            before += last
        self._counted = (key, before, told)
        return before + told

    def end_before(self, key: RoundKey) -> None:
        """Tell the trunk that the run's attempts before `key` are over, so that their sessions end. Idempotent."""
        with _told_by(self.address, by_tls=self._by_tls):
            ended: pb.EndBeforeReply = self._stub.EndBefore(wire.round_to_wire(key), timeout=self._answer_timeout_s)
        if ended.sessions:
            log.info("trunk %s ends %d sessions of attempts that are over", self.address, ended.sessions)

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        """What `ask` answers; asked again while nothing answers at the address and patience lasts."""
        until_s: float | None = None
        while True:
            try:
                with _told_by(self.address, by_tls=self._by_tls):
                    return ask()
            except ConnectionFailedError as error:
                until_s = self._monotonic() + self._patience_s if until_s is None else until_s
                if self._monotonic() >= until_s:
                    raise
                log.warning("%s; asking again", error)
            self._sleep(LOOK_S)

    def close(self) -> None:
        self._channel.close()


def require_served(config: RunConfig, served: ServedModel, fingerprint: str | None, address: str) -> None:
    """Raise AgreementError, naming both sides of every difference, unless the trunk serves what the run asks for.

    `fingerprint` is the orchestrator's own model's, or None when it holds nothing but config.json.
    """
    asked: dict[str, tuple[object, object]] = {
        "head-layers": (config.head_layers, served.cut.head),
        "tail-layers": (config.tail_layers, served.cut.tail),
        "dtype": (config.dtype, served.dtype),
        "attn-implementation": (config.attn_implementation, served.attn_implementation),
        "model fingerprint": (fingerprint or served.fingerprint, served.fingerprint),
    }
    differences = [
        f"{name} is {ours} in this run and {theirs} at the trunk"
        for name, (ours, theirs) in asked.items()
        if ours != theirs
    ]
    if differences:
        raise AgreementError(f"trunk at {address} does not serve this run: {'; '.join(differences)}")


def _chunks(data: bytes, sha256: str) -> Iterator[pb.AdapterChunk]:
    yield pb.AdapterChunk(sha256=sha256, size_bytes=len(data), data=data[: wire.CHUNK_BYTES])
    for start in range(wire.CHUNK_BYTES, len(data), wire.CHUNK_BYTES):
        yield pb.AdapterChunk(data=data[start : start + wire.CHUNK_BYTES])


@contextmanager
def _told_by(address: str, *, by_tls: bool) -> Iterator[None]:
    """Turn a gRPC failure inside the block into the error that the trunk named, or into one that names the trunk."""
    failpoint("trunk.call.before")
    try:
        yield
    except grpc.RpcError as error:
        _raise_named(error, address, by_tls=by_tls)
    failpoint("trunk.call.after")


def _raise_named(error: grpc.RpcError, address: str, *, by_tls: bool) -> NoReturn:
    details = " ".join((error.details() or "").split())
    trailer = cast(Iterable[tuple[str, str]], error.trailing_metadata() or ())
    cls = error_named(dict(trailer).get(wire.ERROR_KEY, ""))
    if cls is not None:
        raise cls(details) from None
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        raise ConnectionFailedError(
            f"trunk at {address} does not answer{told_failure(details, by_tls=by_tls)}: start it with: "
            f"trunkline trunk serve --model MODEL --head-layers K --tail-layers M --listen {address}"
        ) from None
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        raise DeadlineError(f"trunk at {address} did not answer in time") from None
    raise TrunklineError(f"trunk at {address} failed with {error.code().name}: {details}") from None
