"""What PyTorch has once for all threads does not pass from one lane's sessions to another's."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from contract.adapter import resolve_lora
from server_trunk.engine import Engine
from tests.contract.families import attention, save_model
from tests.server_trunk.conftest import CUT, trunk_only
from tests.server_trunk.test_lane import ask, request, served, session


def two_lanes(directory: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> Engine:
    save_model(family, directory)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)  # which lanes share
    return Engine(directory, CUT, dtype="float32", attn_implementation=attention(family), device="cpu", lanes=2)


EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def test_lanes_side_by_side_give_no_session_anothers_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch keeps what parametrizations come to for as long as any thread is among them."""
    engine = two_lanes(tmp_path / "moe", "qwen3_moe", monkeypatch)
    first, second = engine.lanes
    asked = [request(session(engine, tmp_path / "moe", seed, **EXPERTS), 2, 6, seed) for seed in range(3)]
    alone = [first.forward([one])[0][0].clone() for one in asked]
    inside, leave = threading.Event(), threading.Event()
    (experts, *_) = (one for one in second._part.modules() if type(one).__name__.endswith("Experts"))

    def stay(*_: Any) -> None:
        inside.set()
        leave.wait(2)  # as long as the other lane needs, where it does not wait for this one

    experts.register_forward_hook(stay)
    with ThreadPoolExecutor(2) as threads:
        beside = threads.submit(second.forward, [asked[2]])
        assert inside.wait(20)
        others = threads.submit(lambda: [first.forward([one])[0][0].clone() for one in asked[:2]])
        got = [*others.result(20), beside.result(20)[0][0]]
    for index, (one, other) in enumerate(zip(alone, got, strict=True)):
        assert torch.equal(one, other), f"session {index}"


def test_a_pass_with_adapted_experts_leaves_other_sessions_graphs_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, directory = two_lanes(tmp_path / "moe", "qwen3_moe", monkeypatch), tmp_path / "moe"
    lane = engine.lanes[0]
    plain = session(engine, directory, 0, target_modules=["q_proj", "v_proj"])
    expert = session(engine, directory, 1, **EXPERTS)
    asked = request(plain, 2, 6, 0)
    for adapter in (plain, expert):  # so that each kind's graph has been measured, by hooks that look at no versions
        lane.forward([request(adapter, 2, 6, 0)])
    (expected,) = served(engine, [asked], together=False)
    plain.reset_gradient()
    ((_, graph),) = lane.forward([asked])
    lane.forward([request(expert, 2, 6, 1)])
    ((grad, _),) = lane.backward([ask(asked, graph)])
    assert grad is not None
    assert torch.equal(grad, expected["input"])


def test_a_structure_can_be_checked_while_a_pass_adapts_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = two_lanes(tmp_path / "moe", "qwen3_moe", monkeypatch)
    adapter, lane = session(engine, tmp_path / "moe", 0, **EXPERTS), engine.lanes[0]
    (experts, *_) = (one for one in lane._part.modules() if type(one).__name__.endswith("Experts"))
    checked: list[int] = []

    def check(*_: Any) -> None:
        engine.check_lora(adapter.layout.spec)
        checked.append(engine.adapter_values(adapter.layout.spec))

    before = engine.adapter_values(adapter.layout.spec)
    experts.register_forward_hook(check)
    lane.forward([request(adapter, 2, 6, 0)])
    assert checked == [before]


def test_a_structure_that_is_made_draws_nothing_of_what_another_lane_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = two_lanes(tmp_path / "llama", "llama", monkeypatch)
    first, second = engine.lanes
    asked = request(session(engine, tmp_path / "llama", 1, lora_dropout=0.5), 2, 8, 0, training=True)
    alone_BTD = first.forward([asked])[0][0].clone()
    dora = trunk_only(resolve_lora(tmp_path / "llama", LoraConfig(target_modules="all-linear", use_dora=True)))
    making: list[Any] = []
    (layer, *_) = (one for one in first._part.modules() if type(one).__name__ == "LlamaDecoderLayer")
    with ThreadPoolExecutor(1) as thread:

        def make(*_: Any) -> None:
            making.append(thread.submit(second.slots.open, dora, 1, "AB"))
            wait(making, 1)  # as long as it needs, where it does not wait for this pass

        layer.register_forward_hook(make)
        assert torch.equal(first.forward([asked])[0][0], alone_BTD)
        making[0].result(20)
