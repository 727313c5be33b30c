"""A part takes its share of the weights and the framework's own memory, and no more, at its peak too."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import LlamaConfig

from contract.architecture import whole_on_meta
from contract.model_files import INDEX_FILE

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 4
TOLERANCE = 0.15
HEADER_BYTES = 64 * 1024  # padded, so that a shard's dtype can be relabelled in place
# A quarter of a MiB of small, finite numbers, whether they are read as BF16 or as F16.
BLOCK = bytes(range(128)) * 2048

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak RSS from /proc")


@dataclass(frozen=True)
class Peak:
    peak: int
    share: int


def measure(way: str, checkpoint: Path) -> Peak:
    """Peak RSS and the weights' share, both in bytes, of a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.part_memory", way, str(checkpoint)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=140,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak, share = done.stdout.split()
    return Peak(int(peak), int(share))


def shapes_of(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in sorted(whole_on_meta(config).named_parameters())}


def header(shapes: dict[str, tuple[int, ...]], dtype: str) -> bytes:
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode().ljust(HEADER_BYTES)


def write_checkpoint(directory: Path, config: LlamaConfig, dtype: str) -> Path:
    """Write weights shard by shard, a block at a time; no model is ever built for it."""
    config.save_pretrained(directory)
    shapes = shapes_of(config)
    names = list(shapes)
    weight_map = {}
    for number in range(SHARDS):
        shard = {name: shapes[name] for name in names[number::SHARDS]}
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, file))
        left = sum(2 * math.prod(shape) for shape in shard.values())
        with (directory / file).open("wb") as stream:
            stream.write(HEADER_BYTES.to_bytes(8, "little") + header(shard, dtype))
            while left > 0:
                left -= stream.write(BLOCK[: min(left, len(BLOCK))])
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def relabel(directory: Path, config: LlamaConfig, dtype: str) -> None:
    shapes = shapes_of(config)
    names = list(shapes)
    for number, file in enumerate(sorted(directory.glob("*.safetensors"))):
        with file.open("r+b") as stream:
            stream.seek(8)
            stream.write(header({name: shapes[name] for name in names[number::SHARDS]}, dtype))


def llama(hidden_size: int, vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=18,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=vocab_size,
        tie_word_embeddings=False,
    )


@pytest.mark.timeout(600)
def test_a_part_peaks_at_its_share_and_load_then_delete_does_not(tmp_path: Path) -> None:
    tiny = write_checkpoint(tmp_path / "tiny", llama(32, 64), "BF16")
    config = llama(1024, 32000)
    assert 280e6 < sum(math.prod(shape) for shape in shapes_of(config).values()) < 320e6
    model = write_checkpoint(tmp_path / "model", config, "BF16")
    framework = measure("client", tiny).peak

    trunk = measure("trunk", model)
    assert trunk.peak <= (1 + TOLERANCE) * (trunk.share + framework)

    # Weights that are converted as they load: what is only read must not stay, and the whole must not have been there.
    relabel(model, config, "F16")
    client, deleted = measure("client", model), measure("load-then-delete", model)
    limit = (1 + TOLERANCE) * (client.share + framework)
    assert deleted.share == client.share
    assert client.peak <= limit
    assert deleted.peak > limit
    assert deleted.peak > (1 + TOLERANCE) * (trunk.share + framework)
