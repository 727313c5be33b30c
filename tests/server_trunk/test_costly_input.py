"""Input that would cost the trunk, or others at it, more than its sender: refused by name before it can."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from contract import codec, errors
from contract import trunk_pb2 as pb
from contract.adapter import from_bytes
from tests.server_trunk.conftest import HIDDEN, RunningTrunk
from tests.server_trunk.test_bad_input import assert_refused
from tests.server_trunk.wire_client import Refused, WireClient, WireSession

HIDDEN_BTD = torch.zeros(1, 4, HIDDEN)


@pytest.fixture
def session(client: WireClient, lora: pb.Lora) -> WireSession:
    return client.session(client.hello(lora))


LONG = [
    ({"client_id": "x" * 129}, "hello.client_id has 129 letters; it may have 128"),
    ({"codecs": ["identity"] * 17}, "hello.codecs has 17 entries; it may have 16"),
    (
        {"lora": pb.Lora(target_modules=["x"] * 65_537)},
        "hello.lora.target_modules has 65537 entries; it may have 65536",
    ),
    (
        {"lora": pb.Lora(rank_pattern={str(number): 1 for number in range(65_537)})},
        "hello.lora.rank_pattern has 65537 entries; it may have 65536",
    ),
]


@pytest.mark.parametrize(("fields", "line"), LONG)
def test_lists_without_end_are_refused_before_they_are_looked_at(
    client: WireClient, lora: pb.Lora, fields: dict[str, Any], line: str
) -> None:
    with pytest.raises(Refused) as caught:
        client.session(client.hello(**{"lora": lora, **fields}))
    assert_refused(caught.value, errors.FrameTooLargeError, re.escape(line))


def test_frames_that_are_no_chunk_are_small(client: WireClient, lora: pb.Lora) -> None:
    session = client.session(None)
    session.send(hello=pb.Hello(client_id="x" * (1 << 20)))
    assert_refused(session.ending(), errors.FrameTooLargeError, "a frame of 10485.. bytes came; one that is no chunk")
    session = client.session(client.hello(lora))
    session.send(forward=pb.Forward(position_ids=range(40_000)))
    limit = (1 << 16) + 8 * 64
    assert_refused(session.ending(), errors.FrameTooLargeError, f"one that is no chunk may have {limit}$")
    session = client.session(client.hello(lora))
    header, _ = codec.encode(HIDDEN_BTD, "identity")
    session.send(forward=pb.Forward(microbatch=1, hidden=header, reply_codec="identity", dropped=range(1025)))
    assert_refused(session.ending(), errors.FrameTooLargeError, "names 1025 microbatches; one forward may name 1024")


def test_a_quoted_line_fits_its_headers_whatever_it_quotes(client: WireClient, lora: pb.Lora) -> None:
    with pytest.raises(Refused) as caught:
        client.session(client.hello(lora, trainable="😀" * 5000))
    assert caught.value.error is errors.FrameError
    assert caught.value.line.startswith("hello.trainable is '\\U0001f600\\U0001f600")
    assert len(caught.value.line.encode()) == 1000


STRUCTURES: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["model.layers.1.self_attn.q_proj"] * 2}, "lora names a target twice"),
    ({"rank_pattern": {"(a+)+$": 2}}, r"lora has a pattern for '\(a\+\)\+\$', which is none of its targets"),
    ({"alpha_pattern": {"model.layers.2.self_attn.q_proj": 2.0}}, "which is none of its targets"),
    ({"alpha": 1e300}, r"lora.alpha is 1e\+300; it must be finite, and 1e\+06 at most"),
    ({"alpha_pattern": {"model.layers.1.self_attn.q_proj": -1e7}}, "lora.alpha is -10000000.0"),
]


@pytest.mark.parametrize(("fields", "line"), STRUCTURES)
def test_a_structure_that_could_fail_a_pass_of_others_is_refused(
    client: WireClient, fields: dict[str, Any], line: str
) -> None:
    plain: dict[str, Any] = {"rank": 2, "alpha": 4.0, "target_modules": ["model.layers.1.self_attn.q_proj"]}
    with pytest.raises(Refused) as caught:
        client.session(client.hello(pb.Lora(**{**plain, **fields})))
    assert_refused(caught.value, errors.FrameError, line)


def test_more_survivors_and_more_tokens_than_there_can_be_are_refused(client: WireClient, session: WireSession) -> None:
    survivors = [str(number) for number in range((1 << 14) + 1)]
    with pytest.raises(Refused) as caught:
        client.call("CommitRound", pb.CommitRoundRequest(survivors=survivors))
    assert_refused(caught.value, errors.FrameTooLargeError, "survivors has 16385 names; it may have 16384")
    with pytest.raises(Refused) as caught:
        client.call("CommitRound", pb.CommitRoundRequest(survivors=["x"] * 400_000))
    assert_refused(caught.value, errors.FrameTooLargeError, "a request of 1200000 bytes came; it may have 1048576")
    with pytest.raises(Refused) as caught:
        session.close(trained_tokens=(1 << 48) + 1)
    assert_refused(caught.value, errors.FrameError, "close.trained_tokens is 281474976710657; it must be at most")


def test_the_largest_numbers_of_one_session_are_nothing_to_those_who_share_its_passes(
    start_trunk: Callable[..., RunningTrunk], lora: pb.Lora
) -> None:
    trunk = start_trunk(lanes=1, batch_tokens=4096)
    client, outputs = WireClient(trunk.address), {}
    hidden = torch.randn(2, 8, HIDDEN, generator=torch.Generator().manual_seed(1))
    alone = client.session(client.hello(lora, seed=5))
    expected = alone.forward(hidden)
    alone.backward(expected)
    expected_grad = torch.cat([value.reshape(-1) for value in from_bytes(alone.read(gradients=True)).values()])
    alone.close()

    def work(number: int) -> None:
        session = client.session(client.hello(lora, seed=5))
        for _ in range(20):
            extreme = number % 2 == 1
            outputs[number] = session.forward(torch.full_like(hidden, 3e38) if extreme else hidden)
            session.backward(torch.full_like(hidden, 3e38) if extreme else outputs[number], reset=True)
        if not extreme:
            gradient = torch.cat([value.reshape(-1) for value in from_bytes(session.read(gradients=True)).values()])
            torch.testing.assert_close(gradient, expected_grad, rtol=1e-3, atol=1e-4)
        session.close()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, number) for number in range(4)]:
            done.result()
    for number in (0, 2):
        torch.testing.assert_close(outputs[number], expected, rtol=1e-4, atol=1e-5)
