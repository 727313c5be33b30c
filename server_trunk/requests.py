"""What a client's frames ask for, checked. Nothing here allocates more than a few bytes a token."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from contract import trunk_pb2 as pb
from contract.codec import CODECS, SESSION_CODECS, check_header, sent_lengths, unpack_mask, unpack_positions
from contract.delta import Samples
from contract.errors import AgreementError, FrameError, FrameTooLargeError
from contract.records import DELTA_CODEC, AdamWSettings, LoraSpec, RoundKey, Trainable
from contract.trunk_arithmetic import TRUNK_AUTOCAST
from contract.wire import PROTOCOL, lora_from_wire, require_agreement, round_from_wire
from server_trunk.contributions import check_name
from server_trunk.lane import AUTOCAST, Graph

_MAX_SETTING = 1e6  # far above any use, and no product of two overflows float32
_MAX_TARGETS = 1 << 16  # names in a LoRA, far more than any model has layers
_MAX_CODECS = 16
_MAX_DROPPED = 1024  # of one forward; a session has far fewer that wait
_MAX_CLIENT_ID = 128
_MAX_SURVIVORS = 1 << 14  # as many as the members of a secure sum
_MAX_TRAINED_TOKENS = 1 << 48  # the sum over any cohort fits the 64 bits of its message
_TRAINABLE: dict[str, Trainable] = {"A": "A", "B": "B", "AB": "AB", "none": "none"}


@dataclass(frozen=True, slots=True)
class Opening:
    """A hello that this trunk can serve. `start` is an adapter's SHA-256 or a seed."""

    client_id: str
    round_key: RoundKey | None
    spec: LoraSpec
    start: str | int
    trainable: Trainable
    codecs: tuple[str, ...]
    deterministic: bool
    trunk_autocast: str
    quiet: bool


def read_hello(hello: pb.Hello, own: pb.ModelAgreement) -> Opening:
    """Raise AgreementError that names both sides' values where they differ, FrameError where a field is malformed."""
    if hello.protocol != PROTOCOL:
        raise AgreementError(f"protocol is {hello.protocol} at the client and {PROTOCOL} at the trunk")
    require_agreement(hello.model, own)
    start = hello.WhichOneof("start")
    if start is None:
        raise FrameError("hello.start is missing; it must be a seed or an adapter_sha256")
    _check_counts(hello)
    if hello.trainable not in _TRAINABLE:
        raise FrameError(f"hello.trainable is {hello.trainable!r}; it must be A, B, AB or none")
    codecs = tuple(codec for codec in SESSION_CODECS if codec in hello.codecs)
    if not codecs:
        raise FrameError(f"hello.codecs is {list(hello.codecs)[:8]}; it must name some of {', '.join(SESSION_CODECS)}")
    if hello.trunk_autocast not in TRUNK_AUTOCAST.values():
        raise FrameError(f"hello.trunk_autocast is {hello.trunk_autocast!r}; it must be empty, bfloat16 or auto")
    round_key = round_from_wire(hello.round) if hello.HasField("round") else None
    if round_key is not None:
        check_name("run", round_key.run)
        check_name("client_id", hello.client_id)
        if start == "seed":
            raise FrameError("hello.seed with a round; a round's sessions start from an adapter_sha256")
    return Opening(
        client_id=hello.client_id,
        round_key=round_key,
        spec=lora_from_wire(hello.lora),
        start=hello.seed if start == "seed" else hello.adapter_sha256,
        trainable=_TRAINABLE[hello.trainable],
        codecs=codecs,
        deterministic=hello.deterministic,
        trunk_autocast=hello.trunk_autocast,
        quiet=hello.quiet,
    )


def _check_counts(hello: pb.Hello) -> None:
    """Raise FrameTooLargeError for lists that would keep the trunk busy before they are found to name nothing."""
    lora = hello.lora
    for name, count, most in (
        ("client_id", len(hello.client_id), _MAX_CLIENT_ID),
        ("codecs", len(hello.codecs), _MAX_CODECS),
        ("lora.target_modules", len(lora.target_modules), _MAX_TARGETS),
        ("lora.target_parameters", len(lora.target_parameters), _MAX_TARGETS),
        ("lora.rank_pattern", len(lora.rank_pattern), _MAX_TARGETS),
        ("lora.alpha_pattern", len(lora.alpha_pattern), _MAX_TARGETS),
    ):
        if count > most:
            unit = "letters" if name == "client_id" else "entries"
            raise FrameTooLargeError(f"hello.{name} has {count} {unit}; it may have {most}")


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """What comes with a forward's hidden states: int64 mask_BT, int64 position_ids [1 or B, T], and B * T.

    `lengths` are the rows' without padding, and `samples` where they are kept, by int4-delta.
    """

    mask_BT: Tensor | None
    position_ids: Tensor | None
    tokens: int
    lengths: list[int]
    samples: Samples | None


