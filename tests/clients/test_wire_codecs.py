"""Each codec through a real trunk: what crosses each way, what it costs the gradients, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import clients
from clients.split_model import adapter_state, remote_layers, trunk_state
from contract.codec import CODECS
from contract.config import RunConfig
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


def announced(model: PeftModel, rows: list[int], *, training: bool = True) -> torch.Tensor:
    remote_layers(model).trunk.announce(rows)
    with torch.set_grad_enabled(training):
        loss: torch.Tensor = model(**batch("right", rows=len(rows)).inputs()).loss
    return loss


def test_int4_delta_sends_a_row_in_full_once_and_then_what_changed(llama_dir: Path, trunk: TrunkProcess) -> None:
    capture = Capture(trunk.address)
    with opened(llama_dir, capture.address, "int4-delta") as model:
        for rows in ([3, 5, 9], [3, 5, 9], [3, 5, 2]):
            announced(model, rows).backward()  # type: ignore[no-untyped-call]
        announced(model, [3, 5, 9], training=False)
        clients.close(model)
    frames = [ClientFrame.FromString(message) for call in capture.messages() if call != [b""] for message in call]
    capture.close()
    (hello,) = [frame.hello for frame in frames if frame.HasField("hello")]
    forwards = [frame.forward for frame in frames if frame.HasField("forward")]
    assert list(hello.codecs) == ["int4-delta", "int8"]
    assert [list(forward.differences) for forward in forwards[:3]] == [[False] * 3, [True] * 3, [True, True, False]]
    assert [list(forward.samples) for forward in forwards[:3]] == [[1, 2, 3], [1, 2, 3], [1, 2, 4]]
    assert [forward.hidden.codec for forward in forwards] == ["int4-delta"] * 3 + ["int8"]
    assert forwards[3].reply_codec == "int8"
    assert not forwards[3].samples
    assert forwards[1].hidden.size_bytes < 0.6 * forwards[0].hidden.size_bytes
    assert all(frame.backward.reply_codec == "int8" for frame in frames if frame.HasField("backward"))


def test_int4_delta_comes_ever_closer_to_the_exact_loss_of_a_row_that_stays(
    llama_dir: Path, trunk: TrunkProcess
) -> None:
    with opened(llama_dir, trunk.address, "identity") as model:
        exact = float(announced(model, [1, 2, 3]).detach())
    with opened(llama_dir, trunk.address, "int4-delta") as model:
        errors = [abs(float(announced(model, [1, 2, 3]).detach()) - exact) for _ in range(5)]
    assert errors[4] <= max(errors[0], 1e-3 * exact)


def test_a_trunk_without_room_keeps_nothing_and_still_trains(
    llama_dir: Path, trunk_process: Callable[..., TrunkProcess]
) -> None:
    small = trunk_process(llama_dir, CUT.head, CUT.tail, sample_cache_mib=0)
    with opened(llama_dir, small.address, "int4-delta") as model:
        for _ in range(2):
            announced(model, [1, 2, 3]).backward()  # type: ignore[no-untyped-call]
        places = remote_layers(model).trunk._places
        assert places.plan([1, 2, 3], [4, 4, 4]).places == (0, 0, 0)


def test_wire_privacy_and_int4_delta_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="codec is int4-delta and wire is empirical; the noise is drawn anew"):
        RunConfig.from_flower({"codec": "int4-delta", "wire": "empirical", "wire-noise": 0.1})
    with pytest.raises(ConfigError, match="codec is int4-delta and wire is dp"):
        RunConfig.from_flower({"codec": "int4-delta", "wire": "dp", "dp": "example", "metrics": "off"})
    with pytest.raises(ConfigError, match="codec-backward is 'int4-delta'"):
        RunConfig.from_flower({"codec-backward": "int4-delta"})
    assert RunConfig.from_flower({"codec": "int4-delta"}).gradient_codec == "int8"


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
