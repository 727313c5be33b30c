"""What closed sessions leave for their round, on disk, and the averages made of it.

    STATE/artifacts/                              adapters that were put or committed, by SHA-256
    STATE/rounds/RUN/ROUND/artifacts/             trained adapters of this round, by SHA-256
    STATE/rounds/RUN/ROUND/ATTEMPT/CLIENT.json    {adapter_sha256, base_sha256, trained_tokens}
    STATE/candidates/RUN/ROUND/ATTEMPT/KEY.json   {adapter_sha256, trained_tokens}; KEY names base and survivors;
                                                  with {clients} beside them where they are part of a round's average

What of it is kept for how long stands in `leftovers`.
Each JSON file is written last and by rename, so that what it names is there. Not safe to use from several threads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from contract.adapter_mean import AdapterMean
from contract.durable_file import remove_partials, replace_file
from contract.errors import AgreementError, FrameError, SessionError, StorageError, UpdateError
from contract.records import RoundKey
from server_trunk.leftovers import Leftovers
from storage.artifacts import ArtifactStore

logger = logging.getLogger("trunkline.server_trunk")

_PARTIAL_S = 3600.0
"""No write takes longer: what is older will never be whole."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(field: str, value: str) -> None:
    """Raise FrameError unless `value` may name a file or a folder."""
    if not _NAME.fullmatch(value):
        raise FrameError(
            f"{field} is {value[:140]!r}; it must be 1 to 128 letters, digits, '.', '_' or '-', and start with "
            "a letter or a digit"
        )


@dataclass(frozen=True, slots=True)
class Contribution:
    """One client's trained trunk adapter and its weight in the average."""

    adapter_sha256: str
    base_sha256: str
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """The average over one survivor set; it becomes current only when the orchestrator's SQL names it."""

    adapter_sha256: str
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class PartialCandidate:
    """A candidate over those survivors that contributed here, `clients` in sorted order; maybe nobody.

    Without trained tokens there is no average, and `adapter_sha256` is empty.
    """

    adapter_sha256: str
    trained_tokens: int
    clients: list[str]


Record = TypeVar("Record", Contribution, Candidate, PartialCandidate)
Answer = TypeVar("Answer", Candidate, PartialCandidate)


