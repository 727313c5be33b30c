"""The base model as the orchestrator needs it: its configuration, and its fingerprint where the weights are here."""

from __future__ import annotations

from pathlib import Path

from contract.errors import ConfigError
from contract.model_files import CONFIG_FILE, part_info


def find_model(model: str) -> Path:
    """The directory that the run's setting `model` names: a whole checkpoint, a part, or config.json alone.

    Raises ConfigError where there is none.
    """
    directory = Path(model).expanduser()
    if not model or not (directory / CONFIG_FILE).is_file():
        raise ConfigError(
            f"model is {model!r}; it must be the absolute path of a directory that holds {CONFIG_FILE}, "
            "as this orchestrator sees it"
        )
    return directory


def model_fingerprint(directory: Path) -> str | None:
    """The model's fingerprint, or None where the directory holds no weights to take it from.

    A whole checkpoint is read from end to end. Raises ModelError where it, or a part's record, is broken.
    """
    info = part_info(directory)
    if info is not None:
        return info.fingerprint
    if not any(directory.glob("*.safetensors")):
        return None
    from contract.checkpoint import fingerprint

    return fingerprint(directory)
