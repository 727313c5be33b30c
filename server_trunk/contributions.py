"""What closed sessions leave for their round, on disk, and the averages made of it.

    STATE/artifacts/                              adapters that were put or committed, by SHA-256
    STATE/rounds/RUN/ROUND/artifacts/             trained adapters of this round, by SHA-256
    STATE/rounds/RUN/ROUND/ATTEMPT/CLIENT.json    {adapter_sha256, base_sha256, trained_tokens}
    STATE/candidates/RUN/ROUND/ATTEMPT/KEY.json   {adapter_sha256, trained_tokens}; KEY names base and survivors

Each JSON file is written last and by rename, so that what it names is there. Not safe to use from several threads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from contract.adapter import from_bytes, to_bytes
from contract.durable_file import replace_file
from contract.errors import AgreementError, FrameError, SessionError, StorageError, UpdateError
from contract.records import RoundKey
from storage.artifacts import ArtifactStore

logger = logging.getLogger("trunkline.server_trunk")

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


Record = TypeVar("Record", Contribution, Candidate)


class Contributions:
    """The state directory of a trunk."""

    def __init__(self, state_dir: Path) -> None:
        """Raises StorageError when the directory cannot be made."""
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"state-dir {state_dir} cannot be made: {error.strerror}") from error
        self._rounds = state_dir / "rounds"
        self._candidates = state_dir / "candidates"
        self.adapters = ArtifactStore(state_dir / "artifacts")

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

        The same key, base and survivors give the same answer again, also after a restart. Contributions of the run's
        earlier rounds are removed. Raises FrameError (no survivors, one twice), SessionError (one without a
        contribution, an unknown base), AgreementError (one that started from another base or has another shape),
        UpdateError (no trained tokens), StorageError, IntegrityError.
        """
        names = sorted(survivors)
        if not names or len(set(names)) != len(names):
            raise FrameError(
                f"survivors has {len(names)} names, {len(set(names))} of them different; it needs each once"
            )
        digest = hashlib.sha256(json.dumps([base_sha256, names]).encode()).hexdigest()
        record = self._attempt(self._candidates, key) / f"{digest}.json"
        if record.is_file():
            candidate = _read(record, Candidate)
        else:
            candidate = self._average(key, base_sha256, names)
            _write_json(record, asdict(candidate))
        self._remove_before(key)
        return candidate

    def _average(self, key: RoundKey, base_sha256: str, names: list[str]) -> Candidate:
        self.require_adapter(base_sha256)
        contributions = self._contributions(key, names)
        for name, contribution in contributions.items():
            if contribution.base_sha256 != base_sha256:
                raise AgreementError(
                    f"client {name} started from adapter {contribution.base_sha256}; the round commits on {base_sha256}"
                )
        weight = sum(contribution.trained_tokens for contribution in contributions.values())
        if weight == 0:
            raise UpdateError(f"{_label(key)}: the survivors trained no tokens, so there is nothing to average")
        sums: dict[str, Tensor] = {}
        trained = self._trained(key)
        for name, contribution in contributions.items():
            tensors = from_bytes(trained.get(contribution.adapter_sha256))
            sums = sums or _zeros(tensors)
            if _shapes(tensors) != _shapes(sums):
                raise AgreementError(f"the adapters of clients {names[0]} and {name} have different tensors")
            for tensor_name, tensor in tensors.items():
                sums[tensor_name].add_(tensor.to(torch.float64), alpha=contribution.trained_tokens)
        average = {name: (total / weight).to(torch.float32) for name, total in sums.items()}
        return Candidate(self.adapters.put(to_bytes(average)), weight)

    def _contributions(self, key: RoundKey, names: list[str]) -> dict[str, Contribution]:
        folder = self._attempt(self._rounds, key)
        for name in names:
            check_name("survivors", name)
        missing = [name for name in names if not (folder / f"{name}.json").is_file()]
        if missing:
            raise SessionError(f"{_label(key)}: no contribution from {', '.join(missing)}")
        return {name: _read(folder / f"{name}.json", Contribution) for name in names}

    def _attempt(self, root: Path, key: RoundKey) -> Path:
        check_name("run", key.run)
        return root / key.run / str(key.round) / str(key.attempt)

    def _trained(self, key: RoundKey) -> ArtifactStore:
        return ArtifactStore(self._rounds / key.run / str(key.round) / "artifacts")

    def _remove_before(self, key: RoundKey) -> None:
        for folder in (self._rounds / key.run).glob("*"):
            if folder.name.isdigit() and int(folder.name) < key.round:
                shutil.rmtree(folder, onerror=_log_leftover)


def _label(key: RoundKey) -> str:
    return f"run {key.run} round {key.round} attempt {key.attempt}"


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _zeros(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in tensors.items()}


def _log_leftover(function: object, path: str, details: object) -> None:
    logger.warning("an old round's contribution could not be removed: %s", path)


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
