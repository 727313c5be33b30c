"""A session over real gRPC against the un-split PEFT model, bit for bit, and against its optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from contract.adapter import (
    adapter_parameters,
    adapter_shapes,
    from_bytes,
    initial_adapter,
    resolve_lora,
    sha256_hex,
    split_adapter,
    to_bytes,
    trainable_names,
)
from contract.architecture import probe
from contract.records import CutLayers
from contract.wire import lora_to_wire
from server_trunk.lane import Lane
from server_trunk.server import ServeOptions
from tests.contract.families import attention, batch, save_model
from tests.contract.parity import (
    Tensors,
    differences,
    reference,
    run,
    trained_adapter,
    unsent_padding_differences,
)
from tests.server_trunk.conftest import running, trunk_only
from tests.server_trunk.remote import RemoteClient
from tests.server_trunk.wire_client import WireClient


def replace_lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes})


ALL_LINEAR = replace_lora()
CUT = CutLayers(1, 1)
FAMILIES = ("llama", "gpt2", "gemma3-text", "bloom", "opt", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def serve_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Context managers of (checkpoint, client of a trunk that serves it)."""
    root = tmp_path_factory.mktemp("families")

    @contextmanager
    def serve(family: str, cut: CutLayers = CUT, **options: Any) -> Iterator[tuple[Path, WireClient]]:
        directory = root / family
        if not directory.exists():
            save_model(family, directory)
        plain = ServeOptions(
            str(directory),
            cut,
            "127.0.0.1:0",
            root / "state",
            attn_implementation=attention(family),
            device="cpu",
            batch_tokens=512,
        )
        with running(replace(plain, **options)) as trunk:
            wire = WireClient(trunk.address)
            yield directory, wire
            wire.close()

    return serve


