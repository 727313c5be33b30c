"""Rounds over two trunks are the rounds over one: real clients, real trunks, the real sum and commit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from contract.adapter import from_bytes, sha256_hex
from contract.config import RunConfig
from contract.records import RoundKey
from orchestrator.trunk import Trunk, TrunkPart
from tests.clients.conftest import CUT
from tests.clients.sites import Orchestrator, Site, Version, write_texts
from tests.contract.parity import Tensors

SITES, RUN = 4, "two-trunks"
CONFIG = RunConfig.from_flower(
    {
        "secagg": "off",
        "aggregation": "fedavg",
        "local-steps": 3,
        "per-device-train-batch-size": 2,
        "learning-rate": 5e-3,
        "max-length": 16,
        "lora-r": 4,
        "seed": 5,
    }
)


@pytest.fixture(scope="module")
def trunks(trunk_host: Callable[..., dict[str, str]], llama_dir: Path) -> dict[str, str]:
    """`one` serves alone; `a` and `b` serve together."""
    served: dict[str, Any] = {"model": str(llama_dir), "head": CUT.head, "tail": CUT.tail}
    return trunk_host({name: dict(served) for name in ("one", "a", "b")})


def sites_at(address: str, llama_dir: Path, folder: Path) -> list[Site]:
    """Sites of different weights; by their ids two take each of two trunks with equal room."""
    return [
        Site(
            200 + number,
            {
                "model": str(llama_dir),
                "data": str(write_texts(folder / f"{number}.jsonl", rows=9 + 4 * number, seed=number)),
                "trunk-address": address,
            },
        )
        for number in range(SITES)
    ]


def relative(got: Tensors, wanted: Tensors) -> float:
    """The largest difference of a tensor from the wanted one, over the wanted one's norm."""
    assert got.keys() == wanted.keys()
    return max(float((got[name] - tensor).norm() / tensor.norm()) for name, tensor in wanted.items())


def part_of(address: str, run: str, before: Version) -> TrunkPart:
    """What the trunk at `address` answered to the commit of the round that followed `before`, asked once more."""
    key, base = RoundKey(run, before.number + 1, 1), sha256_hex(before.trunk_bytes)
    with closing(Trunk(address)) as trunk:
        return trunk.commit_part(key, base, [str(200 + number) for number in range(SITES)])


def plain_mean(addresses: list[str], parts: list[TrunkPart]) -> Tensors:
    """The mean of the trunks' averages that forgets how much each of them weighs."""
    held = []
    for address, part in zip(addresses, parts, strict=True):
        with closing(Trunk(address)) as trunk:
            held.append(from_bytes(trunk.get_adapter(part.sha256)))
    return {name: sum(one[name] for one in held) / len(held) for name in held[0]}  # type: ignore[misc]


@pytest.mark.usefixtures("flower_task")
def test_two_rounds_over_two_trunks_equal_those_over_one(
    llama_dir: Path, trunks: dict[str, str], tmp_path: Path
) -> None:
    """Compared: both halves of the committed adapter, each tensor by its norm, after each of two rounds, to 1e-5.

    The clients' half of round 1 must be the same bits: each trunk answers a client as the one trunk does. The trunk's
    half is rounded to float32 once more on its way.
    """
    pair = [trunks["a"], trunks["b"]]
    alone = Orchestrator(CONFIG, llama_dir, trunks["one"], run=RUN)
    together = Orchestrator(CONFIG, llama_dir, ",".join(pair), run=RUN)
    wanted, got = alone.first(), together.first()
    assert got.trunk_bytes == wanted.trunk_bytes
    for number in (1, 2):
        before = got
        wanted = alone.round(wanted, sites_at(trunks["one"], llama_dir, tmp_path))
        got = together.round(got, sites_at(together.address, llama_dir, tmp_path))
        assert together.weights == alone.weights
        assert relative(got.tensors(), wanted.tensors()) < 1e-5
        parts = [part_of(address, RUN, before) for address in pair]
        assert [part.clients for part in parts] == [("202", "203"), ("200", "201")]
        for part in parts:
            assert part.trained_tokens == sum(together.weights[name] for name in part.clients)
        trunk_part = from_bytes(got.trunk_bytes)
        assert relative(plain_mean(pair, parts), trunk_part) > 1e-4, "the wrong average would pass, too"
        assert relative(from_bytes(before.trunk_bytes), trunk_part) > 1e-2
        if number == 1:
            assert got.client.vector_d.tobytes() == wanted.client.vector_d.tobytes()


@pytest.mark.usefixtures("flower_task")
def test_clients_work_with_the_trunk_that_is_there(llama_dir: Path, trunks: dict[str, str], tmp_path: Path) -> None:
    """One of two trunks is down when the clients start: all of them are averaged at the other one."""
    run = f"{RUN}-of-which-one-is-down"
    orchestrator = Orchestrator(CONFIG, llama_dir, f"127.0.0.1:1,{trunks['b']}", run=run)
    version = orchestrator.first()
    after = orchestrator.round(version, sites_at(orchestrator.address, llama_dir, tmp_path))
    part = part_of(trunks["b"], run, version)
    assert part.clients == ("200", "201", "202", "203")
    assert sha256_hex(after.trunk_bytes) == part.sha256
    assert relative(from_bytes(version.trunk_bytes), from_bytes(after.trunk_bytes)) > 1e-2
