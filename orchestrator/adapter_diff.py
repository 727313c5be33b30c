"""Two adapters side by side: how far each parameter, and each module's change of its weights, is from the other's.

What a module's LoRA adds to its weights is s B A; two adapters whose factors differ may add the same. That product is
compared a few rows at a time, so that no whole one is ever in memory. Arithmetic is float64. torch is imported inside
the functions: commands that only read SQL must not wait for it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contract.errors import ConfigError, ModelError, StorageError
from orchestrator.export import joined, structure
from storage.artifacts import ArtifactStore
from storage.reader import Reader

if TYPE_CHECKING:
    from torch import Tensor

_PRODUCT_VALUES = 1 << 22
"""How many values of a product are computed at once: 32 MiB of float64."""
_FACTORS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter's values and how they apply: `lora` gives rank and scale by a module's full name."""

    name: str
    sha256: str
    tensors: Mapping[str, Tensor]
    lora: Callable[[str], tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Difference:
    """How B differs from A in one parameter, in one module's product, or in all of a kind (`name` "total").

    `relative` is the norm of B - A over A's, None where A is zero; `cosine` None where either is. Where the two cannot
    be compared, `note` says why and the numbers are None.
    """

    name: str
    kind: str
    equal: bool
    norm_a: float | None = None
    norm_b: float | None = None
    norm_difference: float | None = None
    relative: float | None = None
    cosine: float | None = None
    max_abs: float | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterDiff:
    """`equal` says that both have the same hash: their weights are equal to the bit."""

    a: str
    b: str
    a_sha256: str
    b_sha256: str
    equal: bool
    parameters: Difference
    products: Difference
    by_parameter: tuple[Difference, ...]
    by_module: tuple[Difference, ...]


@dataclass(slots=True)
class _Sums:
    """What norms and angles are made of, added up in float64."""

    a: float = 0.0
    b: float = 0.0
    difference: float = 0.0
    dot: float = 0.0
    max_abs: float = 0.0
    equal: bool = True

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in two float64 tensors of one shape."""
        change = b - a
        self.a += float((a * a).sum())
        self.b += float((b * b).sum())
        self.dot += float((a * b).sum())
        self.difference += float((change * change).sum())
        largest = float(change.abs().max()) if change.numel() else 0.0
        self.max_abs = largest if math.isnan(largest) else max(self.max_abs, largest)
        self.equal = self.equal and bool((a == b).all())

    def join(self, other: _Sums) -> None:
        for name in ("a", "b", "difference", "dot"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max_abs = other.max_abs if math.isnan(other.max_abs) else max(self.max_abs, other.max_abs)
        self.equal = self.equal and other.equal

    def told(self, name: str, kind: str, note: str | None = None) -> Difference:
        norm_a, norm_b = math.sqrt(self.a), math.sqrt(self.b)
        norm_difference = math.sqrt(self.difference)
        return Difference(
            name, kind, self.equal and note is None, norm_a, norm_b, norm_difference,
            norm_difference / norm_a if norm_a else None,
            self.dot / (norm_a * norm_b) if norm_a and norm_b else None,
            self.max_abs, note,
        )  # fmt: skip


def read_adapter(named: str, reader: Reader | None, artifacts: ArtifactStore) -> NamedAdapter:
    """The adapter that `named` stands for: an exported directory, RUN for its newest one, or RUN@ROUND.

    Raises ConfigError for what is none of them, StorageError, IntegrityError and ModelError where it cannot be read.
    """
    directory = Path(named)
    if directory.is_dir():
        return _exported(directory)
    if reader is None:
        raise StorageError(f"{named!r} is no directory, and this machine has no database whose runs it could name")
    of_run, at, number = named.rpartition("@")
    if at and not number.isdecimal():
        raise ConfigError(f"the adapter is {named!r}; it must be a directory, RUN or RUN@ROUND with a whole number")
    run = reader.get_run(of_run if at else named)
    version = reader.adapter_version(run.run_id, int(number) if at else run.committed_rounds)
    from contract.adapter import sha256_hex, to_bytes

    tensors, spec = joined(artifacts, version), structure(reader, run.run_id)

    def lora(target: str) -> tuple[int, float]:
        return spec.rank_pattern.get(target, spec.rank), spec.scale_of(target)

    return NamedAdapter(f"{run.run_id}@{version.number}", sha256_hex(to_bytes(tensors)), tensors, lora)


def _exported(directory: Path) -> NamedAdapter:
    from contract.adapter import CONFIG_FILE, WEIGHTS_FILE, from_bytes, sha256_hex

    try:
        weights, raw = (directory / WEIGHTS_FILE).read_bytes(), (directory / CONFIG_FILE).read_bytes()
    except OSError as error:
        raise ModelError(
            f"{directory} is no exported adapter: cannot read {error.filename}: {error.strerror}"
        ) from error
    return NamedAdapter(str(directory), sha256_hex(weights), from_bytes(weights), _lora_of(directory, raw))


def _lora_of(directory: Path, raw: bytes) -> Callable[[str], tuple[int, float]]:
    """Rank and scale as PEFT reads them from an adapter's settings."""
    from peft.utils.other import get_pattern_key

    from contract.adapter import CONFIG_FILE

    try:
        told: dict[str, Any] = json.loads(raw)
        rank, alpha = int(told["r"]), float(told["lora_alpha"])
        ranks = {str(name): int(value) for name, value in (told.get("rank_pattern") or {}).items()}
        alphas = {str(name): float(value) for name, value in (told.get("alpha_pattern") or {}).items()}
        rooted = bool(told.get("use_rslora"))
        for pattern in (*ranks, *alphas):
            re.compile(pattern)
        if min([rank, *ranks.values()]) < 1:
            raise ValueError("a rank is below 1")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, re.error) as error:
        raise ModelError(f"{directory / CONFIG_FILE} holds no settings of a LoRA adapter: {error}") from error

    def lora(target: str) -> tuple[int, float]:
        r = ranks.get(get_pattern_key(ranks, target), rank)
        scaled = alphas.get(get_pattern_key(alphas, target), alpha)
        return r, scaled / math.sqrt(r) if rooted else scaled / r

    return lora


