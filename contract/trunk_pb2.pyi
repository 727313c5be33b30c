from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TrunkDescription(_message.Message):
    __slots__ = ("protocol", "model", "layers", "hidden_size", "max_message_bytes", "max_tokens", "open_sessions", "max_sessions", "codecs", "weights", "version", "clock_unix_s", "challenge", "ticket_signer")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OPEN_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLOCK_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    TICKET_SIGNER_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    model: ModelAgreement
    layers: int
    hidden_size: int
    max_message_bytes: int
    max_tokens: int
    open_sessions: int
    max_sessions: int
    codecs: _containers.RepeatedScalarFieldContainer[str]
    weights: str
    version: str
    clock_unix_s: float
    challenge: bytes
    ticket_signer: str
    def __init__(self, protocol: _Optional[int] = ..., model: _Optional[_Union[ModelAgreement, _Mapping]] = ..., layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_tokens: _Optional[int] = ..., open_sessions: _Optional[int] = ..., max_sessions: _Optional[int] = ..., codecs: _Optional[_Iterable[str]] = ..., weights: _Optional[str] = ..., version: _Optional[str] = ..., clock_unix_s: _Optional[float] = ..., challenge: _Optional[bytes] = ..., ticket_signer: _Optional[str] = ...) -> None: ...

class ModelAgreement(_message.Message):
    __slots__ = ("fingerprint", "head_layers", "tail_layers", "dtype", "attn_implementation", "torch_version", "transformers_version", "peft_version")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HEAD_LAYERS_FIELD_NUMBER: _ClassVar[int]
    TAIL_LAYERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ATTN_IMPLEMENTATION_FIELD_NUMBER: _ClassVar[int]
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSFORMERS_VERSION_FIELD_NUMBER: _ClassVar[int]
    PEFT_VERSION_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    head_layers: int
    tail_layers: int
    dtype: str
    attn_implementation: str
    torch_version: str
    transformers_version: str
    peft_version: str
    def __init__(self, fingerprint: _Optional[str] = ..., head_layers: _Optional[int] = ..., tail_layers: _Optional[int] = ..., dtype: _Optional[str] = ..., attn_implementation: _Optional[str] = ..., torch_version: _Optional[str] = ..., transformers_version: _Optional[str] = ..., peft_version: _Optional[str] = ...) -> None: ...

class Lora(_message.Message):
    __slots__ = ("rank", "alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern", "dropout", "use_rslora", "use_dora")
    class RankPatternEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class AlphaPatternEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    TARGET_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    RANK_PATTERN_FIELD_NUMBER: _ClassVar[int]
    ALPHA_PATTERN_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    USE_RSLORA_FIELD_NUMBER: _ClassVar[int]
    USE_DORA_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    target_parameters: _containers.RepeatedScalarFieldContainer[str]
    rank_pattern: _containers.ScalarMap[str, int]
    alpha_pattern: _containers.ScalarMap[str, float]
    dropout: float
    use_rslora: bool
    use_dora: bool
    def __init__(self, rank: _Optional[int] = ..., alpha: _Optional[float] = ..., target_modules: _Optional[_Iterable[str]] = ..., target_parameters: _Optional[_Iterable[str]] = ..., rank_pattern: _Optional[_Mapping[str, int]] = ..., alpha_pattern: _Optional[_Mapping[str, float]] = ..., dropout: _Optional[float] = ..., use_rslora: _Optional[bool] = ..., use_dora: _Optional[bool] = ...) -> None: ...