def read_forward(
    forward: pb.Forward, codecs: Collection[str], *, hidden_size: int, max_tokens: int, max_positions: int | None
) -> ForwardInputs:
    """The small inputs of a forward whose fields fit together and within the model. Raises FrameError.

    `max_positions` is the model's own limit: a row's length, and above every position. None is no limit.
    """
    if len(forward.dropped) > _MAX_DROPPED:
        raise FrameTooLargeError(
            f"forward.dropped names {len(forward.dropped)} microbatches; one forward may name {_MAX_DROPPED}"
        )
    mask_BT = _mask(forward, max_tokens)
    check_header(
        forward.hidden,
        codecs=codecs,
        hidden_size=hidden_size,
        max_tokens=max_tokens,
        what="forward.hidden",
        mask_BT=mask_BT,
        differences=forward.differences,
    )
    check_reply_codec(forward.reply_codec, codecs, "forward")
    samples = _samples(forward)
    batch, tokens, _ = forward.hidden.shape
    if max_positions is not None and tokens > max_positions:
        raise FrameError(
            f"forward.hidden: rows of {tokens} tokens; the model's max_position_embeddings is {max_positions}"
        )
    if forward.autocast_dtype not in AUTOCAST:
        names = ", ".join(name or "empty" for name in AUTOCAST)
        raise FrameError(f"forward.autocast_dtype is {forward.autocast_dtype!r}; it must be one of {names}")
    position_ids = unpack_positions(forward.position_ids, batch, tokens)
    if position_ids is not None and max_positions is not None and int(position_ids.max()) >= max_positions:
        raise FrameError(
            f"forward.position_ids holds {int(position_ids.max())}; they must be 0 to {max_positions - 1}, below the "
            "model's max_position_embeddings"
        )
    return ForwardInputs(mask_BT, position_ids, batch * tokens, sent_lengths(mask_BT, forward.hidden.shape), samples)


def _samples(forward: pb.Forward) -> Samples | None:
    """None but by int4-delta, which goes both ways and in training only."""
    samples = Samples.of(forward)
    if forward.hidden.codec != DELTA_CODEC:
        if samples != Samples((), ()) or forward.reply_codec == DELTA_CODEC:
            raise FrameError(f"forward: samples, or a reply by {DELTA_CODEC}, to a tensor by {forward.hidden.codec}")
        return None
    if forward.reply_codec != DELTA_CODEC or not forward.need_grad:
        raise FrameError(f"forward: a tensor by {DELTA_CODEC} needs a reply by it, and need_grad")
    return samples


def _mask(forward: pb.Forward, max_tokens: int) -> Tensor | None:
    """The mask, where there is one and the tensor's shape is such that it can be read; the shape is checked next."""
    shape = forward.hidden.shape
    if not forward.has_attention_mask or len(shape) != 3 or shape[0] * shape[1] > max_tokens:
        return None
    return unpack_mask(forward.attention_mask_bits, shape[0], shape[1])


def check_reply_codec(codec: str, codecs: Collection[str], what: str) -> None:
    """Raise FrameError unless the session agreed on the codec that a reply is asked for in."""
    if codec not in codecs:
        raise FrameError(f"{what}.reply_codec is {codec!r}; this session agreed on {' or '.join(codecs)}")


def check_backward(backward: pb.Backward, graph: Graph, codecs: Collection[str], max_tokens: int) -> None:
    """Raise FrameError unless the gradient has the shape, dtype and mask of its forward's output."""
    codecs = [codec for codec in codecs if codec in CODECS]
    check_reply_codec(backward.reply_codec, codecs, "backward")
    check_header(
        backward.grad,
        codecs=codecs,
        mask_BT=graph.mask_BT,
        hidden_size=graph.shape[-1],
        max_tokens=max_tokens,
        what="backward.grad",
        dtypes=(graph.dtype,),
        shape=graph.shape,
    )


def read_step(step: pb.Step) -> tuple[AdamWSettings, float]:
    """(settings, grad_scale). Raises FrameError for a value that AdamW cannot take."""
    for name, value in (
        ("lr", step.lr),
        ("eps", step.eps),
        ("weight_decay", step.weight_decay),
        ("grad_scale", step.grad_scale),
    ):
        if not 0 <= value <= _MAX_SETTING:
            raise FrameError(f"step.{name} is {value}; it must be 0 to {_MAX_SETTING:g}")
    for name, value in (("beta1", step.beta1), ("beta2", step.beta2)):
        if not 0 <= value < 1:
            raise FrameError(f"step.{name} is {value}; it must be at least 0 and less than 1")
    return AdamWSettings(step.lr, step.beta1, step.beta2, step.eps, step.weight_decay), step.grad_scale


def check_close(close: pb.Close, round_key: RoundKey | None) -> None:
    """Raise FrameError for a contribution to no round, or by more tokens than any client trains."""
    if close.contribute and round_key is None:
        raise FrameError("close.contribute in a session without a round; there is nothing to contribute to")
    if close.trained_tokens > _MAX_TRAINED_TOKENS:
        raise FrameError(f"close.trained_tokens is {close.trained_tokens}; it must be at most {_MAX_TRAINED_TOKENS}")


def read_round(request: pb.RoundId) -> RoundKey:
    """Raise FrameError for a run that none can be called."""
    key = round_from_wire(request)
    check_name("run", key.run)
    return key


def read_survivors(request: pb.CommitRoundRequest) -> list[str]:
    """Raise FrameTooLargeError for more than any round has, before there are so many strings."""
    if len(request.survivors) > _MAX_SURVIVORS:
        raise FrameTooLargeError(f"survivors has {len(request.survivors)} names; it may have {_MAX_SURVIVORS}")
    return list(request.survivors)
