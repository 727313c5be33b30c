"""Conversations with a trunk that keep to the rules, drawn from a seed: the frames of one session, as bytes."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from contract import codec
from contract import trunk_pb2 as pb
from contract.delta import SampleCache, Samples
from contract.records import DELTA_CODEC
from contract.wire import PROTOCOL, chunk_frames

CACHE_BYTES = 1 << 20
FUZZED_RUN = "fuzzed"
"""The run of those that train for a round; one that ends well contributes to it."""
_LENGTHS = (1, 3, 8, 17)
_AUTOCASTS = ("", "", "", "bfloat16")


@dataclass(frozen=True)
class Served:
    """What a trunk serves, as far as its clients must know it; `bases` are adapters that it holds, by LoRA."""

    model: pb.ModelAgreement
    hidden_size: int
    loras: tuple[pb.Lora, ...]
    bases: tuple[str, ...]


@dataclass
class Request:
    """One frame, parsed so that it can be changed, and the data that follows it."""

    frame: pb.ClientFrame
    data: bytes = b""

    def frames(self, chunk_bytes: int) -> list[bytes]:
        return [self.frame.SerializeToString(), *chunk_frames(memoryview(self.data), chunk_bytes)]


class Conversation:
    """The requests of one session, from its hello to its close."""

    def __init__(self, draw: random.Random, served: Served) -> None:
        self._draw = draw
        self._served = served
        self._numbers = torch.Generator().manual_seed(draw.randrange(1 << 32))
        self._microbatch = 0
        self.requests: list[Request] = []
        which = draw.randrange(len(served.loras))
        self.codecs = draw.choice((["identity"], ["bf16", "identity"], ["int8"], [DELTA_CODEC, "int8"], ["fp16"]))
        self._hello(served.loras[which], served.bases[which])
        self._cache = SampleCache(CACHE_BYTES, served.hidden_size)
        for _ in range(draw.randrange(1, 4)):
            self._step()
        if draw.random() < 0.3:
            self._add(pb.ClientFrame(read_adapter=pb.ReadAdapter(gradients=draw.random() < 0.5)))
        contribute = self.requests[0].frame.hello.HasField("round") and draw.random() < 0.7
        self._add(pb.ClientFrame(close=pb.Close(trained_tokens=draw.randrange(1, 100), contribute=contribute)))

    def _add(self, frame: pb.ClientFrame, data: bytes = b"") -> None:
        self.requests.append(Request(frame, data))

    def _hello(self, lora: pb.Lora, base: str) -> None:
        draw = self._draw
        hello = pb.Hello(
            protocol=PROTOCOL,
            client_id=f"client-{draw.randrange(5)}",
            model=self._served.model,
            lora=lora,
            trainable=draw.choice(("A", "B", "AB", "AB", "none")),
            codecs=self.codecs,
            deterministic=draw.random() < 0.5,
            quiet=draw.random() < 0.2,
            trunk_autocast=draw.choice(("", "", "auto", "bfloat16")),
        )
        if draw.random() < 0.5:
            hello.adapter_sha256 = base
            if draw.random() < 0.7:
                hello.round.run, hello.round.round, hello.round.attempt = FUZZED_RUN, draw.randrange(1, 4), 1
        else:
            hello.seed = draw.randrange(1 << 40)
        self._add(pb.ClientFrame(hello=hello))

    def _step(self) -> None:
        draw = self._draw
        waiting = [self._forward() for _ in range(draw.randrange(1, 3))]
        draw.shuffle(waiting)
        for microbatch, output, mask_BT in waiting:
            if draw.random() < 0.9:
                self._backward(microbatch, output, mask_BT)
        step = pb.Step(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, grad_scale=1.0)
        self._add(pb.ClientFrame(step=step))

    def _forward(self) -> tuple[int, Tensor, Tensor | None]:
        """The number of the microbatch, a gradient for it, and its mask."""
        draw, hidden_size = self._draw, self._served.hidden_size
        rows, length = draw.randrange(1, 4), draw.choice(_LENGTHS)
        self._microbatch += 1
        hidden_BTD = torch.randn(rows, length, hidden_size, generator=self._numbers)
        mask_BT = self._mask(rows, length)
        forward = pb.Forward(
            microbatch=self._microbatch,
            has_attention_mask=mask_BT is not None,
            attention_mask_bits=b"" if mask_BT is None else codec.pack_mask(mask_BT),
            autocast_dtype=draw.choice(_AUTOCASTS),
            training=draw.random() < 0.5,
            need_grad=True,
            reply_codec=self.codecs[-1],
        )
        if draw.random() < 0.3:
            forward.position_ids.extend(range(length))
        if self.codecs[0] == DELTA_CODEC and draw.random() < 0.7:
            samples = Samples(tuple(draw.sample(range(1, 1 << 20), rows)), (False,) * rows)
            samples.write(forward)
            forward.reply_codec = DELTA_CODEC
            self._cache.admit(samples, codec.sent_lengths(mask_BT, hidden_BTD.shape))
            header, data = self._cache.encode("head", hidden_BTD, mask_BT, samples)
        else:
            header, data = codec.encode(hidden_BTD, self.codecs[-1], mask_BT)
        forward.hidden.CopyFrom(header)
        self._add(pb.ClientFrame(forward=forward), bytes(data))
        return self._microbatch, torch.randn(hidden_BTD.shape, generator=self._numbers), mask_BT

    def _mask(self, rows: int, length: int) -> Tensor | None:
        if self._draw.random() < 0.5:
            return None
        mask_BT = torch.zeros(rows, length, dtype=torch.int64)
        for row in range(rows):
            mask_BT[row, : self._draw.randrange(1, length + 1)] = 1
        return mask_BT

    def _backward(self, microbatch: int, grad_BTD: Tensor, mask_BT: Tensor | None) -> None:
        header, data = codec.encode(grad_BTD, self.codecs[-1], mask_BT)
        backward = pb.Backward(
            microbatch=microbatch,
            grad=header,
            want_input_grad=self._draw.random() < 0.8,
            reset_gradient=self._draw.random() < 0.3,
            reply_codec=self.codecs[-1],
        )
        self._add(pb.ClientFrame(backward=backward), bytes(data))
