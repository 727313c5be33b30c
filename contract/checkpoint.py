"""A checkpoint's identity, and its two parts on disk.

Weights are read by plain reads, a piece at a time, so that hashing or splitting a model takes no memory for it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from contract.architecture import probe
from contract.errors import ConfigError, ModelError, StorageError
from contract.model_files import (
    CONFIG_FILE,
    DTYPE_SIZES,
    INDEX_FILE,
    PART_FILE,
    WEIGHTS_FILE,
    PartInfo,
    StoredTensor,
    part_info,
    read_json,
    resolve_model,
    stored_tensors,
)
from contract.records import CutLayers, Side

__all__ = ["PartInfo", "fingerprint", "make_folder", "part_bytes", "part_info", "write_parts"]

_PIECE_BYTES = 8 * 1024 * 1024
SHARD_BYTES = 2 * 1024**3

# How a configuration was written or is run, not what the model is.
_NOT_THE_MODEL = frozenset(
    {
        *(
            "transformers_version",
            "_name_or_path",
            "name_or_path",
            "torch_dtype",
            "dtype",
            "use_cache",
            "architectures",
        ),
        *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "gradient_checkpointing"),
    }
)
_CLIENT_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
_CLIENT_EXTRAS = ("generation_config.json", "chat_template*")
_DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_known: dict[tuple[object, ...], str] = {}


def fingerprint(model_dir: str | Path) -> str:
    """SHA-256 (hex) of the configuration and of every weight; a part answers that of the model it was cut from.

    Sharding, tensor order in the files and how the configuration was written do not matter. Raises ModelError where
    the checkpoint is unreadable or has no safetensors.
    """
    directory = resolve_model(model_dir)
    info = part_info(directory)
    if info is not None:
        return info.fingerprint
    tensors = stored_tensors(directory)
    files = [directory / CONFIG_FILE, *sorted({tensor.path for tensor in tensors})]
    try:
        states = [(str(path), stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()]]
    except OSError as error:
        raise ModelError(f"cannot read {error.filename}: {error.strerror}") from error
    key = tuple(states)
    if key not in _known:
        _known[key] = _hash_model(directory, tensors)
    return _known[key]


def _hash_model(directory: Path, tensors: Sequence[StoredTensor]) -> str:
    config = read_json(directory / CONFIG_FILE)
    kept = {name: value for name, value in config.items() if name not in _NOT_THE_MODEL}
    whole = hashlib.sha256(b"trunkline model 1\n")
    whole.update(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())
    for tensor in tensors:
        one = hashlib.sha256()
        for piece in _pieces(tensor):
            one.update(piece)
        whole.update(f"\n{tensor.name} {tensor.dtype} {tensor.shape} {one.hexdigest()}".encode())
    return whole.hexdigest()


def _pieces(tensor: StoredTensor) -> Iterator[bytes]:
    with tensor.path.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        left = tensor.size
        while left:
            piece = stream.read(min(left, _PIECE_BYTES))
            if not piece:
                raise ModelError(f"{tensor.path} is truncated: {tensor.name} ends past the end of the file")
            left -= len(piece)
            yield piece


# ---- parts ---------------------------------------------------------------------------------------------------------


def write_parts(model_dir: str | Path, out_dir: str | Path, cut: CutLayers, dtype: str | None = None) -> dict[str, int]:
    """Write `out_dir`/client and `out_dir`/trunk, each a checkpoint for `load_part`; answer sizes in bytes of weights.

    The answer's keys are "client", "trunk" and "whole" (as written: client + trunk == whole). `dtype` ("float32" or
    "bfloat16") converts floating-point weights; None keeps theirs. Tokenizer files go with the client. Each directory
    appears whole or not at all, and neither without the other. Raises ConfigError (cut, dtype, a part is already
    there), ModelError and StorageError.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
    directory, out = resolve_model(model_dir), Path(out_dir)
    if part_info(directory) is not None:
        raise ModelError(f"{directory} is a part already; split the whole model")
    client, trunk = _parted(directory, cut)
    identity = fingerprint(directory)
    sizes: dict[str, int] = {}
    sides: tuple[tuple[Side, list[StoredTensor]], ...] = (("client", client), ("trunk", trunk))
    for side, _ in sides:
        if os.path.lexists(out / side):
            raise ConfigError(f"{out / side} exists already; name another directory or remove it")
    try:
        for side, chosen in sides:
            info = PartInfo(identity, cut, side, dtype or "")
            sizes[side] = _write_part(directory, out / side, chosen, info)
    except BaseException:
        for written in sizes:
            shutil.rmtree(out / written, ignore_errors=True)
        raise
    return {**sizes, "whole": sizes["client"] + sizes["trunk"]}


