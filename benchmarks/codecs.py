"""What each codec costs: bytes, milliseconds, the error of what comes back, and the loss of a model trained through it.

The demo's model learns from all of the demo's text through a real trunk on loopback, activations and gradients by the
same codec, and is judged on the held-out text the same way; then again with outlier channels planted at both cuts, and
on few rows that come again, where int4-delta has its use. A ratio is of the held-out loss over that of `identity` from
the same seed; its target holds for the worst seed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import clients
from benchmarks import hadamard, outliers
from benchmarks.processes import trunk_server
from benchmarks.report import Cell, Report, Spread, Target
from clients.data import TokenRow, load_dataset, load_tokenizer
from clients.split_model import remote_layers
from clients.trainer import judge, train
from contract import codec
from contract.adapter import run_lora
from contract.config import RunConfig
from contract.partition import quiet_loading
from contract.records import DELTA_CODEC
from demo.settings import MODEL_DIR, RUN_CONFIG, SOURCES

LOSS_RATIO_LIMIT = 1.01
REPEATED_ROWS = 80
"""What is trained on for int4-delta, so that rows come again: three epochs and more of a full run."""
SHAPES = ((4, 128, 512), (2, 512, 768))
_COLUMNS = ("what", "codec", "bytes", "encode_ms", "decode_ms", "error", "loss", "ratio", "ratio_max")


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. `outliers`: channels of a tensor that stick out; `heldout`: the most rows that judge."""

    outliers: tuple[int, ...]
    repeats: int
    seeds: int
    steps: int
    heldout: int


QUICK = Effort(outliers=(0, 4), repeats=5, seeds=1, steps=2, heldout=8)
FULL = Effort(outliers=(0, 1, 4, 16), repeats=41, seeds=3, steps=32, heldout=64)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codecs", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--quick", action="store_true", help="few steps of one seed: a sanity check, not a figure")
    options = parser.parse_args(argv)
    effort = QUICK if options.quick else FULL
    torch.set_num_threads(1)
    report = Report(
        "codecs",
        f"tensors of {' and '.join(map(_shown, SHAPES))} float32 and how many channels of them stick "
        f"out, one thread, {effort.repeats} repeats; the demo's model "
        f"(cut (1, 1), batch 8 x 128, LoRA r=16), {effort.steps} steps of {effort.seeds} seeds, {outliers.CHANNELS} "
        f"outlier channels at x{outliers.TIMES:g}",
    )
    report.results += tensor_rows(effort)
    with tempfile.TemporaryDirectory() as name, quiet_loading():
        train_all(effort, Path(name), report)
    return report.finish(options.json)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def tensor_rows(effort: Effort) -> Iterator[dict[str, Cell]]:
    """Gaussian tensors with none or some larger channels; `error` is relative, over all other channels."""
    for shape in SHAPES:
        for outliers_there in effort.outliers:
            tensor_BTD = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            tensor_BTD[..., :outliers_there] *= outliers.TIMES
            what = f"{_shown(shape)}, {outliers_there}"
            passages = {name: functools.partial(_by_codec, tensor_BTD, name) for name in codec.CODECS}
            passages["(rotation)"] = functools.partial(_by_rotation, tensor_BTD)
            for name, passage in passages.items():
                yield _timed(what, name, tensor_BTD, outliers_there, effort.repeats, passage)


Passage = tuple[float, float, int, Tensor]
"""Seconds to encode and to decode, bytes, and what comes back."""


def _by_codec(tensor_BTD: Tensor, name: str) -> Passage:
    started_s = time.perf_counter()
    header, data = codec.encode(tensor_BTD, name)
    encoded_s = time.perf_counter()
    back_BTD = codec.decode(header, data)
    return encoded_s - started_s, time.perf_counter() - encoded_s, len(data), back_BTD


def _by_rotation(tensor_BTD: Tensor) -> Passage:
    values_ND = tensor_BTD.view(-1, tensor_BTD.shape[-1])
    started_s = time.perf_counter()
    scale_N1, levels_ND = hadamard.pack(values_ND)
    encoded_s = time.perf_counter()
    back_ND = hadamard.unpack(scale_N1, levels_ND)
    ended_s = time.perf_counter()
    size = 4 * scale_N1.numel() + levels_ND.numel()
    return encoded_s - started_s, ended_s - encoded_s, size, back_ND.view_as(tensor_BTD)