def diff(a: NamedAdapter, b: NamedAdapter) -> AdapterDiff:
    """Compare two adapters: each parameter of either, and each module's product."""
    names = sorted({*a.tensors, *b.tensors})
    parameters, of_parameters = _all_of("parameter", names, lambda name: _parameter(name, a, b))
    modules = sorted({module for name in names if (module := _module(name)) is not None})
    products, of_products = _all_of("product", modules, lambda module: _product(module, a, b))
    return AdapterDiff(
        a.name, b.name, a.sha256, b.sha256, a.sha256 == b.sha256,
        of_parameters, of_products, tuple(parameters), tuple(products),
    )  # fmt: skip


def _all_of(
    kind: str, names: Iterable[str], compare: Callable[[str], _Sums | str]
) -> tuple[list[Difference], Difference]:
    """A difference for each name, and that of all of them together that could be compared."""
    total, rows, left_out = _Sums(), [], 0
    for name in names:
        found = compare(name)
        if isinstance(found, str):
            rows.append(Difference(name, kind, False, note=found))
            left_out += 1
            continue
        rows.append(found.told(name, kind))
        total.join(found)
    note = f"{left_out} of {len(rows)} could not be compared" if left_out else None
    return rows, total.told("total", kind, note)


def _parameter(name: str, a: NamedAdapter, b: NamedAdapter) -> _Sums | str:
    if (missing := _missing(name, a, b)) is not None:
        return missing
    one, other = a.tensors[name], b.tensors[name]
    if one.shape != other.shape:
        return f"of shape {tuple(one.shape)} in A, {tuple(other.shape)} in B"
    sums = _Sums()
    sums.add(one.double(), other.double())
    return sums


def _missing(name: str, a: NamedAdapter, b: NamedAdapter) -> str | None:
    if name in a.tensors and name in b.tensors:
        return None
    return "in A only" if name in a.tensors else "in B only"


def _module(name: str) -> str | None:
    """The module whose factor the parameter is, as it is named in the adapter."""
    return next((name.removesuffix(factor) for factor in _FACTORS if name.endswith(factor)), None)


def _product(module: str, a: NamedAdapter, b: NamedAdapter) -> _Sums | str:
    for factor in _FACTORS:
        if (missing := _missing(module + factor, a, b)) is not None:
            return missing
    try:
        ours, theirs = _factors(module, a), _factors(module, b)
    except ModelError as error:
        return str(error)
    sizes = [(len(left), left.shape[1], right.shape[2]) for left, right in (ours, theirs)]
    if sizes[0] != sizes[1]:
        return f"of shape {sizes[0]} in A, {sizes[1]} in B"
    (b_a, a_a), (b_b, a_b) = ours, theirs
    rows = max(1, _PRODUCT_VALUES // max(1, a_a.shape[2]))
    sums = _Sums()
    for expert in range(len(b_a)):
        for start in range(0, b_a.shape[1], rows):
            piece = slice(start, start + rows)
            sums.add(b_a[expert, piece] @ a_a[expert], b_b[expert, piece] @ a_b[expert])
    return sums


def _factors(module: str, adapter: NamedAdapter) -> tuple[Tensor, Tensor]:
    """s B and A in float64, of shapes (experts, out, rank) and (experts, rank, in); one expert for a linear layer.

    Fused experts lie in the factors as PEFT's ParamWrapper has them: A by expert, B with the expert as its last index.
    """
    from contract.adapter import PREFIX

    one, other = (adapter.tensors[module + factor].double() for factor in _FACTORS)
    rank, scale = adapter.lora(module.removeprefix(PREFIX))
    if one.ndim != 2 or other.ndim != 2 or one.shape[0] != other.shape[1] or one.shape[0] % rank:
        raise ModelError(f"no product: A is {tuple(one.shape)} and B {tuple(other.shape)} at rank {rank}")
    experts = one.shape[0] // rank
    right = one.reshape(experts, rank, one.shape[1])
    left = scale * other.reshape(other.shape[0], rank, experts).permute(2, 0, 1)
    return left, right