def run_remote(client: RemoteClient, *args: Any, **kwargs: Any) -> Tensors:
    found = run(client.model, client.local(), *args, **kwargs)
    return found | {f"grad {name}": grad for name, grad in client.trunk_gradients().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_session_equals_the_unsplit_model_bitwise(serve_family: Callable[..., Any], family: str) -> None:
    with serve_family(family) as (directory, wire):
        adapter = trained_adapter(directory, ALL_LINEAR)
        whole = reference(directory, ALL_LINEAR, adapter, attention(family))
        client = RemoteClient(wire, directory, ALL_LINEAR, adapter, CUT)
        for padding in ("none", "left", "right"):
            expected = run(whole, adapter_parameters(whole), batch(padding))
            got = run_remote(client, batch(padding))
            assert unsent_padding_differences(family, padding, expected, got) == [], padding
            client.session.step(lr=0.0)  # forgets the gradients


METHODS = {
    "rslora": replace_lora(use_rslora=True),
    "dora": replace_lora(use_dora=True),
    "patterns": replace_lora(rank_pattern={r".*\.2\..*": 6}, alpha_pattern={r".*\.1\..*": 3}),
    "client-only": LoraConfig(r=4, target_modules=r".*\.(0|3)\..*q_proj|lm_head"),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_lora_method_is_served_bitwise(serve_family: Callable[..., Any], method: str) -> None:
    lora = METHODS[method]
    with serve_family("llama") as (directory, wire):
        adapter = trained_adapter(directory, lora)
        whole = reference(directory, lora, adapter, "sdpa")
        client = RemoteClient(wire, directory, lora, adapter, CUT)
        expected = run(whole, adapter_parameters(whole), batch("left"))
        assert differences(expected, run_remote(client, batch("left"))) == []


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_sessions_with_other_structures_and_weights_do_not_touch_each_other(
    serve_family: Callable[..., Any], family: str
) -> None:
    loras = [ALL_LINEAR, replace_lora(r=2), ALL_LINEAR, LoraConfig(r=4, target_modules=["q_proj"])]
    with serve_family(family) as (directory, wire):
        adapters = [trained_adapter(directory, lora, seed) for seed, lora in enumerate(loras)]
        wholes = [reference(directory, lora, adapter, "sdpa") for lora, adapter in zip(loras, adapters, strict=True)]
        expected = [
            run(whole, adapter_parameters(whole), batch("left", seed=seed)) for seed, whole in enumerate(wholes)
        ]
        clients = [
            RemoteClient(wire, directory, lora, adapter, CUT) for lora, adapter in zip(loras, adapters, strict=True)
        ]
        losses = [
            client.model(**batch("left", seed=seed).inputs()).loss for seed, client in enumerate(clients)
        ]  # all forwards wait at once
        for seed in (2, 0, 3, 1):
            losses[seed].backward()
        for seed, client in enumerate(clients):
            got = {name: parameter.grad for name, parameter in client.local().items()} | client.trunk_gradients()
            wanted = {name.removeprefix("grad "): value for name, value in expected[seed].items() if "grad" in name}
            assert differences(wanted, got) == [], f"client {seed}"
            assert torch.equal(losses[seed].detach(), expected[seed]["loss"])


@pytest.mark.parametrize("factor", ["A", "B", "AB"])
def test_steps_equal_the_unsplit_adamw_with_accumulation_and_global_clipping(
    serve_family: Callable[..., Any], factor: Any
) -> None:
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    max_norm = 1e-3
    with serve_family("llama") as (directory, wire):
        adapter = trained_adapter(directory, ALL_LINEAR)
        whole = reference(directory, ALL_LINEAR, adapter, "sdpa")
        client = RemoteClient(wire, directory, ALL_LINEAR, adapter, CUT, trainable=factor)
        sides = [adapter_parameters(whole), client.local()]
        optimizers = []
        for parameters in sides:
            train = [parameters[name].requires_grad_() for name in trainable_names(parameters, factor)]
            for name in parameters.keys() - set(trainable_names(parameters, factor)):
                parameters[name].requires_grad_(False)
            optimizers.append(torch.optim.AdamW(train, **settings))
        for step in range(3):
            for accumulated in range(2):
                given = batch("right", seed=10 * step + accumulated)
                whole(**given.inputs()).loss.backward()
                client.model(**given.inputs()).loss.backward()
            total = torch.nn.utils.clip_grad_norm_(optimizers[0].param_groups[0]["params"], max_norm)
            local = torch.nn.utils.get_total_norm([p.grad for p in optimizers[1].param_groups[0]["params"]])
            joined = float((local.double() ** 2 + client.remote.norm**2).sqrt())
            assert joined == pytest.approx(float(total), rel=1e-5)
            scale = max_norm / (float(total) + 1e-6)
            for parameter in optimizers[1].param_groups[0]["params"]:
                parameter.grad.mul_(scale)
            assert client.session.step(grad_scale=scale, **settings) == step + 1
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        got = {**client.trunk_weights(), **{name: value.detach() for name, value in client.local().items()}}
        for name, value in sides[0].items():
            assert torch.allclose(value, got[name], atol=1e-6, rtol=0), name
            moved = not torch.equal(value, adapter[name])
            assert moved == (name in trainable_names([name], factor)), name


def test_a_frozen_session_gives_the_client_the_same_gradients_and_keeps_none(serve_family: Callable[..., Any]) -> None:
    with serve_family("llama") as (directory, wire):
        adapter = trained_adapter(directory, ALL_LINEAR)
        trained = RemoteClient(wire, directory, ALL_LINEAR, adapter, CUT)
        frozen = RemoteClient(wire, directory, ALL_LINEAR, adapter, CUT, trainable="none")
        before = frozen.session.read()
        expected = run(trained.model, trained.local(), batch("left"))
        assert differences(expected, run(frozen.model, frozen.local(), batch("left"))) == []
        assert trained.remote.norm > 0
        assert frozen.remote.norm == 0
        assert frozen.trunk_gradients() == {}
        frozen.session.step(weight_decay=1.0)  # an honest client sends none; it must move nothing
        assert frozen.session.read() == before


def test_steps_without_clipping_are_bitwise_the_unsplit_ones(serve_family: Callable[..., Any]) -> None:
    with serve_family("llama") as (directory, wire):
        adapter = trained_adapter(directory, ALL_LINEAR)
        whole = reference(directory, ALL_LINEAR, adapter, "sdpa")
        client = RemoteClient(wire, directory, ALL_LINEAR, adapter, CUT)
        mine, theirs = (torch.optim.AdamW(p.values(), lr=1e-2) for p in (client.local(), adapter_parameters(whole)))
        for step in range(3):
            expected = run(whole, adapter_parameters(whole), batch("left", seed=step))
            assert differences(expected, run_remote(client, batch("left", seed=step))) == [], f"step {step}"
            mine.step()
            theirs.step()
            client.session.step(lr=1e-2, weight_decay=1e-2)


def test_autocast_and_no_grad_cross_the_wire(serve_family: Callable[..., Any]) -> None:
    with serve_family("llama") as (directory, wire):
        adapter = trained_adapter(directory, ALL_LINEAR)
        whole = reference(directory, ALL_LINEAR, adapter, "sdpa")
        client = RemoteClient(wire, directory, ALL_LINEAR, adapter, CUT)
        plain = run(whole, adapter_parameters(whole), batch("left"))
        client.remote.autocast_dtype = "bfloat16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = run(whole, adapter_parameters(whole), batch("left"))
            got = run_remote(client, batch("left"))
        assert differences(expected, got) == []
        assert differences(plain, got) != []
        client.remote.autocast_dtype = ""
        with torch.no_grad():
            assert torch.equal(whole(**batch("left").inputs()).loss, client.model(**batch("left").inputs()).loss)


def test_the_input_gradient_and_the_reset_are_optional(serve_family: Callable[..., Any]) -> None:
    with serve_family("qwen3_moe") as (directory, wire):
        adapter = trained_adapter(directory, ALL_LINEAR)
        session = RemoteClient(wire, directory, ALL_LINEAR, adapter, CUT).session
        hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
        session.forward(hidden)
        wanted, norm = session.backward(torch.ones_like(hidden))
        assert wanted is not None
        session.forward(hidden)
        unwanted, twice = session.backward(torch.ones_like(hidden), want_input_grad=False)
        assert unwanted is None
        assert twice == pytest.approx(2 * norm)
        session.forward(hidden)
        again, once = session.backward(torch.ones_like(hidden), reset=True)
        assert torch.equal(again, wanted)
        assert once == norm
        gradients = from_bytes(session.read(gradients=True))
        assert norm == pytest.approx(float(sum(g.double().square().sum() for g in gradients.values()) ** 0.5))


def test_a_seed_gives_both_sides_the_same_first_adapter(serve_family: Callable[..., Any]) -> None:
    with serve_family("llama") as (directory, wire):
        spec = resolve_lora(directory, ALL_LINEAR)
        session = wire.session(wire.hello(lora_to_wire(trunk_only(spec)), seed=7))
        expected = split_adapter(initial_adapter(adapter_shapes(directory, spec), 7), probe(directory), CUT)[1]
        assert session.read() == to_bytes(expected)
        assert session.welcome.adapter_sha256 == sha256_hex(to_bytes(expected))


def test_the_bf16_codec_rounds_what_crosses_and_nothing_else(serve_family: Callable[..., Any]) -> None:
    with serve_family("llama") as (directory, wire):
        adapter = trained_adapter(directory, ALL_LINEAR)
        hidden = torch.randn(4, 12, 32, generator=torch.Generator().manual_seed(1))
        exact = RemoteClient(wire, directory, ALL_LINEAR, adapter, CUT).session
        rounded = RemoteClient(wire, directory, ALL_LINEAR, adapter, CUT, codecs=["bf16"]).session
        expected = exact.forward(hidden.bfloat16().float()).bfloat16().float()
        got = rounded.forward(hidden)
        assert got.dtype == torch.float32
        assert torch.equal(expected, got)
        assert rounded.sent_bytes < 0.7 * exact.sent_bytes


def test_a_bfloat16_trunk_serves_the_unsplit_bits(serve_family: Callable[..., Any]) -> None:
    with serve_family("llama", dtype="bfloat16") as (directory, wire):
        adapter = trained_adapter(directory, ALL_LINEAR)
        whole = reference(directory, ALL_LINEAR, adapter, "sdpa", dtype="bfloat16")
        client = RemoteClient(wire, directory, ALL_LINEAR, adapter, CUT)
        expected = run(whole, adapter_parameters(whole), batch("left"))
        assert differences(expected, run_remote(client, batch("left"))) == []


def test_training_mode_reaches_the_trunk(serve_family: Callable[..., Any]) -> None:
    with serve_family("llama") as (directory, wire):
        lora = replace_lora(lora_dropout=0.5)
        session = RemoteClient(wire, directory, lora, trained_adapter(directory, lora), CUT).session
        hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
        still = [session.forward(hidden, need_grad=False) for _ in range(2)]
        moving = [session.forward(hidden, need_grad=False, training=True) for _ in range(2)]
        assert torch.equal(*still)
        assert not torch.equal(*moving)
        assert torch.equal(session.forward(hidden, need_grad=False), still[0])


def trained(client: RemoteClient, seed: int) -> Tensors:
    for step in range(4):
        client.model(**batch("left", seed=100 * seed + step).inputs()).loss.backward()
        client.session.step()
    return client.trunk_weights()


@pytest.mark.parametrize("deterministic", [True, False])
def test_clients_at_the_same_time_get_what_each_would_alone(
    serve_family: Callable[..., Any], deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    forward = Lane.forward

    def noted(lane: Lane, asked: Any, **how: Any) -> Any:
        passes.append(len(asked))
        return forward(lane, asked, **how)

    monkeypatch.setattr(Lane, "forward", noted)
    with serve_family("llama", lanes=1) as (directory, wire), ThreadPoolExecutor(6) as pool:
        adapters = [trained_adapter(directory, ALL_LINEAR, seed) for seed in range(6)]
        clients = [
            RemoteClient(wire, directory, ALL_LINEAR, adapter, CUT, deterministic=deterministic)
            for adapter in adapters * 2
        ]
        alone = [trained(client, seed) for seed, client in enumerate(clients[:6])]
        assert set(passes) == {1}
        together = list(pool.map(trained, clients[6:], range(6)))
    if deterministic:
        assert set(passes) == {1}
    for one, other in zip(alone, together, strict=True):
        for name, value in one.items():
            if deterministic:
                assert torch.equal(value, other[name]), name
            else:  # AdamW's first steps turn rounding of a tiny gradient into up to a step of 1e-2
                assert torch.allclose(value, other[name], rtol=1e-3, atol=1e-3), name
    assert not torch.equal(alone[0][name], alone[1][name])