def _timed(
    what: str, name: str, tensor_BTD: Tensor, planted: int, repeats: int, passage: Callable[[], Passage]
) -> dict[str, Cell]:
    encode_s, decode_s, sizes, backs = zip(*(passage() for _ in range(repeats)), strict=True)
    others_BTC, back_BTC = tensor_BTD[..., planted:], backs[0][..., planted:]
    return _row(
        what=what,
        codec=name,
        bytes=sizes[0],
        encode_ms=1e3 * statistics.median(encode_s),
        decode_ms=1e3 * statistics.median(decode_s),
        error=float((back_BTC - others_BTC).norm() / others_BTC.norm()),
    )


# ---- training --------------------------------------------------------------------------------------------------------


def train_all(effort: Effort, directory: Path, report: Report) -> None:
    """Train by each codec on the plain and on the planted model, and hold the ratios of their losses to the limit."""
    train_rows, heldout_rows = _text(effort.heldout)
    planted_dir = directory / "planted"
    tokens_BT = torch.tensor([row.tokens_T.tolist() for row in train_rows if len(row.tokens_T) == 128][:8])
    outliers.plant(MODEL_DIR, tokens_BT, planted_dir)

    def losses(model_dir: Path, names: Sequence[str], rows: Sequence[TokenRow], what: str) -> dict[str, Spread]:
        home = Path(tempfile.mkdtemp(dir=directory))
        with trunk_server(model_dir, 1, home) as (address, _):
            runs = {
                name: [
                    _train(model_dir, address, name, seed, effort.steps, rows, heldout_rows)
                    for seed in range(effort.seeds)
                ]
                for name in names
            }
        return _ratios(what, runs, report)

    plain = losses(MODEL_DIR, codec.CODECS, train_rows, "demo")
    planted = losses(planted_dir, ("identity", "int8"), train_rows, "demo, outliers")
    losses(MODEL_DIR, ("identity", DELTA_CODEC), train_rows[:REPEATED_ROWS], f"demo, {REPEATED_ROWS} rows")
    judged = {"bf16": plain["bf16"], "int8": plain["int8"], "int8_outliers": planted["int8"]}
    for name, spread in judged.items():
        report.targets.append(Target.at_most(f"loss_ratio_{name}", spread.max, LOSS_RATIO_LIMIT))


def _ratios(what: str, runs: Mapping[str, Sequence[Trained]], report: Report) -> dict[str, Spread]:
    """A row for each codec; by codec its ratios over `identity`, seed by seed."""
    found = {}
    for name, of_codec in runs.items():
        pairs = zip(of_codec, runs["identity"], strict=True)
        found[name] = spread = Spread.of([one.loss / exact.loss for one, exact in pairs])
        loss = statistics.median(one.loss for one in of_codec)
        told = {"loss": loss, "ratio": spread.median, "ratio_max": spread.max}
        report.results.append(_row(what=what, codec=name, bytes=of_codec[0].bytes, **told))
    return found


@dataclass(frozen=True, slots=True)
class Trained:
    """Held-out loss per token, and the bytes that a training step sent and received."""

    loss: float
    bytes: int


def _train(
    model_dir: Path,
    address: str,
    name: str,
    seed: int,
    steps: int,
    train_rows: Sequence[TokenRow],
    heldout_rows: Sequence[TokenRow],
) -> Trained:
    config = RunConfig.from_flower({**RUN_CONFIG, "model": str(model_dir), "local-steps": steps, "seed": seed})
    model = clients.load_split_model(model_dir, address, 1, 1, run_lora(config), codec=name, seed=seed)
    trunk = remote_layers(model).trunk
    log = trunk.wire_log
    before = log.sent_bytes + log.received_bytes
    train(model, train_rows, config, str(seed), trunk.announce)
    crossed = log.sent_bytes + log.received_bytes - before
    loss = judge(model, heldout_rows, config, trunk.announce).loss
    clients.close(model)
    return Trained(loss, crossed // steps)


def _text(most_heldout: int) -> tuple[list[TokenRow], list[TokenRow]]:
    """Rows of all the demo's sources: to train on, and at most `most_heldout` to judge by."""
    config = RunConfig.from_flower(RUN_CONFIG)
    tokenizer = load_tokenizer(MODEL_DIR)
    sites = [load_dataset(name, tokenizer, config.max_length, config.eval_fraction, config.seed) for name in SOURCES]
    heldout_rows = [row for site in sites for row in site.heldout_rows[: most_heldout // len(sites)]]
    return [row for site in sites for row in site.train_rows], heldout_rows


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _row(**cells: Cell) -> dict[str, Cell]:
    return {column: cells.get(column) for column in _COLUMNS}


if __name__ == "__main__":
    sys.exit(main())
