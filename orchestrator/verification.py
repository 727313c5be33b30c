"""Whether an exported adapter is what was trained: against SQL here, against stock PEFT in a process of its own.

`python -m orchestrator.verification` is that process: JSON arguments on stdin, a JSON report on stdout. Nothing that an
earlier import or an earlier model left behind can help the adapter there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contract.errors import DeadlineError, ModelError, StorageError, error_named
from contract.model_files import read_json, resolve_model
from contract.records import CutLayers
from orchestrator.export import joined_sha256
from storage.artifacts import ArtifactStore
from storage.reader import Reader

RECORD_FILE = "trunkline.json"
TIMEOUT_S = 1800.0
UNKNOWN_CUT = CutLayers(1, 1)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    ok: bool
    found: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found. `committed` says whether this machine's SQL knows the run that the adapter says it is from."""

    adapter: Path
    model: str
    adapter_sha256: str
    committed: bool
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)


def verify_adapter(directory: Path, model: str | None, reader: Reader | None, artifacts: ArtifactStore) -> Verification:
    """Check an export; `model` defaults to the one that its record names, and without a `reader` no SQL is asked.

    A failed check is in the answer. Raises ModelError where the adapter or the model cannot be loaded at all.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory; name an exported adapter")
    record_path = directory / RECORD_FILE
    record = read_json(record_path) if record_path.is_file() else {}
    found_origin = record.get("origin")
    origin: Mapping[str, Any] = found_origin if isinstance(found_origin, dict) else {}
    base_model = model or str(record.get("base_model", ""))
    if not base_model:
        raise ModelError(f"{directory} does not say what model it is for; name it with --model")
    resolve_model(base_model)
    sql_findings, expected = _against_sql(origin, reader, artifacts)
    report = _in_fresh_process(_question(directory, base_model, origin, expected))
    checked = [Finding(check["name"], check["ok"], check["found"]) for check in report["checks"]]
    return Verification(
        directory, base_model, report["adapter_sha256"], expected is not None, (*sql_findings, *checked)
    )


def _against_sql(
    origin: Mapping[str, Any], reader: Reader | None, artifacts: ArtifactStore
) -> tuple[list[Finding], str | None]:
    """What SQL says about the version that the export's record names, and the id that its weights must have."""
    if reader is None:
        return [], None
    try:
        run = reader.get_run(str(origin.get("run", "")))
        version = reader.adapter_version(run.run_id, int(origin.get("round", -1)))
    except (StorageError, ValueError, TypeError):
        return [], None
    same = (origin.get("client_sha256"), origin.get("trunk_sha256")) == (version.client_sha256, version.trunk_sha256)
    told = f"{RECORD_FILE} against run {run.run_id}, round {version.number}"
    return [Finding("parts committed in SQL", same, told)], joined_sha256(artifacts, version)


def _question(directory: Path, model: str, origin: Mapping[str, Any], expected_sha256: str | None) -> dict[str, Any]:
    try:
        head = int(origin.get("head_layers", UNKNOWN_CUT.head))
        tail = int(origin.get("tail_layers", UNKNOWN_CUT.tail))
    except (ValueError, TypeError):
        raise ModelError(
            f"{directory / RECORD_FILE} was changed: its head_layers or tail_layers is no number"
        ) from None
    return {
        "directory": str(directory),
        "model": model,
        "head_layers": head,
        "tail_layers": tail,
        "dtype": str(origin.get("dtype", "float32")),
        "attn_implementation": str(origin.get("attn_implementation", "sdpa")),
        "expected_sha256": expected_sha256,
    }


def _in_fresh_process(question: Mapping[str, Any]) -> dict[str, Any]:
    directory = question["directory"]
    command = [sys.executable, "-m", "orchestrator.verification"]
    try:
        done = subprocess.run(
            command, input=json.dumps(dict(question)), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise DeadlineError(f"the check of {directory} took longer than {TIMEOUT_S:g} s") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ModelError(f"the check of {directory} failed: {last[0]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise (error_named(answer["error"]) or ModelError)(answer["message"])
    return answer


def _answer(question: Mapping[str, Any]) -> dict[str, Any]:
    from contract.adapter_proof import verify_export
    from contract.errors import TrunklineError

    try:
        report = verify_export(
            question["directory"],
            question["model"],
            cut=CutLayers(question["head_layers"], question["tail_layers"]),
            expected_sha256=question["expected_sha256"],
            dtype=question["dtype"],
            attn_implementation=question["attn_implementation"],
        )
    except TrunklineError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return asdict(report)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answer(json.load(sys.stdin))))