def part_bytes(model_dir: str | Path, cut: CutLayers, side: Side, dtype: str) -> int:
    """Bytes of the weights of one side, floating-point ones in `dtype`, from the headers alone.

    `model_dir` is the whole model, or that side's part, whose own cut counts. Raises ConfigError for a cut that the
    model cannot have, ModelError, UnsupportedModelError.
    """
    directory = resolve_model(model_dir)
    info = part_info(directory)
    if info is None:
        tensors = _parted(directory, cut)[0 if side == "client" else 1]
    elif info.side != side:
        raise ModelError(f"{directory} is the {info.side} part of a model; name the whole one or its {side} part")
    else:
        tensors = stored_tensors(directory)
    return sum(_written_size(tensor, dtype) for tensor in tensors)


def _parted(directory: Path, cut: CutLayers) -> tuple[list[StoredTensor], list[StoredTensor]]:
    """The tensors of a whole checkpoint that are the client's, and those that are the trunk's."""
    found = probe(directory)
    cut.check(found.layers)
    tensors = stored_tensors(directory)
    layer_of = _layer_reader(found.layers_path)
    trunk_layers = cut.kept(found.layers, "trunk")
    trunk = [tensor for tensor in tensors if layer_of(tensor.name) in trunk_layers]
    held = {layer_of(tensor.name) for tensor in trunk}
    if held != trunk_layers:
        raise ModelError(f"{directory} has no weights for layers {sorted(trunk_layers - held)}")
    return [tensor for tensor in tensors if layer_of(tensor.name) not in trunk_layers], trunk


def _layer_reader(layers_path: str) -> Callable[[str], int | None]:
    pattern = re.compile(rf"(?:^|\.){re.escape(layers_path.rpartition('.')[2])}\.(\d+)\.")

    def layer_of(name: str) -> int | None:
        match = pattern.search(name)
        return None if match is None else int(match[1])

    return layer_of


def make_folder(path: Path) -> None:
    """Make `path` and what is above it, where it is not there yet; an OSError says what stands in its way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        blocking = next(place for place in (path, *path.parents) if os.path.lexists(place))
        raise NotADirectoryError(errno.ENOTDIR, f"{blocking} is not a directory") from error


def _write_part(source: Path, target: Path, tensors: Sequence[StoredTensor], info: PartInfo) -> int:
    try:
        make_folder(target.parent)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            size = _fill_part(source, staging, tensors, info)
            os.rename(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
    return size


def _fill_part(source: Path, staging: Path, tensors: Sequence[StoredTensor], info: PartInfo) -> int:
    shutil.copyfile(source / CONFIG_FILE, staging / CONFIG_FILE)
    if info.side == "client":
        for pattern in (*_CLIENT_FILES, *_CLIENT_EXTRAS):
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, staging / file.name)
    size = _write_shards(staging, tensors, info.dtype)
    (staging / PART_FILE).write_text(json.dumps(info.to_json(), indent=2) + "\n", encoding="utf-8")
    staging.chmod(0o755)
    return size


def _write_shards(directory: Path, tensors: Sequence[StoredTensor], dtype: str) -> int:
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _written_size(tensor, dtype)
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    names = [WEIGHTS_FILE]
    if len(shards) > 1:
        names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
        index = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        _write_shard(directory / name, shard, dtype)
    return sum(_written_size(tensor, dtype) for tensor in tensors)


def _write_shard(path: Path, tensors: Iterable[StoredTensor], dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + _written_size(tensor, dtype)
        name = _DTYPES[dtype][0] if _converts(tensor, dtype) else tensor.dtype
        header[tensor.name] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            for piece in _pieces(tensor):
                stream.write(_convert(piece, tensor.dtype, dtype) if _converts(tensor, dtype) else piece)
        stream.flush()
        os.fsync(stream.fileno())


def _converts(tensor: StoredTensor, dtype: str) -> bool:
    return dtype != "" and tensor.dtype in _FLOATS and tensor.dtype != _DTYPES[dtype][0]


def _written_size(tensor: StoredTensor, dtype: str) -> int:
    if not _converts(tensor, dtype):
        return tensor.size
    return tensor.size // DTYPE_SIZES[tensor.dtype] * DTYPE_SIZES[_DTYPES[dtype][0]]


def _convert(piece: bytes, stored: str, dtype: str) -> bytes:
    values = torch.frombuffer(bytearray(piece), dtype=_FLOATS[stored]).to(_DTYPES[dtype][1])
    return values.contiguous().view(torch.uint8).numpy().tobytes()
