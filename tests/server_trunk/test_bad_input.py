"""Whatever a client sends, it gets one clear line and the right status, and the trunk goes on serving."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import torch

from contract import codec, errors
from contract import trunk_pb2 as pb
from contract.adapter import from_bytes, sha256_hex, to_bytes
from contract.wire import MAX_MESSAGE_BYTES
from tests.server_trunk.conftest import HIDDEN, RunningTrunk
from tests.server_trunk.wire_client import Refused, WireClient, WireSession

Status = grpc.StatusCode
HIDDEN_BTD = torch.zeros(1, 4, HIDDEN)


@pytest.fixture
def session(client: WireClient, lora: pb.Lora) -> WireSession:
    return client.session(client.hello(lora))


def assert_refused(refused: Refused, error: type[errors.TrunklineError], line: str) -> None:
    assert refused.error is error, refused
    assert refused.status is Status[error.grpc_status]
    assert re.search(line, refused.line), refused.line
    assert "\n" not in refused.line


def assert_alive(client: WireClient, lora: pb.Lora) -> None:
    session = client.session(client.hello(lora))
    assert session.forward(HIDDEN_BTD).shape == HIDDEN_BTD.shape
    session.close()


AGREEMENT = [
    ("fingerprint", "f" * 64, "fingerprint is 'f+' at the client and '[0-9a-f]{64}' at the trunk"),
    ("head_layers", 2, "head_layers is 2 at the client and 1 at the trunk"),
    ("tail_layers", 0, "tail_layers is 0 at the client and 1 at the trunk"),
    ("dtype", "bfloat16", "dtype is 'bfloat16' at the client and 'float32' at the trunk"),
    ("attn_implementation", "eager", "attn_implementation is 'eager' at the client and 'sdpa' at the trunk"),
    ("torch_version", "1.0", "torch_version is '1.0' at the client and '2"),
    ("transformers_version", "4.0", "transformers_version is '4.0' at the client"),
    ("peft_version", "0.1", "peft_version is '0.1' at the client"),
]


@pytest.mark.parametrize(("field", "value", "line"), AGREEMENT)
def test_a_disagreement_names_both_sides(client: WireClient, lora: pb.Lora, field: str, value: Any, line: str) -> None:
    hello = client.hello(lora)
    setattr(hello.model, field, value)
    with pytest.raises(Refused) as caught:
        client.session(hello)
    assert_refused(caught.value, errors.AgreementError, line)


HELLOS: list[tuple[dict[str, Any], type[errors.TrunklineError], str]] = [
    ({"protocol": 9}, errors.AgreementError, "protocol is 9 at the client and 2 at the trunk"),
    (
        {"codecs": ["zip"]},
        errors.FrameError,
        r"hello.codecs is \['zip'\]; it must name some of identity, bf16, .*int8",
    ),
    ({"trainable": "C"}, errors.FrameError, "hello.trainable is 'C'; it must be A, B, AB or none"),
    ({"adapter_sha256": "0" * 64}, errors.SessionError, "does not hold adapter 0{64}; put it first"),
    ({"adapter_sha256": "../../etc/passwd"}, errors.FrameError, "no SHA-256"),
    ({"round": pb.RoundId(run="r", round=1, attempt=1)}, errors.FrameError, "hello.seed with a round"),
    (
        {"round": pb.RoundId(run="../r", round=1, attempt=1), "adapter_sha256": "0" * 64},
        errors.FrameError,
        "run is '../r'; it must be 1 to 128 letters",
    ),
    (
        {"round": pb.RoundId(run="r", round=1, attempt=1), "client_id": "a/b", "adapter_sha256": "0" * 64},
        errors.FrameError,
        "client_id is 'a/b'",
    ),
]


@pytest.mark.parametrize(("fields", "error", "line"), HELLOS)
def test_a_hello_that_cannot_be_served_is_refused(
    client: WireClient, lora: pb.Lora, fields: dict[str, Any], error: type[errors.TrunklineError], line: str
) -> None:
    with pytest.raises(Refused) as caught:
        client.session(client.hello(lora, **fields))
    assert_refused(caught.value, error, line)


def test_a_hello_without_a_start_is_refused(client: WireClient, lora: pb.Lora) -> None:
    hello = client.hello(lora)
    hello.ClearField("seed")
    with pytest.raises(Refused) as caught:
        client.session(hello)
    assert_refused(caught.value, errors.FrameError, "hello.start is missing")


LORAS: list[tuple[dict[str, Any], type[errors.TrunklineError], str]] = [
    ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, errors.AgreementError, r"not hold: model.layers.0.self"),
    ({"target_modules": ["model.layers.1"]}, errors.AgreementError, "does not hold: model.layers.1"),
    ({"target_modules": ["a", "b", "c", "d", "e"]}, errors.AgreementError, "a, b, c and 2 more"),
    ({"target_parameters": ["model.layers.1.mlp.experts.w"]}, errors.AgreementError, "experts.w"),
    ({"rank": 0}, errors.FrameError, "lora.rank is 0; it must be 1 to 32"),
    ({"rank": 1 << 30}, errors.FrameError, "lora.rank is 1073741824"),
    ({"rank_pattern": {"model.layers.1.self_attn.q_proj": 99}}, errors.FrameError, "lora.rank is 99"),
    ({"dropout": 1.0}, errors.FrameError, "lora.dropout is 1.0"),
    ({"alpha": math.nan}, errors.FrameError, "lora.alpha is nan"),
]


@pytest.mark.parametrize(("fields", "error", "line"), LORAS)
def test_a_lora_that_does_not_fit_the_trunk_is_refused(
    client: WireClient, fields: dict[str, Any], error: type[errors.TrunklineError], line: str
) -> None:
    plain: dict[str, Any] = {"rank": 2, "alpha": 4.0, "target_modules": ["model.layers.1.self_attn.q_proj"]}
    with pytest.raises(Refused) as caught:
        client.session(client.hello(pb.Lora(**{**plain, **fields})))
    assert_refused(caught.value, error, line)


def test_an_adapter_of_another_shape_is_refused(client: WireClient, lora: pb.Lora) -> None:
    data = bytes(client.session(client.hello(lora)).read())
    tensors = from_bytes(data)
    name = sorted(tensors)[0]
    for changed, line in (
        ({**tensors, name: tensors[name][:1]}, f"{name}: the first adapter has"),
        ({key: value for key, value in tensors.items() if key != name}, f"{name}: the first adapter has none"),
        ({**tensors, "extra": torch.zeros(1)}, "holds extra, which"),
    ):
        other = to_bytes(changed)
        client.put_adapter(sha256_hex(other), other)
        with pytest.raises(Refused) as caught:
            client.session(client.hello(lora, adapter_sha256=sha256_hex(other)))
        assert_refused(caught.value, errors.AgreementError, re.escape(line))
    assert_alive(client, lora)


def test_a_frame_before_hello_has_no_session(client: WireClient) -> None:
    session = client.session(None)
    session.send(step=pb.Step(lr=1.0))
    assert_refused(session.ending(), errors.SessionError, "a step frame came before hello")


def test_a_second_hello_is_refused(client: WireClient, session: WireSession, lora: pb.Lora) -> None:
    session.send(hello=client.hello(lora))
    assert_refused(session.ending(), errors.FrameError, "a second hello frame")


def test_bytes_that_are_no_frame_are_refused(session: WireSession) -> None:
    session.send_raw(b"\xff\xff\xff\xff")
    assert_refused(session.ending(), errors.FrameError, "4 bytes are not a ClientFrame")


def test_a_chunk_without_a_header_is_refused(session: WireSession) -> None:
    session.send_data(memoryview(b"abcd"))
    assert_refused(session.ending(), errors.FrameError, "a chunk came that no header announced")


FORWARDS: list[tuple[dict[str, Any], type[errors.TrunklineError], str]] = [
    (
        {
            "hidden": pb.TensorHeader(
                dtype="float32", codec="identity", shape=[5, 13, HIDDEN], size_bytes=5 * 13 * HIDDEN * 4
            )
        },
        errors.FrameTooLargeError,
        "forward.hidden: 5 x 13 tokens are over the limit of 64",
    ),
    (
        {"hidden": pb.TensorHeader(dtype="float32", codec="identity", shape=[1, 4, HIDDEN], size_bytes=1 << 50)},
        errors.FrameError,
        "forward.hidden: size_bytes is 1125899906842624",
    ),
    (
        {"hidden": pb.TensorHeader(dtype="float64", codec="identity", shape=[1, 4, HIDDEN], size_bytes=1024)},
        errors.FrameError,
        "forward.hidden: dtype is 'float64'",
    ),
    (
        {"hidden": pb.TensorHeader(dtype="float32", codec="identity", shape=[1, 4, 31], size_bytes=496)},
        errors.FrameError,
        r"forward.hidden: shape is \[1, 4, 31\]; it must be \[B, T, 32\]",
    ),
    ({"has_attention_mask": True, "attention_mask_bits": b""}, errors.FrameError, "attention_mask_bits has 0 bytes"),
    ({"position_ids": [1, 2, 3]}, errors.FrameError, "position_ids has 3 values; it must have none, 4 or 4"),
    (
        {"position_ids": [0, 1, 2, 128]},
        errors.FrameError,
        "forward.position_ids holds 128; they must be 0 to 127, below the model's max_position_embeddings",
    ),
    ({"position_ids": [0, 1, 2, (1 << 32) - 1]}, errors.FrameError, "forward.position_ids holds 4294967295"),
    ({"autocast_dtype": "int8"}, errors.FrameError, "forward.autocast_dtype is 'int8'"),
]


@pytest.mark.parametrize(("fields", "error", "line"), FORWARDS)
def test_a_forward_is_refused_before_its_data_is_taken(
    session: WireSession, fields: dict[str, Any], error: type[errors.TrunklineError], line: str
) -> None:
    header, _ = codec.encode(HIDDEN_BTD, "identity")
    session.send(forward=pb.Forward(**{"microbatch": 1, "hidden": header, "reply_codec": "identity", **fields}))
    assert_refused(session.ending(), error, line)


DELTA_BYTES = 4 * (HIDDEN + 4)
DELTAS: list[tuple[dict[str, Any], str]] = [
    ({"samples": [1], "differences": [True]}, "forward.hidden: size_bytes is 144; .* by codec int4-delta takes 80"),
    ({"samples": [1]}, "forward.differences has 0 values; the batch has 1 rows"),
    (
        {"samples": [1, 2], "differences": [False]},
        "forward.samples has 2 places and 1 differences; the batch has 1 rows",
    ),
    ({"samples": [1], "differences": [False], "forgotten": [1]}, "forward.forgotten names .* nothing is kept at"),
    ({"samples": [1], "differences": [False], "reply_codec": "int8"}, "a tensor by int4-delta needs a reply by it"),
    ({"samples": [1], "differences": [False], "need_grad": False}, "a tensor by int4-delta needs a reply by it"),
    (
        {"samples": [1], "differences": [True], "size": 80},
        "a row of 4 positions at place 1, where nothing",
    ),
]


@pytest.mark.parametrize(("fields", "line"), DELTAS)
def test_a_forward_by_int4_delta_that_no_client_sends_is_refused_before_its_data_is_taken(
    client: WireClient, lora: pb.Lora, fields: dict[str, Any], line: str
) -> None:
    given = dict(fields)
    size = given.pop("size", DELTA_BYTES)
    hidden = pb.TensorHeader(dtype="float32", codec="int4-delta", shape=[1, 4, HIDDEN], size_bytes=size)
    session = client.session(client.hello(lora, codecs=["int4-delta", "int8"]))
    request = {"microbatch": 1, "hidden": hidden, "reply_codec": "int4-delta", "need_grad": True, **given}
    session.send(forward=pb.Forward(**request))
    assert_refused(session.ending(), errors.FrameError, line)


def test_samples_over_the_sessions_bytes_are_refused(start_trunk: Callable[..., RunningTrunk], lora: pb.Lora) -> None:
    client = WireClient(start_trunk(sample_cache_mib=0).address)
    session = client.session(client.hello(lora, codecs=["int4-delta", "int8"]))
    assert session.welcome.sample_cache_bytes == 0
    hidden = pb.TensorHeader(dtype="float32", codec="int4-delta", shape=[1, 4, HIDDEN], size_bytes=DELTA_BYTES)
    forward = pb.Forward(
        microbatch=1, hidden=hidden, reply_codec="int4-delta", need_grad=True, samples=[1], differences=[False]
    )
    session.send(forward=forward)
    assert_refused(session.ending(), errors.FrameError, "512 bytes would be kept; the session's limit is 0")


def test_samples_by_another_codec_and_gradients_by_int4_delta_are_refused(client: WireClient, lora: pb.Lora) -> None:
    session = client.session(client.hello(lora, codecs=["identity", "int4-delta"]))
    header, _ = codec.encode(HIDDEN_BTD, "identity")
    session.send(forward=pb.Forward(microbatch=1, hidden=header, reply_codec="identity", samples=[1]))
    assert_refused(
        session.ending(), errors.FrameError, "forward: samples, or a reply by int4-delta, to a tensor by identity"
    )
    session = client.session(client.hello(lora, codecs=["identity", "int4-delta"]))
    session.forward(HIDDEN_BTD)
    session.send(backward=pb.Backward(microbatch=1, grad=header, reply_codec="int4-delta"))
    assert_refused(
        session.ending(), errors.FrameError, "backward.reply_codec is 'int4-delta'; this session agreed on identity"
    )


def test_rows_and_positions_up_to_the_models_limit_are_taken_and_longer_rows_refused(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    client = WireClient(start_trunk().address)
    session = client.session(client.hello(lora))
    session.forward(torch.zeros(2, 128, HIDDEN), position_ids=range(128))
    with pytest.raises(Refused) as caught:
        session.forward(torch.zeros(1, 129, HIDDEN))
    line = "forward.hidden: rows of 129 tokens; the model's max_position_embeddings is 128"
    assert_refused(caught.value, errors.FrameError, line)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_forward_is_refused(session: WireSession, bad: float) -> None:
    tensor = HIDDEN_BTD.clone()
    tensor[0, 3, 5] = bad
    with pytest.raises(Refused) as caught:
        session.forward(tensor)
    assert_refused(caught.value, errors.NonFiniteError, r"forward.hidden: a NaN or an infinity at \[B, T\] = \[0, 3\]")


def test_a_non_finite_backward_is_refused(session: WireSession) -> None:
    output = session.forward(HIDDEN_BTD)
    with pytest.raises(Refused) as caught:
        session.backward(torch.full_like(output, math.nan))
    assert_refused(caught.value, errors.NonFiniteError, "backward.grad: a NaN or an infinity")


def test_a_truncated_frame_is_refused(session: WireSession, client: WireClient, lora: pb.Lora) -> None:
    header, data = codec.encode(HIDDEN_BTD, "identity")
    session.send(forward=pb.Forward(microbatch=1, hidden=header, reply_codec="identity"))
    session.send_data(data[:100])
    session.send(step=pb.Step(lr=1.0))
    assert_refused(session.ending(), errors.FrameError, "forward.hidden: truncated at byte 100 of 512")
    session = client.session(client.hello(lora))
    session.send(forward=pb.Forward(microbatch=1, hidden=header, reply_codec="identity"))
    session.send_data(data[:100])
    session.hang_up()
    assert_refused(session.ending(), errors.FrameError, "forward.hidden: truncated at byte 100 of 512")


def test_more_data_than_announced_is_refused(session: WireSession) -> None:
    header, data = codec.encode(HIDDEN_BTD, "identity")
    session.send(forward=pb.Forward(microbatch=1, hidden=header, reply_codec="identity"))
    session.send_data(data[:100])
    session.send_data(data)
    assert_refused(session.ending(), errors.FrameTooLargeError, "forward.hidden: 612 bytes came; .* announced 512")


def test_a_message_over_the_limit_is_refused(session: WireSession) -> None:
    session.send(chunk=pb.TensorChunk(data=bytes(MAX_MESSAGE_BYTES + 1)))
    refused = session.ending()
    assert refused.status is Status.RESOURCE_EXHAUSTED
    assert "larger than max" in refused.line


def test_a_gradient_of_another_shape_or_dtype_is_refused(client: WireClient, lora: pb.Lora) -> None:
    for gradient, line in (
        (torch.zeros(1, 3, HIDDEN), r"backward.grad: shape is \[1, 3, 32\]; it must be \[1, 4, 32\]"),
        (torch.zeros(1, 4, HIDDEN, dtype=torch.bfloat16), "backward.grad: dtype is 'bfloat16'; it must be float32"),
    ):
        session = client.session(client.hello(lora))
        session.forward(HIDDEN_BTD)
        with pytest.raises(Refused) as caught:
            session.backward(gradient)
        assert_refused(caught.value, errors.FrameError, line)


def test_a_backward_without_its_forward_is_refused(client: WireClient, session: WireSession, lora: pb.Lora) -> None:
    with pytest.raises(Refused) as caught:
        session.backward(HIDDEN_BTD, microbatch=5)
    assert_refused(caught.value, errors.SessionError, "no forward of microbatch 5 waits for a backward")
    session = client.session(client.hello(lora))
    session.forward(HIDDEN_BTD, need_grad=False)
    with pytest.raises(Refused) as caught:
        session.backward(HIDDEN_BTD)
    assert_refused(caught.value, errors.SessionError, "no forward of microbatch 1")


def test_a_backward_after_a_step_says_that_the_weights_have_changed(session: WireSession) -> None:
    session.forward(HIDDEN_BTD)
    session.step()
    with pytest.raises(Refused) as caught:
        session.backward(HIDDEN_BTD)
    assert_refused(caught.value, errors.ExpiredGraphError, "adapter was stepped after its forward")


def test_too_many_pending_graphs_are_refused_and_dropped_ones_make_room(session: WireSession) -> None:
    for _ in range(3):
        session.forward(HIDDEN_BTD)
    session.forward(HIDDEN_BTD, dropped=[1])
    with pytest.raises(Refused) as caught:
        session.forward(HIDDEN_BTD)
    assert_refused(caught.value, errors.CapacityError, "3 forwards wait for their backward")


STEPS = [
    ({"lr": -1.0}, "step.lr is -1.0; it must be 0 to 1e\\+06"),
    ({"grad_scale": math.nan}, "step.grad_scale is nan"),
    ({"beta1": 1.0}, "step.beta1 is 1.0; it must be at least 0 and less than 1"),
    ({"eps": math.inf}, "step.eps is inf; it must be 0 to"),
]


@pytest.mark.parametrize(("fields", "line"), STEPS)
def test_a_step_with_an_impossible_setting_is_refused(
    session: WireSession, fields: dict[str, float], line: str
) -> None:
    with pytest.raises(Refused) as caught:
        session.step(**fields)
    assert_refused(caught.value, errors.FrameError, line)


def test_a_session_of_its_own_has_no_round_to_contribute_to(session: WireSession) -> None:
    with pytest.raises(Refused) as caught:
        session.close(trained_tokens=1, contribute=True)
    assert_refused(caught.value, errors.FrameError, "close.contribute in a session without a round")


def test_a_full_trunk_says_so(start_trunk: Callable[..., RunningTrunk], lora: pb.Lora) -> None:
    client = WireClient(start_trunk(max_sessions=1).address)
    first = client.session(client.hello(lora))
    with pytest.raises(Refused) as caught:
        client.session(client.hello(lora))
    assert_refused(caught.value, errors.CapacityError, "all 1 sessions of this trunk are taken")
    first.close()
    first.ending()
    client.session(client.hello(lora)).close()


def test_an_expired_graph_says_so_and_its_memory_is_given_back(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    client = WireClient(start_trunk(pending_ttl_s=0.2, max_pending=1).address)
    session = client.session(client.hello(lora))
    session.forward(HIDDEN_BTD)
    time.sleep(0.6)
    session.forward(HIDDEN_BTD)
    with pytest.raises(Refused) as caught:
        session.backward(HIDDEN_BTD, microbatch=1)
    assert_refused(caught.value, errors.ExpiredGraphError, "freed after waiting 0.2 s for its backward")


def test_a_silent_session_is_closed(start_trunk: Callable[..., RunningTrunk], lora: pb.Lora) -> None:
    client = WireClient(start_trunk(idle_timeout_s=0.4).address)
    session = client.session(client.hello(lora))
    assert_refused(session.ending(), errors.DeadlineError, "no frame came for 0.4 s")
    assert client.call("Describe", pb.DescribeRequest()).open_sessions == 0


def test_uploads_are_checked(client: WireClient) -> None:
    for data, sha256, size, error, line in (
        (b"x" * 3000, "0" * 64, None, errors.IntegrityError, "the adapter hashes to"),
        (b"x" * 3000, sha256_hex(b"x" * 3000), None, errors.ModelError, "not safetensors"),
        (b"x" * 3000, "0" * 64, 4000, errors.FrameError, "adapter: truncated at byte 3000 of 4000"),
        (b"x" * 3000, "0" * 64, 2500, errors.FrameTooLargeError, "adapter: 3000 bytes came"),
        (b"x" * 3000, "0" * 64, 1 << 40, errors.FrameTooLargeError, "the adapter has 1099511627776 bytes"),
    ):
        with pytest.raises(Refused) as caught:
            client.put_adapter(sha256, data, size)
        assert_refused(caught.value, error, line)
    with pytest.raises(Refused) as caught:
        client.call("PutAdapter", iter(()))
    assert_refused(caught.value, errors.FrameError, "no adapter came")
    with pytest.raises(Refused) as caught:
        client.get_adapter("0" * 64)
    assert_refused(caught.value, errors.SessionError, "does not hold adapter")


def test_the_trunk_goes_on_after_all_of_it(client: WireClient, lora: pb.Lora) -> None:
    assert_alive(client, lora)