class RoundId(_message.Message):
    __slots__ = ("run", "round", "attempt")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    attempt: int
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class ClientFrame(_message.Message):
    __slots__ = ("hello", "forward", "backward", "step", "read_adapter", "close", "chunk")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    READ_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    forward: Forward
    backward: Backward
    step: Step
    read_adapter: ReadAdapter
    close: Close
    chunk: TensorChunk
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., forward: _Optional[_Union[Forward, _Mapping]] = ..., backward: _Optional[_Union[Backward, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., read_adapter: _Optional[_Union[ReadAdapter, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., chunk: _Optional[_Union[TensorChunk, _Mapping]] = ...) -> None: ...

class ServerFrame(_message.Message):
    __slots__ = ("welcome", "forward", "backward", "step", "adapter", "close", "chunk")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    forward: ForwardReply
    backward: BackwardReply
    step: StepReply
    adapter: AdapterReply
    close: CloseReply
    chunk: TensorChunk
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., forward: _Optional[_Union[ForwardReply, _Mapping]] = ..., backward: _Optional[_Union[BackwardReply, _Mapping]] = ..., step: _Optional[_Union[StepReply, _Mapping]] = ..., adapter: _Optional[_Union[AdapterReply, _Mapping]] = ..., close: _Optional[_Union[CloseReply, _Mapping]] = ..., chunk: _Optional[_Union[TensorChunk, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "client_id", "model", "lora", "seed", "adapter_sha256", "round", "trainable", "quiet", "codecs", "trunk_autocast", "deterministic", "ticket", "challenge", "proof")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_SHA256_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    QUIET_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    TRUNK_AUTOCAST_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    client_id: str
    model: ModelAgreement
    lora: Lora
    seed: int
    adapter_sha256: str
    round: RoundId
    trainable: str
    quiet: bool
    codecs: _containers.RepeatedScalarFieldContainer[str]
    trunk_autocast: str
    deterministic: bool
    ticket: bytes
    challenge: bytes
    proof: bytes
    def __init__(self, protocol: _Optional[int] = ..., client_id: _Optional[str] = ..., model: _Optional[_Union[ModelAgreement, _Mapping]] = ..., lora: _Optional[_Union[Lora, _Mapping]] = ..., seed: _Optional[int] = ..., adapter_sha256: _Optional[str] = ..., round: _Optional[_Union[RoundId, _Mapping]] = ..., trainable: _Optional[str] = ..., quiet: _Optional[bool] = ..., codecs: _Optional[_Iterable[str]] = ..., trunk_autocast: _Optional[str] = ..., deterministic: _Optional[bool] = ..., ticket: _Optional[bytes] = ..., challenge: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("session_id", "adapter_sha256", "max_pending", "pending_ttl_s", "chunk_bytes", "max_tokens", "codecs", "credits", "autocast_dtype", "sample_cache_bytes", "renewal")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_SHA256_FIELD_NUMBER: _ClassVar[int]
    MAX_PENDING_FIELD_NUMBER: _ClassVar[int]
    PENDING_TTL_S_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    AUTOCAST_DTYPE_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RENEWAL_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    adapter_sha256: str
    max_pending: int
    pending_ttl_s: float
    chunk_bytes: int
    max_tokens: int
    codecs: _containers.RepeatedScalarFieldContainer[str]
    credits: int
    autocast_dtype: str
    sample_cache_bytes: int
    renewal: bytes
    def __init__(self, session_id: _Optional[str] = ..., adapter_sha256: _Optional[str] = ..., max_pending: _Optional[int] = ..., pending_ttl_s: _Optional[float] = ..., chunk_bytes: _Optional[int] = ..., max_tokens: _Optional[int] = ..., codecs: _Optional[_Iterable[str]] = ..., credits: _Optional[int] = ..., autocast_dtype: _Optional[str] = ..., sample_cache_bytes: _Optional[int] = ..., renewal: _Optional[bytes] = ...) -> None: ...

class TensorHeader(_message.Message):
    __slots__ = ("dtype", "shape", "size_bytes", "codec", "outlier_channels")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    OUTLIER_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    size_bytes: int
    codec: str
    outlier_channels: int
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., size_bytes: _Optional[int] = ..., codec: _Optional[str] = ..., outlier_channels: _Optional[int] = ...) -> None: ...

class TensorChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Forward(_message.Message):
    __slots__ = ("microbatch", "hidden", "has_attention_mask", "attention_mask_bits", "position_ids", "autocast_dtype", "training", "need_grad", "dropped", "reply_codec", "samples", "differences", "forgotten")
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    HAS_ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_BITS_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_FIELD_NUMBER: _ClassVar[int]
    AUTOCAST_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    NEED_GRAD_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    REPLY_CODEC_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    microbatch: int
    hidden: TensorHeader
    has_attention_mask: bool
    attention_mask_bits: bytes
    position_ids: _containers.RepeatedScalarFieldContainer[int]
    autocast_dtype: str
    training: bool
    need_grad: bool
    dropped: _containers.RepeatedScalarFieldContainer[int]
    reply_codec: str
    samples: _containers.RepeatedScalarFieldContainer[int]
    differences: _containers.RepeatedScalarFieldContainer[bool]
    forgotten: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, microbatch: _Optional[int] = ..., hidden: _Optional[_Union[TensorHeader, _Mapping]] = ..., has_attention_mask: _Optional[bool] = ..., attention_mask_bits: _Optional[bytes] = ..., position_ids: _Optional[_Iterable[int]] = ..., autocast_dtype: _Optional[str] = ..., training: _Optional[bool] = ..., need_grad: _Optional[bool] = ..., dropped: _Optional[_Iterable[int]] = ..., reply_codec: _Optional[str] = ..., samples: _Optional[_Iterable[int]] = ..., differences: _Optional[_Iterable[bool]] = ..., forgotten: _Optional[_Iterable[int]] = ...) -> None: ...

class ForwardReply(_message.Message):
    __slots__ = ("microbatch", "hidden", "credits", "held_s")
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    HELD_S_FIELD_NUMBER: _ClassVar[int]
    microbatch: int
    hidden: TensorHeader
    credits: int
    held_s: float
    def __init__(self, microbatch: _Optional[int] = ..., hidden: _Optional[_Union[TensorHeader, _Mapping]] = ..., credits: _Optional[int] = ..., held_s: _Optional[float] = ...) -> None: ...

class Backward(_message.Message):
    __slots__ = ("microbatch", "grad", "want_input_grad", "reset_gradient", "reply_codec")
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    GRAD_FIELD_NUMBER: _ClassVar[int]
    WANT_INPUT_GRAD_FIELD_NUMBER: _ClassVar[int]
    RESET_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    REPLY_CODEC_FIELD_NUMBER: _ClassVar[int]
    microbatch: int
    grad: TensorHeader
    want_input_grad: bool
    reset_gradient: bool
    reply_codec: str
    def __init__(self, microbatch: _Optional[int] = ..., grad: _Optional[_Union[TensorHeader, _Mapping]] = ..., want_input_grad: _Optional[bool] = ..., reset_gradient: _Optional[bool] = ..., reply_codec: _Optional[str] = ...) -> None: ...

class BackwardReply(_message.Message):
    __slots__ = ("microbatch", "grad", "adapter_grad_norm", "credits", "held_s")
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    GRAD_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    HELD_S_FIELD_NUMBER: _ClassVar[int]
    microbatch: int
    grad: TensorHeader
    adapter_grad_norm: float
    credits: int
    held_s: float
    def __init__(self, microbatch: _Optional[int] = ..., grad: _Optional[_Union[TensorHeader, _Mapping]] = ..., adapter_grad_norm: _Optional[float] = ..., credits: _Optional[int] = ..., held_s: _Optional[float] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("lr", "beta1", "beta2", "eps", "weight_decay", "grad_scale")
    LR_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    GRAD_SCALE_FIELD_NUMBER: _ClassVar[int]
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_scale: float
    def __init__(self, lr: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ..., grad_scale: _Optional[float] = ...) -> None: ...

class StepReply(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    def __init__(self, steps: _Optional[int] = ...) -> None: ...

class ReadAdapter(_message.Message):
    __slots__ = ("gradients",)
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    gradients: bool
    def __init__(self, gradients: _Optional[bool] = ...) -> None: ...

class AdapterReply(_message.Message):
    __slots__ = ("size_bytes",)
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    size_bytes: int
    def __init__(self, size_bytes: _Optional[int] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("trained_tokens", "contribute")
    TRAINED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTE_FIELD_NUMBER: _ClassVar[int]
    trained_tokens: int
    contribute: bool
    def __init__(self, trained_tokens: _Optional[int] = ..., contribute: _Optional[bool] = ...) -> None: ...

class CloseReply(_message.Message):
    __slots__ = ("adapter_sha256", "trained_tokens", "received_bytes", "sent_bytes")
    ADAPTER_SHA256_FIELD_NUMBER: _ClassVar[int]
    TRAINED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    adapter_sha256: str
    trained_tokens: int
    received_bytes: int
    sent_bytes: int
    def __init__(self, adapter_sha256: _Optional[str] = ..., trained_tokens: _Optional[int] = ..., received_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ...) -> None: ...

class AdapterChunk(_message.Message):
    __slots__ = ("sha256", "size_bytes", "data")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    size_bytes: int
    data: bytes
    def __init__(self, sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class AdapterReceipt(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class CommitRoundRequest(_message.Message):
    __slots__ = ("round", "base_sha256", "survivors", "partial")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_SHA256_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    round: RoundId
    base_sha256: str
    survivors: _containers.RepeatedScalarFieldContainer[str]
    partial: bool
    def __init__(self, round: _Optional[_Union[RoundId, _Mapping]] = ..., base_sha256: _Optional[str] = ..., survivors: _Optional[_Iterable[str]] = ..., partial: _Optional[bool] = ...) -> None: ...

class CommitRoundReply(_message.Message):
    __slots__ = ("adapter_sha256", "trained_tokens", "clients")
    ADAPTER_SHA256_FIELD_NUMBER: _ClassVar[int]
    TRAINED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    adapter_sha256: str
    trained_tokens: int
    clients: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, adapter_sha256: _Optional[str] = ..., trained_tokens: _Optional[int] = ..., clients: _Optional[_Iterable[str]] = ...) -> None: ...

class ProgressReply(_message.Message):
    __slots__ = ("sessions", "steps", "tokens", "received_bytes", "sent_bytes")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    sessions: int
    steps: int
    tokens: int
    received_bytes: int
    sent_bytes: int
    def __init__(self, sessions: _Optional[int] = ..., steps: _Optional[int] = ..., tokens: _Optional[int] = ..., received_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ...) -> None: ...

class EndBeforeReply(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: int
    def __init__(self, sessions: _Optional[int] = ...) -> None: ...

class SessionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionsReply(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[OpenSession]
    def __init__(self, sessions: _Optional[_Iterable[_Union[OpenSession, _Mapping]]] = ...) -> None: ...

class OpenSession(_message.Message):
    __slots__ = ("session_id", "client_id", "round", "open_s", "idle_s", "steps", "tokens", "received_bytes", "sent_bytes", "pending", "quiet")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    OPEN_S_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    QUIET_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    client_id: str
    round: RoundId
    open_s: float
    idle_s: float
    steps: int
    tokens: int
    received_bytes: int
    sent_bytes: int
    pending: int
    quiet: bool
    def __init__(self, session_id: _Optional[str] = ..., client_id: _Optional[str] = ..., round: _Optional[_Union[RoundId, _Mapping]] = ..., open_s: _Optional[float] = ..., idle_s: _Optional[float] = ..., steps: _Optional[int] = ..., tokens: _Optional[int] = ..., received_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., pending: _Optional[int] = ..., quiet: _Optional[bool] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace_s", "operator")
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    grace_s: float
    operator: str
    def __init__(self, grace_s: _Optional[float] = ..., operator: _Optional[str] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("open_sessions",)
    OPEN_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    open_sessions: int
    def __init__(self, open_sessions: _Optional[int] = ...) -> None: ...
