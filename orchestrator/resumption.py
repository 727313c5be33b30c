"""Going on with a run from its last committed round, as whoever began it would have."""

from __future__ import annotations

import logging

from contract.config import RunConfig
from contract.errors import AgreementError, ConfigError, StorageError
from contract.setting import key_of
from orchestrator.adapters import ClientPart
from orchestrator.desk import Desk, Version
from orchestrator.trunk import ServedModel
from storage.records import RunRow

log = logging.getLogger("trunkline.orchestrator")

RESUMED = key_of("resume_run")
MAY_CHANGE = frozenset(
    key_of(name)
    for name in (
        *("resume_run", "model", "trunk_address", "node_wait_s", "round_timeout_s"),
        *("secagg_stage_timeout_s", "secagg_aborts", "trunk_retries", "trunk_wait_s"),
    )
)
"""Where things are and how long is waited for them. Everything else decides what a run's rounds come to."""


def require_same_run(run: RunRow, config: RunConfig, served: ServedModel) -> None:
    """Raise ConfigError, naming the first setting that is another one than the run began with, or AgreementError.

    StorageError where the run never began.
    """
    if not run.model_fingerprint:
        raise StorageError(f"run {run.run_id} was refused before it began: {run.reason}; start it anew")
    began_with = RunConfig.from_flower({}).to_flower() | dict(run.config)
    for key, value in config.to_flower().items():
        if key not in MAY_CHANGE and began_with[key] != value:
            raise ConfigError(
                f"{key} is {value!r}, and run {run.run_id} began with {began_with[key]!r}; a run that is resumed keeps "
                "its settings"
            )
    if run.model_fingerprint != served.fingerprint:
        raise AgreementError(
            f"run {run.run_id} trains a model of fingerprint {run.model_fingerprint}; the trunk serves "
            f"{served.fingerprint}"
        )


def newest_version(desk: Desk) -> Version | None:
    """The run's last committed adapter, which the trunk is given again; None where it has none yet.

    Raises StorageError and IntegrityError where one of its halves is gone or not what was committed.
    """
    committed = desk.store.adapter_versions(desk.run_id)
    if not committed:
        return None
    row = committed[-1]
    client, trunk = desk.artifacts.get(row.client_sha256), desk.artifacts.get(row.trunk_sha256)
    desk.trunk.put_adapter(trunk)
    log.info("run %s goes on after round %d", desk.run_id, row.number)
    return Version(row.number, ClientPart.from_bytes(client), row.client_sha256, row.trunk_sha256)