class Contributions:
    """The state directory of a trunk."""

    def __init__(self, state_dir: Path) -> None:
        """Raises StorageError when the directory cannot be made."""
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"state-dir {state_dir} cannot be made: {error.strerror}") from error
        self._state_dir = state_dir
        self._rounds = state_dir / "rounds"
        self._candidates = state_dir / "candidates"
        self.adapters = ArtifactStore(state_dir / "artifacts")
        self._leftovers = Leftovers(self._rounds, self._candidates, self.adapters)

    def sweep(self) -> None:
        """Remove what a killed trunk left half written, and what has not been used for a month. Raises StorageError."""
        try:
            found = remove_partials(self._state_dir, _PARTIAL_S)
        except OSError as error:
            raise StorageError(f"state-dir {self._state_dir} cannot be swept: {error.strerror}") from error
        if found:
            logger.info("removed %d files that an earlier trunk had half written", found)
        self._leftovers.remove_old()

    def require_adapter(self, sha256: str) -> None:
        """Raise SessionError unless the adapter was put or committed here, FrameError when it is no SHA-256."""
        if not _SHA256.fullmatch(sha256):
            raise FrameError(f"adapter {sha256[:80]!r} is no SHA-256: it must be 64 lower-case hexadecimal digits")
        if not self.adapters.has(sha256):
            raise SessionError(f"this trunk does not hold adapter {sha256}; put it first")

    def add(self, key: RoundKey, client_id: str, base_sha256: str, trained_tokens: int, adapter: bytes) -> None:
        """Keep a closed session's adapter (safetensors); durable on return. A client's later one replaces it.

        Raises FrameError on a run or client id that cannot name a file, StorageError when it cannot be written.
        """
        folder = self._attempt(self._rounds, key)
        check_name("client_id", client_id)
        sha256 = self._trained(key).put(adapter)
        _write_json(folder / f"{client_id}.json", asdict(Contribution(sha256, base_sha256, trained_tokens)))

    def commit(self, key: RoundKey, base_sha256: str, survivors: Collection[str]) -> Candidate:
        """Average the adapters of exactly `survivors` by their trained tokens, in float64.

        The same key, base and survivors give the same answer again, also after a restart, until the run commits the
        round after the next. What its earlier rounds left is removed. Raises FrameError (no survivors, one twice),
        SessionError (one without a contribution, an unknown base), AgreementError (one that started from another base
        or has another shape), UpdateError (no trained tokens), StorageError, IntegrityError.
        """
        names = _each_once(survivors)
        return self._kept(key, base_sha256, [names], Candidate, lambda: self._average(key, base_sha256, names))

    def commit_part(self, key: RoundKey, base_sha256: str, survivors: Collection[str]) -> PartialCandidate:
        """As `commit`, but over those of `survivors` that contributed here: other trunks have the others.

        The answer is kept by all the survivors that were named, and so is the same again even once the round's
        contributions are removed. Raises what `commit` does, but for survivors without a contribution or tokens.
        """
        names = _each_once(survivors)
        return self._kept(
            key, base_sha256, [names, "partial"], PartialCandidate, lambda: self._average_here(key, base_sha256, names)
        )

    def _kept(
        self, key: RoundKey, base_sha256: str, terms: list[Any], answer: type[Answer], make: Callable[[], Answer]
    ) -> Answer:
        """What `make` answered when it was first called for this; what the run's earlier rounds left is removed."""
        digest = hashlib.sha256(json.dumps([base_sha256, *terms]).encode()).hexdigest()
        record = self._attempt(self._candidates, key) / f"{digest}.json"
        if record.is_file():
            candidate = _read(record, answer)
        else:
            candidate = make()
            if isinstance(candidate, PartialCandidate) and not candidate.clients:
                return candidate  # leaves nothing: a survivor contributed before anybody could name it
            _write_json(record, asdict(candidate))
        self._leftovers.remove_before(key, base_sha256)
        return candidate

    def _average(self, key: RoundKey, base_sha256: str, names: list[str]) -> Candidate:
        self.require_adapter(base_sha256)
        contributions = self._contributions(key, names)
        for name, contribution in contributions.items():
            if contribution.base_sha256 != base_sha256:
                raise AgreementError(
                    f"client {name} started from adapter {contribution.base_sha256}; the round commits on {base_sha256}"
                )
        if not any(contribution.trained_tokens for contribution in contributions.values()):
            raise UpdateError(f"{_label(key)}: the survivors trained no tokens, so there is nothing to average")
        mean, trained = AdapterMean(), self._trained(key)
        # By what was trained and not by whose it is: a sum's last bits go by its order, and ids by Flower's chance.
        for name, contribution in sorted(contributions.items(), key=lambda item: (item[1].adapter_sha256, item[0])):
            mean.add(f"client {name}", trained.get(contribution.adapter_sha256), contribution.trained_tokens)
        return Candidate(self.adapters.put(mean.to_bytes()), mean.weight)

    def _average_here(self, key: RoundKey, base_sha256: str, names: list[str]) -> PartialCandidate:
        here = [name for name in names if self._contributed(key, name)]
        contributions = self._contributions(key, here)
        if not any(contribution.trained_tokens for contribution in contributions.values()):
            return PartialCandidate("", 0, here)
        average = self._average(key, base_sha256, here)
        return PartialCandidate(average.adapter_sha256, average.trained_tokens, here)

    def _contributed(self, key: RoundKey, name: str) -> bool:
        check_name("survivors", name)
        return (self._attempt(self._rounds, key) / f"{name}.json").is_file()

    def _contributions(self, key: RoundKey, names: list[str]) -> dict[str, Contribution]:
        folder = self._attempt(self._rounds, key)
        missing = [name for name in names if not self._contributed(key, name)]
        if missing:
            raise SessionError(f"{_label(key)}: no contribution from {', '.join(missing)}")
        return {name: _read(folder / f"{name}.json", Contribution) for name in names}

    def _attempt(self, root: Path, key: RoundKey) -> Path:
        check_name("run", key.run)
        return root / key.run / str(key.round) / str(key.attempt)

    def _trained(self, key: RoundKey) -> ArtifactStore:
        return ArtifactStore(self._rounds / key.run / str(key.round) / "artifacts")


def _label(key: RoundKey) -> str:
    return f"run {key.run} round {key.round} attempt {key.attempt}"


def _each_once(survivors: Collection[str]) -> list[str]:
    """The names in sorted order. Raises FrameError for none, or one that is there twice."""
    names = sorted(survivors)
    if not names or len(set(names)) != len(names):
        raise FrameError(f"survivors has {len(names)} names, {len(set(names))} of them different; it needs each once")
    return names


def _read(path: Path, record: type[Record]) -> Record:
    """Raises StorageError when the file cannot be read or is not such a record."""
    try:
        return record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(f"{path} is not a readable {record.__name__.lower()}: {error}") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Durable when it returns; the old file stays whole until then. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(value, sort_keys=True).encode())
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
