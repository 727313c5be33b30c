"""What each committed round of a deterministic run must have come to, computed apart: without masks and without kills.

From the version before it the same sites, exactly those that SQL says are in the sum, train once more in clear, and
their updates are summed as a cohort of that size sums them. Where a round was played over all sites this is what an
undisturbed run comes to; where one was lost, what it comes to without that one in that round.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from contract import adapter
from contract.config import RunConfig
from contract.durable_file import replace_file
from orchestrator.adapters import ClientPart
from orchestrator.replicas import connect
from storage.artifacts import ArtifactStore
from storage.reader import Reader
from storage.records import RoundRow, RunRow
from tests.clients.sites import Orchestrator, Site, Version


@dataclass(frozen=True)
class Oracle:
    """`sites` by node id, which train at the trunk at `address`.

    `memory` is a folder in which answers are kept, as most runs ask for the same ones.
    """

    reader: Reader
    artifacts: ArtifactStore
    sites: Mapping[str, Site]
    address: str
    memory: Path

    def faults(self, run: RunRow) -> list[str]:
        """Each committed round whose adapter is another one than it must be."""
        rows = self.reader.adapter_versions(run.run_id)
        versions = {row.number: (row.client_sha256, row.trunk_sha256) for row in rows}
        wrong = []
        for row in self.reader.rounds(run.run_id):
            if row.status != "committed":
                continue
            due = self._due(run, row, versions[row.number - 1])
            if versions[row.number] != due:
                wrong.append(f"round {row.number} came to {versions[row.number]}, and in clear to {due}")
        return wrong

    def _due(self, run: RunRow, row: RoundRow, before: tuple[str, str]) -> tuple[str, str]:
        parts = self.reader.participations(run.run_id, row.number)
        cohort = [part for part in parts if part.attempt == row.attempt]
        survivors = sorted(part.node_id for part in cohort if part.status == "trained")
        asked = json.dumps([before, row.number, len(cohort), survivors])
        known = self.memory / hashlib.sha256(asked.encode()).hexdigest()
        if not known.exists():
            found = self._trained(run, row.number, before, len(cohort), survivors)
            self.memory.mkdir(parents=True, exist_ok=True)
            replace_file(known, json.dumps(found).encode())
        client, trunk = json.loads(known.read_text())
        return client, trunk

    def _trained(
        self, run: RunRow, number: int, before: tuple[str, str], cohort: int, survivors: list[str]
    ) -> tuple[str, str]:
        config = RunConfig.from_flower({**run.config, "secagg": "off", "trunk-address": self.address})
        client, trunk = (self.artifacts.get(sha256) for sha256 in before)
        orchestrator = Orchestrator(config, Path(config.model), self.address, f"oracle-{secrets.token_hex(4)}")
        orchestrator.trunk = connect(self.address)
        orchestrator.trunk.put_adapter(trunk)
        version = Version(number - 1, ClientPart.from_bytes(client), trunk)
        after = orchestrator.round(version, [self.sites[node_id] for node_id in survivors], cohort)
        orchestrator.trunk.close()
        return adapter.sha256_hex(after.client.to_bytes()), adapter.sha256_hex(after.trunk_bytes)
