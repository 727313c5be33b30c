"""Several trunks that serve one run as if they were one: each client works with one of them, whichever it chose.

A trunk averages those survivors that contributed to it; the average of these averages, each with its sum of weights, is
the average over all survivors. It is put to every trunk, so that the next round may begin at any of them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import fields
from typing import Protocol, TypeVar

from contract.addresses import trunk_addresses
from contract.errors import (
    AgreementError,
    ConnectionFailedError,
    DeadlineError,
    SessionError,
    TrunklineError,
    UpdateError,
)
from contract.records import NOTHING_SEEN, RoundKey, RoundProgress
from contract.tls import TlsFiles
from orchestrator.adapters import weighted_mean
from orchestrator.desk import RunTrunk
from orchestrator.trunk import ServedModel, Trunk, TrunkAverage, TrunkPart

log = logging.getLogger("trunkline.orchestrator")

Answer = TypeVar("Answer")

Silent = (ConnectionFailedError, DeadlineError)
"""What is made of a trunk that does not answer. The others go on without it, as long as nothing is missing."""
_LOOK_S = 0.2


class ConnectedTrunk(RunTrunk, Protocol):
    """A trunk, or several as one, from the first question to the last."""

    @property
    def address(self) -> str: ...

    def describe(self) -> ServedModel: ...

    def end_before(self, key: RoundKey) -> None: ...

    def close(self) -> None: ...


class Replicas:
    """Several trunks as one. Errors are those of `Trunk`; of more than one, that of the first address."""

    def __init__(self, trunks: Sequence[Trunk]) -> None:
        self._trunks = tuple(trunks)
        self._pool = ThreadPoolExecutor(len(self._trunks), thread_name_prefix="trunks")
        self._seen: tuple[RoundKey | None, dict[str, RoundProgress]] = (None, {})

    @property
    def address(self) -> str:
        return ",".join(trunk.address for trunk in self._trunks)

    def describe(self) -> ServedModel:
        """What all of them serve. Raises AgreementError, naming both sides of every difference, where that is not one.

        At a run's start each must answer: one that never did would be missed only when a client's work is lost with it.
        """
        said, _ = self._asked(lambda trunk: trunk.describe(), everyone=True)
        (first, served), *others = said.items()
        for address, other in others:
            found = [
                f"{name} is {getattr(served, name)} at {first} and {getattr(other, name)} at {address}"
                for name in (field.name for field in fields(ServedModel))
                if getattr(served, name) != getattr(other, name)
            ]
            if found:
                raise AgreementError(f"the trunks of trunk-address do not serve the same: {'; '.join(found)}")
        return served

    def put_adapter(self, data: bytes) -> str:
        """Store a trunk part at every trunk that answers, of which there must be one, and return its id.

        A client that meets a trunk without it turns to another one.
        """
        said, silent = self._asked(lambda trunk: trunk.put_adapter(data))
        for address, error in silent.items():
            log.warning(
                "trunk %s did not get the adapter, and takes no clients until it gets a later one: %s", address, error
            )
        return next(iter(said.values()))

    def get_adapter(self, sha256: str) -> bytes:
        """A trunk part from the first trunk that holds it."""
        failed: list[Exception] = []
        for trunk in self._trunks:
            try:
                return trunk.get_adapter(sha256)
            except (*Silent, SessionError) as error:
                failed.append(error)
        raise failed[0]

    def progress(self, key: RoundKey) -> RoundProgress:
        """The sum of what the trunks have seen of this attempt; what a silent one had seen before still counts."""
        said, _ = self._asked(lambda trunk: trunk.progress(key))
        self._seen = (key, (self._seen[1] if self._seen[0] == key else {}) | said)
        return sum(self._seen[1].values(), NOTHING_SEEN)

    def end_before(self, key: RoundKey) -> None:
        """Tell every trunk that answers that the run's attempts before `key` are over."""
        _, silent = self._asked(lambda trunk: trunk.end_before(key))
        for address, error in silent.items():
            log.warning("trunk %s is not told that attempts are over: %s", address, error)

    def commit_round(self, key: RoundKey, base_sha256: str, survivors: Sequence[str]) -> TrunkAverage:
        """Average the trunk parts of exactly `survivors`, wherever each contributed, and put the average everywhere.

        The same trunks give the same bytes again: the sum runs in float64 in the order of the addresses. Raises
        AgreementError where a survivor contributed to no trunk that answers, or to two; UpdateError for no tokens.
        """
        said, silent = self._asked(lambda trunk: _part(trunk, key, base_sha256, survivors))
        _require_each_once(key, survivors, {address: part for address, (part, _) in said.items()}, silent)
        trained = [(f"trunk {address}", data, part.trained_tokens) for address, (part, data) in said.items() if data]
        if not trained:
            raise UpdateError(f"round {key.round}: the survivors trained no tokens, so there is nothing to average")
        average = self.put_adapter(weighted_mean(trained))
        spread = ", ".join(f"{len(part.clients)} at {address}" for address, (part, _) in said.items())
        log.info("round %d: clients by trunk: %s", key.round, spread)
        return TrunkAverage(average, sum(weight for _, _, weight in trained))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for trunk in self._trunks:
            trunk.close()

    def _asked(
        self, call: Callable[[Trunk], Answer], *, everyone: bool = False
    ) -> tuple[dict[str, Answer], dict[str, TrunklineError]]:
        """What each trunk answered, and why the others are silent, by address in the order of the addresses.

        All are asked at the same time: a silent one costs its own time limit, and none of the others'. Raises the
        first one's error where all are silent, or with `everyone` where one is.
        """
        said: dict[str, Answer] = {}
        silent: dict[str, TrunklineError] = {}
        asked = [(trunk.address, self._pool.submit(call, trunk)) for trunk in self._trunks]
        for address, answer in asked:
            # Each call has its own limit; a wait without one would leave the signals unheard that Flower ends a run by.
            while not wait([answer], _LOOK_S).done:
                continue
            try:
                said[address] = answer.result()
            except Silent as error:
                silent[address] = error
        if silent and (everyone or not said):
            raise next(iter(silent.values()))
        return said, silent


