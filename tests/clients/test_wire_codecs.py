"""Each codec through a real trunk: what crosses each way, what it costs the gradients, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import clients
from clients.split_model import adapter_state, remote_layers, trunk_state
from contract.codec import CODECS
from contract.errors import AgreementError, ConfigError, NonFiniteError
from contract.trunk_pb2 import ClientFrame
from contract.trunk_pb2 import Forward as ForwardFrame
from tests.clients.capture import Capture
from tests.clients.conftest import ALL_LINEAR, CUT
from tests.conftest import TrunkProcess
from tests.contract.families import batch

LARGEST_ERROR = {"identity": 0.0, "bf16": 0.02, "fp16": 0.003, "int8": 0.06}


@contextmanager
def opened(model_dir: Path, address: str, codec: str, codec_backward: str = "same") -> Iterator[PeftModel]:
    model = clients.load_split_model(
        model_dir, address, CUT.head, CUT.tail, ALL_LINEAR, codec=codec, codec_backward=codec_backward, timeout_s=20
    )
    yield model
    remote_layers(model).trunk.abandon()


def gradients(model_dir: Path, address: str, codec: str, codec_backward: str = "same") -> torch.Tensor:
    with opened(model_dir, address, codec, codec_backward) as model:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        model(**batch("right").inputs()).loss.backward()
        own = [parameter.grad.flatten() for name, parameter in model.named_parameters() if "lora" in name]  # type: ignore[union-attr]
        return torch.cat([*own, *(value.flatten() for value in trunk_state(model, gradients=True).values())])


@pytest.mark.parametrize("codec", CODECS)
def test_gradients_of_both_halves_are_as_close_as_the_codec_allows(
    codec: str, llama_dir: Path, trunk: TrunkProcess
) -> None:
    exact = gradients(llama_dir, trunk.address, "identity")
    found = gradients(llama_dir, trunk.address, codec)
    error = float((found - exact).norm() / exact.norm())
    assert error <= LARGEST_ERROR[codec]
    assert (error == 0.0) == (codec == "identity")


def test_each_direction_goes_by_its_own_codec_there_and_back(llama_dir: Path, trunk: TrunkProcess) -> None:
    capture = Capture(trunk.address)
    with opened(llama_dir, capture.address, "int8", "bf16") as model:
        model(**batch("right").inputs()).loss.backward()
        clients.close(model)
    frames = [ClientFrame.FromString(message) for call in capture.messages() if call != [b""] for message in call]
    capture.close()
    (hello,) = [frame.hello for frame in frames if frame.HasField("hello")]
    (forward,) = [frame.forward for frame in frames if frame.HasField("forward")]
    (backward,) = [frame.backward for frame in frames if frame.HasField("backward")]
    assert list(hello.codecs) == ["int8", "bf16"]
    assert (forward.hidden.codec, forward.reply_codec) == ("int8", "int8")
    assert (backward.grad.codec, backward.reply_codec) == ("bf16", "bf16")
    assert forward.hidden.size_bytes < 0.36 * _values(forward) * 4
    assert backward.grad.size_bytes == _values(forward) * 2


def _values(forward: ForwardFrame) -> int:
    rows, tokens, hidden = forward.hidden.shape
    mask = batch("right").inputs()["attention_mask"]
    assert mask.shape == (rows, tokens)
    return int(mask.sum()) * int(hidden)


def test_auto_on_loopback_says_what_it_measured_and_trains(
    llama_dir: Path, trunk: TrunkProcess, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(llama_dir, trunk.address, "auto") as model, caplog.at_level(logging.INFO, "trunkline.clients"):
        for _ in range(9):
            model(**batch("right").inputs()).loss.backward()
            model.zero_grad()
        assert all(bool(torch.isfinite(value).all()) for value in adapter_state(model).values())
    assert any("codec auto: " in record.getMessage() for record in caplog.records)


def test_judging_needs_no_measurement(llama_dir: Path, trunk: TrunkProcess, caplog: pytest.LogCaptureFixture) -> None:
    with opened(llama_dir, trunk.address, "auto") as model, caplog.at_level(logging.INFO, "trunkline.clients"):
        with torch.no_grad():
            for _ in range(20):
                model(**batch("right").inputs())
    assert not caplog.records


def test_what_fp16_cannot_hold_is_refused_before_it_is_sent(llama_dir: Path, trunk: TrunkProcess) -> None:
    with opened(llama_dir, trunk.address, "fp16") as model:
        model.get_input_embeddings().weight.data[0, 0] = 1e5
        sent = remote_layers(model).trunk.wire_log.sent_bytes
        with pytest.raises(NonFiniteError, match="a value of .* does not fit the codec fp16"):
            model(input_ids=torch.zeros(1, 3, dtype=torch.int64))
        assert remote_layers(model).trunk.wire_log.sent_bytes == sent
        model.get_input_embeddings().weight.data[0, 0] = 1.0
        assert torch.isfinite(model(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits).all()


def test_a_trunk_that_takes_fewer_codecs_is_named_with_both_lists(
    llama_dir: Path, trunk: TrunkProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("clients.link.WireCodecs.offered", lambda codecs: ["bf16"])
        with pytest.raises(AgreementError, match="codecs are bf16; of those the trunk at .* takes bf16"):
            with opened(llama_dir, trunk.address, "bf16", "int8"):
                pass


def test_an_unknown_codec_is_refused_before_anything_is_sent(llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match="codec-backward is 'int4'; it must be one of .*, int8, auto"):
        clients.load_split_model(llama_dir, "127.0.0.1:1", 1, 1, ALL_LINEAR, codec_backward="int4")
