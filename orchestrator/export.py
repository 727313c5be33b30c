"""A committed version as one ordinary PEFT adapter: both parts joined, with where it came from beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contract.config import RunConfig
from contract.errors import StorageError
from contract.records import LoraSpec
from storage.artifacts import ArtifactStore
from storage.reader import Reader
from storage.records import AdapterVersionRow, RunRow
from storage.store import Store

STRUCTURE_EVENT = "adapter-structure"
MOST_EVENTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Export:
    """What was written where; `adapter_sha256` is of the weights file."""

    run_id: str
    round: int
    directory: Path
    adapter_sha256: str


def record_structure(store: Store, run_id: str, spec: LoraSpec) -> None:
    """Keep the adapter's structure with the run: an export must not need the model's configuration again."""
    store.add_event(run_id, STRUCTURE_EVENT, f"LoRA on {len(spec.target_modules)} modules", asdict(spec))


def export_adapter(reader: Reader, artifacts: ArtifactStore, run: RunRow, number: int, directory: Path) -> Export:
    """Write version `number` of `run` to `directory`, whole or not at all.

    Raises StorageError where that version was not committed or an artifact is missing, IntegrityError where one was
    changed, ConfigError where `directory` holds something else.
    """
    from contract.adapter import write_export

    version = reader.adapter_version(run.run_id, number)
    config = RunConfig.from_flower(run.config)
    origin: dict[str, str | int] = {
        "run": run.run_id,
        "round": number,
        "client_sha256": version.client_sha256,
        "trunk_sha256": version.trunk_sha256,
        "head_layers": config.head_layers,
        "tail_layers": config.tail_layers,
        "dtype": config.dtype,
        "attn_implementation": config.attn_implementation,
    }
    title = f"Adapter of run {run.run_id}, round {number}"
    tensors = joined(artifacts, version)
    write_export(directory, tensors, structure(reader, run.run_id), config.model, title, origin)
    return Export(run.run_id, number, directory, joined_sha256(artifacts, version))


def joined_sha256(artifacts: ArtifactStore, version: AdapterVersionRow) -> str:
    """The id of the whole adapter of a version, which is the SHA-256 of its export's weights file."""
    from contract.adapter import sha256_hex, to_bytes

    return sha256_hex(to_bytes(joined(artifacts, version)))


def joined(artifacts: ArtifactStore, version: AdapterVersionRow) -> Mapping[str, Any]:
    """The tensors of both halves of a version. Raises StorageError, and IntegrityError where one was changed."""
    from contract.adapter import from_bytes

    return {
        **from_bytes(artifacts.get(version.client_sha256)),
        **from_bytes(artifacts.get(version.trunk_sha256)),
    }


def structure(reader: Reader, run_id: str) -> LoraSpec:
    """The structure of a run's adapters. Raises StorageError for a run that has none."""
    for event in reader.events(run_id, limit=MOST_EVENTS):
        if event.kind == STRUCTURE_EVENT:
            lists = {name: tuple(value) for name, value in event.detail.items() if isinstance(value, list)}
            return LoraSpec(**{**event.detail, **lists})
    raise StorageError(f"run {run_id} holds no adapter: it ended before its first one was drawn")
