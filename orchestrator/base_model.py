"""The base model as the orchestrator needs it: its configuration, and its fingerprint where the weights are here."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from contract.errors import ConfigError
from contract.model_files import CONFIG_FILE, part_info

log = logging.getLogger("trunkline.orchestrator")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_model(model: str) -> Path:
    """The directory that the run's setting `model` names: a whole checkpoint, a part, or config.json alone.

    Of a hub id only config.json is fetched. Raises ConfigError where there is none.
    """
    directory = Path(model).expanduser()
    if model and (directory / CONFIG_FILE).is_file():
        return directory
    fetched = _config_from_hub(model) if HUB_ID.fullmatch(model) and not directory.exists() else None
    if fetched is None:
        raise ConfigError(
            f"model is {model!r}; it must be the absolute path of a directory that holds {CONFIG_FILE}, "
            "as this orchestrator sees it, or a hub id that can be fetched from here"
        )
    return fetched


def _config_from_hub(hub_id: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(hub_id, CONFIG_FILE)).parent
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        log.warning("hub id %s cannot be fetched: %s", hub_id, type(error).__name__)
        return None


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
