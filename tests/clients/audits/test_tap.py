"""What the tap hears is what a trunk gets: states and gradients as of the whole model, bytes as sent."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from clients.audits.tap import Tap, passes_of
from clients.crossing import Crossing
from clients.data import IGNORED, TokenRow
from clients.link import WireCodecs
from clients.remote_trunk import RemoteTrunk
from contract import codec
from contract.codec import CODECS
from contract.config import ConfigValue, RunConfig
from contract.trunk_pb2 import Hello, TensorHeader, Welcome
from contract.wire import chunk_data
from privacy.stream import SecretStream
from privacy.wire import Empirical, Off, WireDp, WireMechanism
from tests.contract.families import VOCAB, attention, save_model

DP: dict[str, ConfigValue] = {"wire": "dp", "dp": "example", "metrics": "off"}


def config_of(family: str = "llama", **settings: ConfigValue) -> RunConfig:
    given = {name.replace("_", "-"): value for name, value in settings.items()}
    return RunConfig.from_flower({"attn-implementation": attention(family), **given})


def fixed(config: RunConfig) -> WireMechanism:
    """The mechanism of `config` with the same noise every time."""
    stream = SecretStream(lambda size: b"\x07" * size)
    if config.wire == "dp":
        clips = config.wire_clip_forward, config.wire_clip_backward
        return WireDp(*clips, config.wire_noise_multiplier, config.wire_releases, stream)
    if config.wire == "empirical":
        return Empirical(config.wire_noise, config.gradient_mask, config.gradient_mask_keep, stream)
    return Off()


def rows_of(*lengths: int, prompt: int = 0) -> list[TokenRow]:
    draw = np.random.default_rng(5)
    rows = []
    for number, length in enumerate(lengths):
        tokens_T = draw.integers(3, VOCAB, size=length, dtype=np.int32)
        labels_T = np.where(np.arange(length) < prompt, IGNORED, tokens_T).astype(np.int32)
        rows.append(TokenRow(number, tokens_T, labels_T, False))
    return rows


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_states_and_gradients_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model_dir = save_model(family, tmp_path / "model")
    rows = rows_of(9, 6, 9, prompt=3)
    found = Tap(model_dir, config_of(family)).cross(rows)
    whole = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation=attention(family)).eval()
    for one, row in zip(found, rows, strict=True):
        assert one.row is row
        states = whole(input_ids=torch.from_numpy(row.tokens_T)[None].long(), output_hidden_states=True)
        cut_BTD = states.hidden_states[3]  # four layers, one of them the tail
        loss = torch.nn.functional.cross_entropy(
            states.logits[0, :-1], torch.from_numpy(row.labels_T[1:]).long(), ignore_index=IGNORED
        )
        (grad_BTD,) = torch.autograd.grad(loss, cut_BTD)
        np.testing.assert_allclose(one.hidden_TD, states.hidden_states[1][0].detach(), atol=1e-5)
        np.testing.assert_allclose(one.answered_TD, cut_BTD[0].detach(), atol=1e-5)
        np.testing.assert_allclose(one.gradient_TD, grad_BTD[0], atol=1e-6)
        expected_TD = states.logits[0].softmax(-1) @ whole.get_output_embeddings().weight
        np.testing.assert_allclose(one.expected_TD, expected_TD.detach(), atol=1e-5)


@dataclass
class DeafTrunk:
    """Takes a Forward and hangs up: what was sent to it is in `sent`."""

    address: str = "nowhere"
    wire_log: None = None
    sent: bytearray = field(default_factory=bytearray)
    headers: list[TensorHeader] = field(default_factory=list)

    def open_stream(self, timeout_s: float) -> DeafTrunk:
        return self

    def round_trip_s(self) -> float:
        raise NotImplementedError

    def send(self, frame: Any) -> None:
        if frame.HasField("forward"):
            self.headers.append(frame.forward.hidden)

    def send_chunks(self, frames: Iterable[bytes], size_bytes: int) -> None:
        for frame in frames:
            data = chunk_data(frame)
            assert data is not None
            self.sent += data

    def receive(self, kind: str) -> Any:
        if kind == "welcome":
            return Welcome(max_tokens=4096, chunk_bytes=1 << 16, codecs=CODECS)
        raise InterruptedError

    def cancel(self) -> None:
        pass


@pytest.mark.parametrize("codec_name", ["identity", "bf16", "int8"])
@pytest.mark.parametrize(
    "settings", [{"wire": "off"}, {"wire": "empirical", "wire-noise": 0.2}, DP], ids=["off", "empirical", "dp"]
)
def test_the_tap_hears_what_a_client_sends(settings: dict[str, ConfigValue], codec_name: str, llama_dir: Path) -> None:
    config = RunConfig.from_flower({**settings, "codec": codec_name})
    tap = Tap(llama_dir, config, fixed)
    (heard,) = tap.simulate(rows_of(7))
    trunk = DeafTrunk()
    session = RemoteTrunk(
        trunk,
        Hello(),
        hidden_size=32,
        adapter_bytes=1,
        mechanism=fixed(config),  # type: ignore[arg-type]
        codecs=WireCodecs(config.codec, config.gradient_codec),
    )
    session.announce([0])
    assert heard.clear is not None
    with pytest.raises(InterruptedError):
        session.forward(
            torch.from_numpy(heard.clear.hidden_TD)[None], Crossing(None, None, None, False), need_grad=True
        )
    sent_BTD = codec.decode(trunk.headers[0], memoryview(trunk.sent))
    np.testing.assert_array_equal(heard.hidden_TD, sent_BTD[0])


def test_noise_averages_out_over_passes_and_rounds_beyond_the_releases_of_one(llama_dir: Path) -> None:
    config = RunConfig.from_flower({**DP, "wire-clip-forward": 1e6, "wire-noise-multiplier": 1e-6, "wire-releases": 2})
    tap = Tap(llama_dir, config)

    def off(passes: int) -> float:
        (one,) = tap.simulate(rows_of(40), passes)
        assert one.clear is not None
        return float(np.std(one.hidden_TD - one.clear.hidden_TD))

    assert off(1) == pytest.approx(1.0, rel=0.1)
    assert off(5) == pytest.approx(5**-0.5, rel=0.1)


def test_only_an_attackers_own_rows_show_what_they_were_before(llama_dir: Path) -> None:
    tap = Tap(llama_dir, config_of(wire="empirical", wire_noise=0.5), fixed)
    assert [one.clear for one in tap.cross(rows_of(5, 8))] == [None, None]
    own = tap.simulate(rows_of(5, 8))
    for one, (sent_TD, clear_TD) in zip(own, tap.simulate_hidden(rows_of(5, 8)), strict=True):
        assert one.clear is not None
        np.testing.assert_array_equal(one.clear.hidden_TD, clear_TD)
        assert not np.array_equal(sent_TD, clear_TD)


def test_the_trunk_of_an_audit_computes_in_bfloat16_where_the_runs_does(llama_dir: Path) -> None:
    tap, rows = Tap(llama_dir, config_of()), rows_of(6, 9)
    exact, cast = tap.cross(rows), tap.with_config(config_of(trunk_autocast="bfloat16")).cross(rows)
    for one, other in zip(exact, cast, strict=True):
        np.testing.assert_array_equal(other.hidden_TD, one.hidden_TD)
        assert not np.array_equal(other.answered_TD, one.answered_TD)
        np.testing.assert_allclose(other.answered_TD, one.answered_TD, atol=0.1)


def test_answers_can_be_replayed_for_what_the_tail_makes_of_them(llama_dir: Path) -> None:
    tap = Tap(llama_dir, config_of())
    crossed = tap.cross(rows_of(6, 9))
    whole = AutoModelForCausalLM.from_pretrained(llama_dir).eval()
    for one, odds_TV in zip(crossed, tap.log_odds_of_next(crossed), strict=True):
        logits_BTV = whole(input_ids=torch.from_numpy(one.row.tokens_T)[None].long()).logits
        np.testing.assert_allclose(odds_TV, logits_BTV[0].log_softmax(-1).detach(), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, 1),
        ({**DP, "wire-releases": 4, "num-rounds": 3}, 12),
        ({"wire": "empirical", "wire-noise": 1.0, "num-rounds": 3}, 3),
        ({"wire": "empirical", "wire-noise": 1.0, "num-rounds": 3, "local-steps": 30}, 9),
        (
            {"wire": "empirical", "wire-noise": 1.0, "local-steps": 0, "local-epochs": 5, "max-tokens": 9000}
            | {"num-rounds": 2},
            10,
        ),
    ],
)
def test_rows_are_sent_as_often_as_in_a_run(settings: dict[str, ConfigValue], passes: int) -> None:
    assert passes_of(RunConfig.from_flower(settings), rows=100) == passes


def test_the_real_mechanism_is_the_usual_one(llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def entropy(size: int) -> bytes:
        asked.append(size)
        return bytes(size)

    monkeypatch.setattr(os, "urandom", entropy)
    Tap(llama_dir, RunConfig.from_flower(DP)).cross(rows_of(5))
    assert asked
