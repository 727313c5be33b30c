"""Many sessions in one pass against each alone, in whatever way their rows, lengths, ranks and factors differ."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel

from contract.adapter import resolve_lora
from contract.errors import CapacityError
from contract.records import Trainable
from server_trunk.engine import Engine
from server_trunk.lane import Backward, Forward, Gang, Graph
from server_trunk.session_adapter import SessionAdapter
from tests.contract.families import attention, save_model
from tests.server_trunk.conftest import CUT, HIDDEN, trunk_only

RELATIVE = 1e-5
FAMILIES = ("llama", "gpt2", "opt", "bloom", "gemma3-text")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root, made = tmp_path_factory.mktemp("lanes"), {}

    def engine(family: str = "llama", dtype: str = "float32") -> tuple[Engine, Path]:
        if (family, dtype) not in made:
            if not (root / family).exists():
                save_model(family, root / family)
            made[family, dtype] = Engine(
                root / family, CUT, dtype=dtype, attn_implementation=attention(family), device="cpu", lanes=1
            )
        return made[family, dtype], root / family

    return engine


@pytest.fixture
def switches_often() -> Iterator[None]:
    """Threads that give way all the time, so that what must not meet does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def session(engine: Engine, directory: Path, seed: int, trained: Trainable = "AB", **lora: Any) -> SessionAdapter:
    """A session whose B is not zero, so that every factor has a gradient."""
    plain: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    spec = trunk_only(resolve_lora(directory, LoraConfig(**{**plain, **lora})))
    adapter = engine.open(spec, seed, trained)
    generator = torch.Generator().manual_seed(seed)
    adapter.values_P.add_(torch.randn(adapter.values_P.shape, generator=generator), alpha=0.05)
    return adapter


def request(adapter: SessionAdapter, rows: int, tokens: int, seed: int, padded: int = 0, **modes: Any) -> Forward:
    generator = torch.Generator().manual_seed(seed)
    mask = None
    if padded:
        mask = torch.ones(rows, tokens, dtype=torch.int64)
        mask[0, -padded:] = 0
    return Forward(adapter, torch.randn(rows, tokens, HIDDEN, generator=generator), mask, None, **modes)


def gradient_for(asked: Forward) -> torch.Tensor:
    """At the tail cut; zeros on padding, as clients send it."""
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(asked.hidden_BTD.shape, generator=generator)
    return grad if asked.mask_BT is None else grad * asked.mask_BT[:, :, None]


def ask(asked: Forward, graph: Graph) -> Backward:
    return Backward(asked.adapter, graph, gradient_for(asked), want_input_grad=True, reset=True)


def served(engine: Engine, asked: Sequence[Forward], *, together: bool) -> list[dict[str, torch.Tensor]]:
    """Of each request its output, input gradient and adapter gradients."""
    lane = engine.lanes[0]
    for one in asked:
        one.adapter.reset_gradient()
    answers = lane.forward(asked) if together else [lane.forward([one])[0] for one in asked]
    backwards = [ask(one, graph) for one, (_, graph) in zip(asked, answers, strict=True)]
    replies = lane.backward(backwards)
    found = []
    for one, (output, _), (grad, norm) in zip(asked, answers, replies, strict=True):
        assert grad is not None
        real = slice(None) if one.mask_BT is None else one.mask_BT.bool()
        gradients = {name: value.clone() for name, value in one.adapter.gradients().items()}
        found.append({"output": output[real], "input": grad[real], "norm": torch.tensor(norm), **gradients})
    return found


def assert_close(expected: list[dict[str, torch.Tensor]], got: list[dict[str, torch.Tensor]]) -> None:
    for index, (one, other) in enumerate(zip(expected, got, strict=True)):
        assert one.keys() == other.keys()
        for name, value in one.items():
            scale = float(value.abs().max())
            assert scale > 0 or name == "norm", name
            error = float((value - other[name]).abs().max())
            assert error <= RELATIVE * scale, f"session {index}: {name} is off by {error / scale:.2g}"


MIXES: dict[str, list[dict[str, Any]]] = {
    "equal": [{}, {}, {}],
    "other ranks": [{"r": 2}, {"r": 4}, {"r": 7}, {"r": 2}],
    "rsLoRA and patterns": [{"use_rslora": True}, {"rank_pattern": {r".*\.2\..*": 6}}, {"lora_alpha": 3}],
    "other factors": [{"trained": "A"}, {"trained": "B"}, {"trained": "AB"}],
    "other targets": [{"target_modules": r".*\.1\..*_proj"}, {}, {"target_modules": r".*\.2\..*_proj"}],
}


