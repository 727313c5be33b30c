"""What a checkpoint directory holds, read without torch: weight files, safetensors headers, a part's own record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from contract.errors import ModelError
from contract.records import CutLayers, Side

CONFIG_FILE = "config.json"
PART_FILE = "trunkline.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 256 * 1024 * 1024

# safetensors' own names; the size is in bytes per element.
_NAMES_BY_SIZE = {8: "F64 I64", 4: "F32 I32", 2: "F16 BF16 I16", 1: "I8 U8 BOOL F8_E4M3 F8_E5M2"}
DTYPE_SIZES = {name: size for size, names in _NAMES_BY_SIZE.items() for name in names.split()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor's bytes lie: `start` is the absolute offset in `path`; `size` is in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class PartInfo:
    """What `trunkline model split` wrote beside a part. `dtype` is "" where the weights kept their own."""

    fingerprint: str
    cut: CutLayers
    side: Side
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return {
            "format": 1,
            "fingerprint": self.fingerprint,
            "head_layers": self.cut.head,
            "tail_layers": self.cut.tail,
            "side": self.side,
            "dtype": self.dtype,
        }


def resolve_model(model: str | Path, *, weights: bool = True) -> Path:
    """The directory of a local checkpoint, or of a hub id's files once they are downloaded, the safetensors only with
    `weights`.

    Raises ModelError where there is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or str(model).count("/") != 1 or str(model).startswith("."):
        raise ModelError(f"model {str(model)!r} is not a directory; it must hold {CONFIG_FILE} and safetensors")
    return _download(str(model), weights)


def _download(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.model", "tokenizer*", "merges.txt", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {hub_id!r} is neither a local directory nor a hub id that can be fetched from here: "
            f"{type(error).__name__}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelError where it is missing or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return cast(dict[str, Any], value)


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name.

    Raises ModelError where there are none, where a shard of the index is missing, or where the directory holds
    pickled weights only, which are never read.
    """
    index = model_dir / INDEX_FILE
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index} has no weight_map")
        files = sorted({model_dir / str(name) for name in shards.values()})
        for file in files:
            if file.parent != model_dir or not file.is_file():
                raise ModelError(f"{index} names {file.name}, which is not in {model_dir}")
        return files
    if (model_dir / WEIGHTS_FILE).is_file():
        return [model_dir / WEIGHTS_FILE]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in model_dir.glob(pattern))
    if pickled:
        raise ModelError(
            f"{model_dir} holds pickled weights only ({pickled[0]}), which are not read: "
            "convert them with save_pretrained to safetensors first"
        )
    raise ModelError(f"{model_dir} holds no weights: it needs {WEIGHTS_FILE} or {INDEX_FILE} with its shards")


def stored_tensors(model_dir: Path) -> list[StoredTensor]:
    """Every tensor of a checkpoint from the headers alone, sorted by name. Raises ModelError on a broken header."""
    found: dict[str, StoredTensor] = {}
    for file in weight_files(model_dir):
        for tensor in _file_tensors(file):
            if tensor.name in found:
                raise ModelError(f"{tensor.name} is in {found[tensor.name].path.name} and in {file.name}")
            found[tensor.name] = tensor
    return [found[name] for name in sorted(found)]


def _file_tensors(file: Path) -> list[StoredTensor]:
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > min(MAX_HEADER_BYTES, max(file_bytes - 8, 0)):
            raise ModelError(f"{file} is not a whole safetensors file: its header says {header_bytes} bytes")
        raw = stream.read(header_bytes)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = []
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            shape = tuple(int(size) for size in entry["shape"])
            start = 8 + header_bytes + int(begin)
            tensors.append(StoredTensor(name, str(entry["dtype"]), shape, file, start, int(end) - int(begin)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} has a broken safetensors header: {error}") from error
    for tensor in tensors:
        _check_extent(tensor, file_bytes)
    return tensors


def _check_extent(tensor: StoredTensor, file_bytes: int) -> None:
    elements = 1
    for size in tensor.shape:
        elements *= size
    if tensor.dtype not in DTYPE_SIZES:
        raise ModelError(f"{tensor.path.name}: {tensor.name} has dtype {tensor.dtype}, which is not supported")
    if tensor.size != elements * DTYPE_SIZES[tensor.dtype] or min((0, tensor.size, *tensor.shape)) < 0:
        raise ModelError(f"{tensor.path.name}: {tensor.name} has {tensor.size} bytes for shape {tensor.shape}")
    if tensor.start + tensor.size > file_bytes:
        raise ModelError(f"{tensor.path} is truncated: {tensor.name} ends past the end of the file")


def read_into(tensor: StoredTensor, buffer: memoryview) -> None:
    """Fill `buffer` (of `tensor.size` bytes) from the file. Raises ModelError where the file ends too soon."""
    with tensor.path.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        filled = 0
        while filled < tensor.size:
            count = stream.readinto(buffer[filled:])
            if not count:
                raise ModelError(f"{tensor.path} is truncated: {tensor.name} ends past the end of the file")
            filled += count


def part_info(model_dir: str | Path) -> PartInfo | None:
    """The record of a part checkpoint, or None for a whole one. Raises ModelError where the record is broken."""
    path = Path(model_dir) / PART_FILE
    if not path.is_file():
        return None
    record = read_json(path)
    try:
        side, dtype = record["side"], record["dtype"]
        if record["format"] != 1 or side not in ("client", "trunk") or dtype not in ("", "float32", "bfloat16"):
            raise ValueError("unknown format, side or dtype")
        cut = CutLayers(int(record["head_layers"]), int(record["tail_layers"]))
        return PartInfo(str(record["fingerprint"]), cut, side, dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is not a part's record: {error}") from error
