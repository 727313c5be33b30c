"""Sessions that ask how their trunk computes: in bfloat16, or on passes that no other client has a part in."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import clients
from clients.split_model import remote_layers, trunk_state
from contract.adapter import adapter_parameters
from contract.architecture import decoder_layers
from contract.errors import AgreementError, ConfigError
from contract.trunk_arithmetic import PLAIN, TrunkArithmetic
from contract.trunk_pb2 import ClientFrame
from server_trunk.lane import Lane
from server_trunk.probe import Findings
from server_trunk.server import ServeOptions
from tests.clients.capture import Capture
from tests.clients.conftest import ALL_LINEAR, CUT, opened
from tests.conftest import TrunkProcess
from tests.contract.families import Batch, batch
from tests.contract.parity import Tensors, differences, reference, run, trained_adapter
from tests.server_trunk.conftest import running

BFLOAT16 = TrunkArithmetic("bfloat16")
DETERMINISTIC = TrunkArithmetic(deterministic=True)
MICROBATCHES = 6
ROW = 5
"""Tokens; few enough that a matrix product rounds otherwise once another client's row is in it."""
TOLERANCE = 1e-5
"""How far, of its norm, each value may be from that of a whole model whose middle layers alone compute in bfloat16."""
MOVED = 1e-3
"""How far bfloat16 moves each of them at least."""

Serving = Callable[..., Any]


@pytest.fixture
def serving(llama_dir: Path, tmp_path: Path) -> Serving:
    """Starts a trunk in this process, with changed options, for a block."""
    plain = ServeOptions(
        str(llama_dir), CUT, "127.0.0.1:0", tmp_path / "state", device="cpu", threads=2, batch_tokens=512
    )
    return lambda **options: running(replace(plain, **options))


# ---- what is asked -------------------------------------------------------------------------------------------------


def hello_of(model_dir: Path, trunk: TrunkProcess, **asked: Any) -> Any:
    capture = Capture(trunk.address)
    clients.close(clients.load_split_model(model_dir, capture.address, CUT.head, CUT.tail, ALL_LINEAR, **asked))
    frames = [ClientFrame.FromString(message) for call in capture.messages() if call != [b""] for message in call]
    capture.close()
    return next(frame.hello for frame in frames if frame.HasField("hello"))


