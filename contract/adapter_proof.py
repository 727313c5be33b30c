"""The proof that an exported adapter is what was trained: stock PEFT against the split system, bitwise."""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from contract.adapter import (
    CONFIG_FILE,
    RECORD_FILE,
    WEIGHTS_FILE,
    add_lora,
    from_bytes,
    load_adapter_,
    resolve_lora,
    sha256_hex,
    split_adapter,
)
from contract.architecture import first_line, model_class, probe, read_config
from contract.errors import ModelError
from contract.model_files import part_info, read_json, resolve_model
from contract.partition import DTYPES, TrunkPart, attach_remote, check_attention, load_part, quiet_loading
from contract.records import CutLayers

_ROWS, _TOKENS = 2, 16


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a report: what was looked at, whether it held, and what was found."""

    name: str
    ok: bool
    found: str


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What `verify_export` found. `adapter_sha256` is of the file as it lies there."""

    adapter_sha256: str
    tensors: int
    parameters: int
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def verify_export(
    directory: str | Path,
    model_dir: str | Path,
    *,
    cut: CutLayers,
    expected_sha256: str | None = None,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
) -> ExportReport:
    """Load an export with stock PEFT on the whole model and compare it with the split system, bitwise.

    `expected_sha256` is the adapter's id from a source other than the directory. A failed check is in the report;
    ModelError is raised where the adapter or the model cannot be loaded at all.
    """
    path = Path(directory)
    try:
        weights = (path / WEIGHTS_FILE).read_bytes()
        config_bytes = (path / CONFIG_FILE).read_bytes()
    except OSError as error:
        raise ModelError(f"{path} is not an adapter: {error.strerror} ({error.filename})") from error
    tensors = from_bytes(weights)
    checks = _hash_checks(path, sha256_hex(weights), hashlib.sha256(config_bytes).hexdigest(), expected_sha256)
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    checks.append(Check("finite", not bad, f"{len(bad)} tensors hold NaN or infinity" if bad else "every value is"))
    checks += _logit_checks(path, resolve_model(model_dir), tensors, cut, dtype, attn_implementation)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    return ExportReport(sha256_hex(weights), len(tensors), parameters, tuple(checks))


def _hash_checks(path: Path, weights: str, config: str, expected: str | None) -> list[Check]:
    record = read_json(path / RECORD_FILE) if (path / RECORD_FILE).is_file() else {}
    checks = [
        Check("weights hash", record.get("adapter_sha256") == weights, f"{RECORD_FILE} against {WEIGHTS_FILE}"),
        Check("settings hash", record.get("config_sha256") == config, f"{RECORD_FILE} against {CONFIG_FILE}"),
    ]
    if expected is not None:
        checks.append(Check("committed hash", expected == weights, f"committed {expected[:12]}, found {weights[:12]}"))
    return checks


def _logit_checks(
    path: Path, model_dir: Path, tensors: Mapping[str, Tensor], cut: CutLayers, dtype: str, attention: str
) -> list[Check]:
    base, stock = _stock_logits(path, model_dir, dtype, attention)
    gc.collect()
    split = _split_logits(path, model_dir, tensors, cut, dtype, attention)
    change = float((stock - base).abs().max())
    error = float((stock - split).abs().max())
    return [
        Check("changes the model", change > 0 and math.isfinite(change), f"logits move by up to {change:.3g}"),
        Check("equals the split system", torch.equal(stock, split), f"logits differ by up to {error:.3g}"),
    ]


def _stock_logits(path: Path, model_dir: Path, dtype: str, attention: str) -> tuple[Tensor, Tensor]:
    if part_info(model_dir) is not None:
        raise ModelError(f"{model_dir} is one part of a model; the whole model is needed to verify an adapter")
    config = read_config(model_dir)
    check_attention(config, attention)
    with quiet_loading():
        try:
            whole: PreTrainedModel = model_class(config).from_pretrained(
                model_dir, dtype=DTYPES[dtype], attn_implementation=attention, use_safetensors=True
            )
            model = PeftModel.from_pretrained(whole, path).eval()
        # Loaders raise errors of many classes; each of them means that stock PEFT cannot use this adapter.
        except Exception as error:
            raise ModelError(f"{path} cannot be loaded by PEFT on {model_dir}: {first_line(error)}") from error
    with model.disable_adapter():
        base = _logits(model)
    return base, _logits(model)


def _split_logits(
    path: Path, model_dir: Path, tensors: Mapping[str, Tensor], cut: CutLayers, dtype: str, attention: str
) -> Tensor:
    spec = resolve_lora(model_dir, LoraConfig.from_pretrained(path))
    halves = split_adapter(tensors, probe(model_dir), cut)
    client, trunk = (
        add_lora(load_part(model_dir, cut, side, dtype=dtype, attn_implementation=attention), spec).eval()
        for side in ("client", "trunk")
    )
    load_adapter_(client, halves[0])
    load_adapter_(trunk, halves[1])
    attach_remote(client, TrunkPart(trunk, cut))
    return _logits(client)


def _logits(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    input_ids = torch.randint(0, config.vocab_size, (_ROWS, _TOKENS), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[0, : _TOKENS // 4] = 0
    with torch.no_grad():
        logits: Tensor = model(input_ids=input_ids, attention_mask=mask).logits
    return logits[mask.bool()].float()