def connect(addresses: str, *, patience_s: float = 0.0, tls: TlsFiles | None = None) -> ConnectedTrunk:
    """The trunk at `addresses`, or all of them as one where commas part several.

    A single one is waited for as `Trunk` says; of several the others go on without one that is silent. Nothing is asked
    yet. By TLS alone where `tls` is given. Raises ConfigError for an address that is none, and for TLS files.
    """
    named = trunk_addresses(addresses)
    if len(named) == 1:
        return Trunk(named[0], patience_s=patience_s, tls=tls)
    return Replicas([Trunk(address, tls=tls) for address in named])


def _part(trunk: Trunk, key: RoundKey, base_sha256: str, survivors: Sequence[str]) -> tuple[TrunkPart, bytes]:
    """A trunk's share of the survivors and the average over it; no bytes where nobody of them trained there."""
    part = trunk.commit_part(key, base_sha256, survivors)
    return part, trunk.get_adapter(part.sha256) if part.trained_tokens else b""


def _require_each_once(
    key: RoundKey, survivors: Sequence[str], parts: Mapping[str, TrunkPart], silent: Mapping[str, Exception]
) -> None:
    found = Counter(name for part in parts.values() for name in part.clients)
    wrong = {
        "nowhere": sorted(set(survivors) - found.keys()),
        "at more than one": sorted(name for name, times in found.items() if times > 1),
        "but did not survive": sorted(found.keys() - set(survivors)),
    }
    told = [f"{', '.join(names)} contributed {where}" for where, names in wrong.items() if names]
    if told:
        why = [f"trunk {address} is silent: {error}" for address, error in silent.items()]
        raise AgreementError(f"round {key.round}: of the clients, {'; '.join([*told, *why])}")
