"""What of a trunk's state directory an honest run asks for no more: removed once a later round's average is durable.

A run's commit of round N names the version before it, which SQL holds then: a resumed run begins from that one or from
round N's, and its orchestrator puts that again. So there stay N's and N-1's candidates, N's contributions, and what any
other run's records name. A commit removes no adapter but averages that the trunk itself made for that run: what else a
record names is the client's word, and another run may need it. The others, first versions and those that were put among
them, go once no record names them and no session has started from them for two days, which is longer than any round.

Adapters go first and the records that name them last, so that what a kill leaves is found by the next commit.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from contract.errors import StorageError
from contract.failpoint import failpoint
from contract.records import RoundKey
from storage.artifacts import ArtifactStore

logger = logging.getLogger("trunkline.server_trunk")

KEPT_S = 30 * 86_400.0
"""How long the records of a run's last rounds are kept, and the adapters with them."""
UNNAMED_S = 2 * 86_400.0
"""How long an adapter that no record names is kept after its last use. Who resumes a run puts its adapter again."""


class Leftovers:
    """Of the runs in `rounds` and `candidates`, each RUN/ROUND/ATTEMPT/*.json, and of the adapters that these name."""

    def __init__(self, rounds: Path, candidates: Path, adapters: ArtifactStore) -> None:
        self._rounds = rounds
        self._candidates = candidates
        self._adapters = adapters

    def remove_before(self, key: RoundKey, base_sha256: str) -> None:
        """Remove what the run's rounds before that of `key`, which commits on `base_sha256`, left and nobody needs.

        What cannot be removed is logged: the commit itself is done.
        """
        try:
            rounds = _rounds_before(self._rounds / key.run, key.round)
            candidates = _rounds_before(self._candidates / key.run, key.round - 1)
            if rounds or candidates:
                self._remove_rounds(rounds, candidates, base_sha256)
        except (StorageError, OSError) as error:
            logger.warning("what run %s's earlier rounds left stays until it is old: %s", key.run, error)

    def _remove_rounds(self, rounds: Collection[Path], candidates: Collection[Path], base_sha256: str) -> None:
        failpoint("leftovers.remove")
        if gone := _names(candidates, "adapter_sha256") - {base_sha256}:
            for sha256 in sorted(gone - self._named(besides={*rounds, *candidates})):
                self._adapters.remove(sha256)
        failpoint("leftovers.unnamed")
        for folder in (*candidates, *rounds):
            _remove(folder)
        failpoint("leftovers.removed")

    def remove_old(self) -> None:
        """Remove runs of which nothing was written for KEPT_S, and adapters that nothing names nor used for UNNAMED_S.

        What cannot be removed is logged.
        """
        now_s = time.time()
        runs, gone = 0, 0
        try:
            for name in self._runs():
                if self._written_s(name) < now_s - KEPT_S:
                    failpoint("leftovers.remove")
                    _remove(self._candidates / name)
                    _remove(self._rounds / name)
                    runs += 1
            unused = self._adapters.unused(now_s - UNNAMED_S)
            named = self._named() if unused else set()
            for sha256 in (one for one in unused if one not in named):
                failpoint("leftovers.remove")
                self._adapters.remove(sha256)
                gone += 1
        except (StorageError, OSError) as error:
            logger.warning("old runs and adapters stay: %s", error)
        if runs or gone:
            told = "removed the records of %d runs, unused for %.0f days, and %d adapters, for %.0f days"
            logger.info(told, runs, KEPT_S / 86_400, gone, UNNAMED_S / 86_400)

    def _named(self, besides: Iterable[Path] = ()) -> set[str]:
        """The adapters that records name, but for the rounds `besides`. Raises StorageError."""
        left_out = set(besides)
        bases = (one for one in self._rounds.glob("*/*") if one not in left_out)
        averages = (one for one in self._candidates.glob("*/*") if one not in left_out)
        return _names(bases, "base_sha256") | _names(averages, "adapter_sha256")

    def _runs(self) -> list[str]:
        found = (folder for root in (self._rounds, self._candidates) for folder in root.glob("*"))
        return sorted({folder.name for folder in found if folder.is_dir()})

    def _written_s(self, run: str) -> float:
        """When a file of the run was last written; 0 where it has none, as a kill may leave it."""
        try:
            return max((path.stat().st_mtime for path in self._files(run)), default=0.0)
        except OSError as error:
            raise StorageError(f"the records of run {run} cannot be read: {error.strerror}") from error

    def _files(self, run: str) -> Iterator[Path]:
        for root in (self._rounds, self._candidates):
            yield from (path for path in (root / run).rglob("*") if path.is_file())


def _rounds_before(run: Path, number: int) -> list[Path]:
    return [folder for folder in run.glob("*") if folder.name.isdigit() and int(folder.name) < number]


def _names(rounds: Iterable[Path], field: str) -> set[str]:
    """What the records of these rounds' attempts hold as `field`. Raises StorageError for one that is none."""
    found = set()
    for path in (record for folder in rounds for record in folder.glob("*/*.json")):
        try:
            found.add(str(json.loads(path.read_text(encoding="utf-8"))[field]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StorageError(f"{path} is not a readable record: {error}") from error
    return found - {""}  # of a part over clients that trained nothing


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder, onerror=_log_leftover)


def _log_leftover(function: object, path: str, details: object) -> None:
    logger.warning("what an old round left could not be removed: %s", path)
