from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Member(_message.Message):
    __slots__ = ("client_id", "identity_key")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_KEY_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    identity_key: bytes
    def __init__(self, client_id: _Optional[str] = ..., identity_key: _Optional[bytes] = ...) -> None: ...

class Terms(_message.Message):
    __slots__ = ("protocol", "run", "round", "nonce", "members", "threshold", "degree", "size", "ring_bits", "model_fingerprint", "settings_sha256")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    DEGREE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    RING_BITS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_SHA256_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    run: str
    round: int
    nonce: bytes
    members: _containers.RepeatedCompositeFieldContainer[Member]
    threshold: int
    degree: int
    size: int
    ring_bits: int
    model_fingerprint: str
    settings_sha256: str
    def __init__(self, protocol: _Optional[int] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., nonce: _Optional[bytes] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., threshold: _Optional[int] = ..., degree: _Optional[int] = ..., size: _Optional[int] = ..., ring_bits: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., settings_sha256: _Optional[str] = ...) -> None: ...

class Advert(_message.Message):
    __slots__ = ("member", "sealing_key", "masking_key", "seed_sha256", "signature")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    SEALING_KEY_FIELD_NUMBER: _ClassVar[int]
    MASKING_KEY_FIELD_NUMBER: _ClassVar[int]
    SEED_SHA256_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    member: int
    sealing_key: bytes
    masking_key: bytes
    seed_sha256: bytes
    signature: bytes
    def __init__(self, member: _Optional[int] = ..., sealing_key: _Optional[bytes] = ..., masking_key: _Optional[bytes] = ..., seed_sha256: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Adverts(_message.Message):
    __slots__ = ("adverts",)
    ADVERTS_FIELD_NUMBER: _ClassVar[int]
    adverts: _containers.RepeatedCompositeFieldContainer[Advert]
    def __init__(self, adverts: _Optional[_Iterable[_Union[Advert, _Mapping]]] = ...) -> None: ...

class SealedShare(_message.Message):
    __slots__ = ("member", "sealed")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    member: int
    sealed: bytes
    def __init__(self, member: _Optional[int] = ..., sealed: _Optional[bytes] = ...) -> None: ...

class SealedShares(_message.Message):
    __slots__ = ("shares",)
    SHARES_FIELD_NUMBER: _ClassVar[int]
    shares: _containers.RepeatedCompositeFieldContainer[SealedShare]
    def __init__(self, shares: _Optional[_Iterable[_Union[SealedShare, _Mapping]]] = ...) -> None: ...

class Survivors(_message.Message):
    __slots__ = ("members",)
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, members: _Optional[_Iterable[int]] = ...) -> None: ...

class Confirmation(_message.Message):
    __slots__ = ("member", "signature")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    member: int
    signature: bytes
    def __init__(self, member: _Optional[int] = ..., signature: _Optional[bytes] = ...) -> None: ...

class UnmaskRequest(_message.Message):
    __slots__ = ("survivors", "dropped", "confirmations")
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    CONFIRMATIONS_FIELD_NUMBER: _ClassVar[int]
    survivors: _containers.RepeatedScalarFieldContainer[int]
    dropped: _containers.RepeatedScalarFieldContainer[int]
    confirmations: _containers.RepeatedCompositeFieldContainer[Confirmation]
    def __init__(self, survivors: _Optional[_Iterable[int]] = ..., dropped: _Optional[_Iterable[int]] = ..., confirmations: _Optional[_Iterable[_Union[Confirmation, _Mapping]]] = ...) -> None: ...

class Share(_message.Message):
    __slots__ = ("member", "value")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    member: int
    value: bytes
    def __init__(self, member: _Optional[int] = ..., value: _Optional[bytes] = ...) -> None: ...

class UnmaskAnswer(_message.Message):
    __slots__ = ("seeds", "masking_keys")
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    MASKING_KEYS_FIELD_NUMBER: _ClassVar[int]
    seeds: _containers.RepeatedCompositeFieldContainer[Share]
    masking_keys: _containers.RepeatedCompositeFieldContainer[Share]
    def __init__(self, seeds: _Optional[_Iterable[_Union[Share, _Mapping]]] = ..., masking_keys: _Optional[_Iterable[_Union[Share, _Mapping]]] = ...) -> None: ...

class ClientState(_message.Message):
    __slots__ = ("terms", "member", "stage", "sealing_secret", "masking_secret", "seed", "adverts", "inbox", "adapter_sha256", "upload_sha256", "survivors", "fewest", "attempted")
    TERMS_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    SEALING_SECRET_FIELD_NUMBER: _ClassVar[int]
    MASKING_SECRET_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ADVERTS_FIELD_NUMBER: _ClassVar[int]
    INBOX_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_SHA256_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    FEWEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTED_FIELD_NUMBER: _ClassVar[int]
    terms: bytes
    member: int
    stage: int
    sealing_secret: bytes
    masking_secret: bytes
    seed: bytes
    adverts: _containers.RepeatedCompositeFieldContainer[Advert]
    inbox: _containers.RepeatedCompositeFieldContainer[SealedShare]
    adapter_sha256: str
    upload_sha256: bytes
    survivors: _containers.RepeatedScalarFieldContainer[int]
    fewest: int
    attempted: bool
    def __init__(self, terms: _Optional[bytes] = ..., member: _Optional[int] = ..., stage: _Optional[int] = ..., sealing_secret: _Optional[bytes] = ..., masking_secret: _Optional[bytes] = ..., seed: _Optional[bytes] = ..., adverts: _Optional[_Iterable[_Union[Advert, _Mapping]]] = ..., inbox: _Optional[_Iterable[_Union[SealedShare, _Mapping]]] = ..., adapter_sha256: _Optional[str] = ..., upload_sha256: _Optional[bytes] = ..., survivors: _Optional[_Iterable[int]] = ..., fewest: _Optional[int] = ..., attempted: _Optional[bool] = ...) -> None: ...