@pytest.mark.parametrize("mix", MIXES)
def test_sessions_in_one_pass_get_what_each_gets_alone(engines: Any, mix: str) -> None:
    engine, directory = engines()
    adapters = [session(engine, directory, seed, **changes) for seed, changes in enumerate(MIXES[mix])]
    asked = [request(adapter, 2, 6, seed) for seed, adapter in enumerate(adapters)]
    assert_close(served(engine, asked, together=False), served(engine, asked, together=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_lengths_may_differ_in_every_family(engines: Any, family: str) -> None:
    engine, directory = engines(family)
    shapes = [(1, 8, 0), (3, 10, 2), (2, 10, 0), (1, 9, 1), (3, 8, 0)]
    asked = [
        request(session(engine, directory, seed), rows, tokens, seed, padded)
        for seed, (rows, tokens, padded) in enumerate(shapes)
    ]
    assert_close(served(engine, asked, together=False), served(engine, asked, together=True))


def test_a_frozen_session_shares_a_pass_and_keeps_no_gradient(engines: Any) -> None:
    engine, directory = engines()
    adapters = [session(engine, directory, 0, "none"), session(engine, directory, 1)]
    asked = [request(adapter, 2, 6, seed) for seed, adapter in enumerate(adapters)]
    together = served(engine, asked, together=True)
    assert adapters[0].gradients() == {}
    assert together[0].pop("norm") == 0.0
    alone = served(engine, asked, together=False)
    alone[0].pop("norm")
    assert_close(alone, together)


@pytest.mark.parametrize("modes", [{"autocast_dtype": "bfloat16"}, {"training": True}, {"need_grad": False}])
def test_a_pass_runs_in_the_mode_that_all_ask_for(engines: Any, modes: dict[str, Any]) -> None:
    engine, directory = engines()
    asked = [request(session(engine, directory, seed), 2, 6, seed, **modes) for seed in range(3)]
    alone = [engine.lanes[0].forward([one])[0][0] for one in asked]
    together = [output for output, _ in engine.lanes[0].forward(asked)]
    for one, other in zip(alone, together, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=2e-2 if "autocast_dtype" in modes else RELATIVE, atol=1e-2)


def test_a_bfloat16_trunk_adds_in_float32_as_peft_does(engines: Any) -> None:
    engine, directory = engines(dtype="bfloat16")
    adapters = [session(engine, directory, seed) for seed in range(2)]
    asked = [
        Forward(adapter, torch.randn(2, 6, HIDDEN).bfloat16(), None, None, need_grad=False) for adapter in adapters
    ]
    alone = torch.stack([engine.lanes[0].forward([one])[0][0] for one in asked]).float()
    together = torch.stack([output for output, _ in engine.lanes[0].forward(asked)]).float()
    assert together.dtype == torch.float32
    assert float((alone - together).abs().max()) <= 2e-2 * float(alone.abs().max())


def test_who_comes_after_its_gang_computes_again_and_gets_the_same(engines: Any) -> None:
    engine, directory = engines()
    adapters = [session(engine, directory, seed) for seed in range(3)]
    asked = [request(adapter, 2, 6, seed) for seed, adapter in enumerate(adapters)]
    expected = served(engine, asked, together=False)
    lane = engine.lanes[0]
    for adapter in adapters:
        adapter.reset_gradient()
    answers = lane.forward(asked)
    backwards = [ask(one, graph) for one, (_, graph) in zip(asked, answers, strict=True)]
    gang = backwards[0].graph.gang
    assert gang is not None
    assert len(gang.members) == 3
    replies = lane.backward(backwards[:2])
    assert backwards[2].graph.gang is None
    replies += lane.backward(backwards[2:])
    got = [
        {"output": output, "input": grad, "norm": torch.tensor(norm), **one.adapter.gradients()}
        for one, (output, _), (grad, norm) in zip(asked, answers, replies, strict=True)
        if grad is not None
    ]
    assert_close(expected, got)


def test_a_gang_can_be_asked_while_a_lane_parts_members_from_it(switches_often: None) -> None:
    asked = request(cast(SessionAdapter, None), 1, 2, 0)
    for _ in range(20):
        graphs = [Graph(asked, asked.hidden_BTD) for _ in range(300)]
        gang = Gang(asked.hidden_BTD, asked.hidden_BTD, [], {graph: slice(0, 1) for graph in graphs})
        with ThreadPoolExecutor(1) as lane:
            parted = lane.submit(lambda: [gang.part_from(graph) for graph in graphs])  # noqa: B023 (waited for)
            while not parted.done():
                assert gang.worth_it(graphs)
                assert len(gang.members) <= len(graphs)
            parted.result()
        assert gang.members == []


def test_a_gang_is_gone_with_its_last_member(engines: Any) -> None:
    engine, directory = engines()
    asked = [request(session(engine, directory, seed), 2, 6, seed) for seed in range(2)]
    answers = engine.lanes[0].forward(asked)
    gang = answers[0][1].gang
    assert gang is not None
    del answers[0]
    assert len(gang.members) == 1
    assert not gang.worth_it([])
    del answers
    assert gang.members == []


def test_gradients_add_up_over_passes_shared_or_not(engines: Any) -> None:
    engine, directory = engines()
    adapters = [session(engine, directory, seed) for seed in range(2)]
    lane = engine.lanes[0]
    for adapter in adapters:
        adapter.reset_gradient()
    for step in range(2):
        asked = [request(adapter, 2, 6, 10 * step + seed) for seed, adapter in enumerate(adapters)]
        for group in [asked] if step else [[one] for one in asked]:
            answers = lane.forward(group)
            lane.backward(
                [
                    Backward(one.adapter, graph, gradient_for(one), want_input_grad=False, reset=False)
                    for one, (_, graph) in zip(group, answers, strict=True)
                ]
            )
    got = [{name: value.clone() for name, value in adapter.gradients().items()} for adapter in adapters]
    for adapter in adapters:
        adapter.reset_gradient()
    for step in range(2):
        for seed, adapter in enumerate(adapters):
            one = request(adapter, 2, 6, 10 * step + seed)
            graph = lane.forward([one])[0][1]
            lane.backward([Backward(adapter, graph, gradient_for(one), want_input_grad=False, reset=False)])
    assert_close([adapter.gradients() for adapter in adapters], got)


def test_what_cannot_share_a_pass_is_told_apart(engines: Any) -> None:
    engine, directory = engines()
    assert session(engine, directory, 0).layout.batches
    for changes in ({"use_dora": True}, {"lora_dropout": 0.1}):
        assert not session(engine, directory, 0, **changes).layout.batches
    one = request(session(engine, directory, 0), 2, 8, 0)
    assert one.shares_with(request(one.adapter, 5, 10, 0))
    assert not one.shares_with(request(one.adapter, 2, 11, 0))
    assert not one.shares_with(request(one.adapter, 2, 8, 0, training=True))
    positions = Forward(one.adapter, one.hidden_BTD, None, torch.arange(8)[None])
    assert not one.shares_with(positions)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_is_estimated_from_above_before_it_was_ever_measured(
    tmp_path: Path, family: str, dtype: str, dropout: float
) -> None:
    save_model(family, tmp_path)
    engine = Engine(tmp_path, CUT, dtype=dtype, attn_implementation=attention(family), device="cpu", lanes=1)
    values_BTD = torch.randn(2, 24, HIDDEN, dtype=getattr(torch, dtype))
    asked = Forward(session(engine, tmp_path, 1, lora_dropout=dropout), values_BTD, None, None, training=True)
    guessed = engine.meter.estimate(asked.kind, 48)
    engine.lanes[0].forward([asked])
    assert 0.2 * guessed < engine.meter.estimate(asked.kind, 48) <= guessed


@pytest.mark.parametrize(("family", "dropout"), [("llama", 0.5), ("gpt2", 0.0)])
def test_a_forward_that_is_computed_again_draws_the_same_dropout(tmp_path: Path, family: str, dropout: float) -> None:
    save_model(family, tmp_path, **({"resid_pdrop": 0.5, "attn_pdrop": 0.5} if family == "gpt2" else {}))
    engine = Engine(tmp_path, CUT, dtype="float32", attn_implementation=attention(family), device="cpu", lanes=1)
    assert engine.own_dropout == (family == "gpt2")
    adapter, lane = session(engine, tmp_path, 1, lora_dropout=dropout), engine.lanes[0]

    def gradients(seed: int, *, keep: bool) -> list[torch.Tensor]:
        asked = replace(request(adapter, 2, 8, 0, training=True, own_dropout=engine.own_dropout), seed=seed)
        assert asked.draws
        assert not asked.shares_with(asked)
        adapter.reset_gradient()
        ((output, graph),) = lane.forward([asked], keep=keep)
        torch.rand(3)  # others draw meanwhile
        ((grad, _),) = lane.backward([ask(asked, graph)])
        assert grad is not None
        return [output, grad, *(value.clone() for value in adapter.gradients().values())]

    kept, again, other = gradients(5, keep=True), gradients(5, keep=False), gradients(6, keep=True)
    assert all(map(torch.equal, kept, again))
    assert not torch.equal(kept[0], other[0])


def test_a_thread_keeps_its_number_of_threads_whatever_others_set(engines: Any) -> None:
    """PyTorch's own setting is one for all threads, until a thread has asked for it."""
    (lane,) = engines()[0].lanes
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(lane.use_threads, 2).result()
        other.submit(lane.use_threads, 1).result()
        assert one.submit(torch.get_num_threads).result() == 2
        assert other.submit(torch.get_num_threads).result() == 1


def test_a_lane_that_takes_up_a_structure_disturbs_none_that_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model("llama", tmp_path / "llama")
    how: dict[str, Any] = {"dtype": "float32", "attn_implementation": attention("llama"), "device": "cpu"}
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)  # which lanes share
    engine = Engine(tmp_path / "llama", CUT, lanes=2, **how)
    adapter = session(engine, tmp_path / "llama", seed=1)
    first, second = engine.lanes
    asked = request(adapter, rows=2, tokens=5, seed=1)
    alone_BTD = first.forward([asked])[0][0]
    first.slots.close(adapter)  # so that it is bound again

    makes, computed = threading.Event(), threading.Event()
    plain = LoraModel._create_and_replace

    def waiting(*given: Any, **named: Any) -> None:
        makes.set()
        assert computed.wait(20)
        plain(*given, **named)

    monkeypatch.setattr(LoraModel, "_create_and_replace", waiting)
    with ThreadPoolExecutor(1) as thread:
        beside = thread.submit(second.forward, [asked])
        try:
            assert makes.wait(20)
            assert torch.equal(first.forward([asked])[0][0], alone_BTD)
        finally:
            computed.set()
        assert torch.equal(beside.result(20)[0][0], alone_BTD)


def test_a_graph_whose_adapter_went_to_disk_meanwhile_is_computed_again(engines: Any, tmp_path: Path) -> None:
    """Its graph leads to tensors that are the session's no longer: their gradients would be lost without a word."""
    engine, directory = engines()
    lane, adapter = engine.lanes[0], session(engine, directory, 1)
    asked = request(adapter, 2, 6, 1)
    (expected,) = served(engine, [asked], together=False)
    adapter.reset_gradient()
    ((_, graph),) = lane.forward([asked])
    adapter.evict(tmp_path)
    adapter.restore()
    ((_, norm),) = lane.backward([ask(asked, graph)])
    assert norm == pytest.approx(float(expected["norm"]), rel=1e-6)


def test_a_member_for_whom_there_is_no_memory_counts_nobody_twice(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, directory = engines()
    lane, adapters = engine.lanes[0], [session(engine, directory, seed) for seed in range(2)]
    asked = [request(adapter, 2, 6, seed) for seed, adapter in enumerate(adapters)]
    expected = [one["norm"] for one in served(engine, asked, together=True)]
    plain, tries = SessionAdapter.accumulator, []

    def accumulator(adapter: SessionAdapter) -> torch.Tensor:
        if adapter is adapters[1] and not tries:
            tries.append(1)
            raise CapacityError("no memory")
        return plain(adapter)

    monkeypatch.setattr(SessionAdapter, "accumulator", accumulator)
    for adapter in adapters:
        adapter.reset_gradient()
    backwards = [
        replace(ask(one, graph), reset=False) for one, (_, graph) in zip(asked, lane.forward(asked), strict=True)
    ]
    with pytest.raises(CapacityError):
        lane.backward(backwards)
    again = [lane.backward([one])[0][1] for one in backwards]
    assert again == pytest.approx([float(norm) for norm in expected], rel=1e-5)
