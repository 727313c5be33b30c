"""The base model as the orchestrator needs it: its configuration, and its fingerprint where the weights are here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from contract.errors import ConfigError
from contract.model_files import CONFIG_FILE, part_info


@dataclass(frozen=True, slots=True)
class BaseModel:
    """`fingerprint` is None where the directory holds no weights to take it from."""

    directory: Path
    fingerprint: str | None


def find_model(model: str) -> BaseModel:
    """The model that the run's setting `model` names: a whole checkpoint, a part, or a directory with config.json.

    Raises ConfigError where there is none, ModelError where its weights or its part's record are broken.
    """
    directory = Path(model).expanduser()
    if not model or not (directory / CONFIG_FILE).is_file():
        raise ConfigError(
            f"model is {model!r}; it must be the absolute path of a directory that holds {CONFIG_FILE}, "
            "as this orchestrator sees it"
        )
    info = part_info(directory)
    if info is not None:
        return BaseModel(directory, info.fingerprint)
    if not any(directory.glob("*.safetensors")):
        return BaseModel(directory, None)
    from contract.checkpoint import fingerprint

    return BaseModel(directory, fingerprint(directory))