def test_the_hello_says_what_was_asked_and_nothing_by_default(llama_dir: Path, trunk: TrunkProcess) -> None:
    plain = hello_of(llama_dir, trunk)
    assert (plain.trunk_autocast, plain.deterministic) == ("", False)
    asked = hello_of(llama_dir, trunk, trunk_autocast="bfloat16", deterministic=True)
    assert (asked.trunk_autocast, asked.deterministic) == ("bfloat16", True)
    assert hello_of(llama_dir, trunk, trunk_autocast="auto").trunk_autocast == "auto"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"trunk_autocast": "fp8"}, "trunk-autocast is 'fp8'"),
        ({"deterministic": True, "trunk_autocast": "auto"}, "deterministic is true and trunk-autocast is auto"),
        ({"deterministic": True, "codec": "auto"}, "deterministic is true and codec is auto"),
    ],
)
def test_what_cannot_be_had_is_refused_before_the_trunk_is_asked(
    llama_dir: Path, asked: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        clients.load_split_model(llama_dir, "127.0.0.1:1", CUT.head, CUT.tail, ALL_LINEAR, **asked)


def test_a_trunk_that_answers_what_was_not_asked_ends_the_session(
    llama_dir: Path, trunk: TrunkProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clients.remote_trunk.TRUNK_AUTOCAST", {"bfloat16": "", "off": "bfloat16"})
    for setting, found in (("bfloat16", "the type of its weights"), ("off", "bfloat16")):
        with pytest.raises(AgreementError, match=f"trunk-autocast is {setting}, but .* computes in {found}"):
            clients.load_split_model(
                llama_dir, trunk.address, CUT.head, CUT.tail, ALL_LINEAR, trunk_autocast=setting, timeout_s=20
            )


# ---- bfloat16 ------------------------------------------------------------------------------------------------------


def split_gradients(model: PeftModel, given: Batch) -> Tensors:
    found = run(model, adapter_parameters(model), given)
    return found | {f"grad {name}": grad for name, grad in trunk_state(model, gradients=True).items()}


def with_middle_in_bfloat16(whole: PeftModel) -> PeftModel:
    """`whole`, its layers between the cuts under autocast, what leaves the last of them in float32."""
    _, _, layers = decoder_layers(whole)
    middle = layers[CUT.head : len(layers) - CUT.tail]
    for layer in middle:
        layer.forward = _cast(layer.forward)
    middle[-1].register_forward_hook(lambda layer, args, output: output.float())
    return whole


def _cast(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def cast(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(*args, **kwargs)

    return cast


def farthest(expected: Tensors, got: Tensors) -> float:
    assert expected.keys() == got.keys()
    return max(float((value - got[name]).norm() / value.norm()) for name, value in expected.items())


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_trunk_in_bfloat16_equals_local_layers_under_autocast(
    padding: str, llama_dir: Path, trunk: TrunkProcess
) -> None:
    tensors, given = trained_adapter(llama_dir, ALL_LINEAR), batch(padding)
    plain, cast = (reference(llama_dir, ALL_LINEAR, tensors, "sdpa") for _ in range(2))
    exact = run(plain, adapter_parameters(plain), given)
    expected = run(with_middle_in_bfloat16(cast), adapter_parameters(cast), given)
    with opened(llama_dir, trunk.address, CUT, tensors, arithmetic=BFLOAT16) as model:
        got = split_gradients(model, given)
    assert farthest(expected, got) < TOLERANCE
    assert MOVED < farthest(exact, got) < 0.1
    assert not torch.equal(got["logits"], exact["logits"])


def test_what_comes_from_a_trunk_in_bfloat16_is_float32(llama_dir: Path, trunk: TrunkProcess) -> None:
    tensors = trained_adapter(llama_dir, ALL_LINEAR)
    came: list[torch.Tensor] = []
    with opened(llama_dir, trunk.address, CUT, tensors, arithmetic=BFLOAT16) as model:
        remote_layers(model).register_forward_hook(lambda layers, args, output: came.extend((args[0], output)))
        loss = model(**batch("none").inputs()).loss
        came[0].register_hook(came.append)
        loss.backward()
    sent, hidden, gradient = came
    assert (sent.dtype, hidden.dtype, gradient.dtype) == (torch.float32,) * 3
    assert not torch.equal(hidden, hidden.bfloat16().float()), "the residual stream keeps its precision"


@pytest.mark.parametrize(
    ("found", "told"), [("bfloat16", "computes in bfloat16"), ("", "computes in the type of its weights")]
)
def test_auto_computes_in_what_the_trunk_found_to_gain_and_says_so_once(
    found: str,
    told: str,
    llama_dir: Path,
    serving: Serving,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("server_trunk.server.probe", lambda lanes, threads: Findings(512, 1, found))
    tensors, given = trained_adapter(llama_dir, ALL_LINEAR), batch("right")
    with serving(batch_tokens=0) as trunk, caplog.at_level(logging.INFO, "trunkline.clients"):
        results = []
        for arithmetic in (TrunkArithmetic("auto"), TrunkArithmetic(found or "off")):
            caplog.clear()
            with opened(llama_dir, trunk.address, CUT, tensors, arithmetic=arithmetic) as model:
                results.append(split_gradients(model, given))
                assert remote_layers(model).trunk.welcome.autocast_dtype == found
            said = [record.getMessage() for record in caplog.records if "computes in" in record.getMessage()]
            assert len(said) == (arithmetic.autocast != "off")
            assert all(told in line for line in said)
        with opened(llama_dir, trunk.address, CUT, tensors) as model:
            plain = split_gradients(model, given)
    assert differences(*results) == []
    assert bool(differences(plain, results[0])) == (found == "bfloat16")


# ---- passes of one's own -------------------------------------------------------------------------------------------


def trained(model: PeftModel, seed: int) -> tuple[list[float], Tensors]:
    """Losses and gradients of both halves, over microbatches that are under way several at a time."""
    given = [batch("none", 1, ROW, seed=100 * seed + index).inputs() for index in range(MICROBATCHES)]
    losses = clients.accumulate(model, given, [1 / MICROBATCHES] * MICROBATCHES, depth=MICROBATCHES)
    own = {name: value.grad for name, value in adapter_parameters(model).items() if value.grad is not None}
    return losses, {**own, **trunk_state(model, gradients=True)}


def at_once(model_dir: Path, address: str, arithmetic: TrunkArithmetic) -> list[tuple[list[float], Tensors]]:
    """What two clients train, each with an adapter and text of its own."""
    adapters = [trained_adapter(model_dir, ALL_LINEAR, seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        models = [
            opened(model_dir, address, CUT, tensors, client_id=f"client-{seed}", arithmetic=arithmetic)
            for seed, tensors in enumerate(adapters)
        ]
        with models[0] as first, models[1] as second:
            return list(pool.map(trained, (first, second), (1, 2)))


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_deterministic_client_gets_the_bits_that_it_gets_alone(
    lanes: int, llama_dir: Path, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    forward = Lane.forward

    def noted(lane: Lane, asked: Any, **how: Any) -> Any:
        passes.append(len(asked))
        time.sleep(0.02)  # so that the other client's request is there before the pass ends
        return forward(lane, asked, **how)

    monkeypatch.setattr(Lane, "forward", noted)
    with serving(lanes=lanes) as trunk:
        alone = []
        for seed in (1, 2):
            tensors = trained_adapter(llama_dir, ALL_LINEAR, seed)
            with opened(llama_dir, trunk.address, CUT, tensors, arithmetic=DETERMINISTIC) as model:
                alone.append(trained(model, seed))
        together = at_once(llama_dir, trunk.address, DETERMINISTIC)
        assert set(passes) == {1}
        at_once(llama_dir, trunk.address, PLAIN)
    for one, other in zip(alone, together, strict=True):
        assert one[0] == other[0]
        assert differences(one[1], other[1]) == []
    assert lanes == 2 or max(passes) == 2, "without the setting the two do meet in a pass"
