"""Every error that Trunkline raises on purpose, on one screen.

TrunklineError
├── ConfigError            a setting is unknown, of the wrong type, or impossible with another
├── DataError              a site's own text cannot be read or holds nothing to train on
├── ModelError             a checkpoint cannot be read, split or joined
│   └── UnsupportedModelError   an architecture that cannot be split, with the reason
├── AgreementError         two processes disagree on what they must share; both sides are named
├── FrameError             a tensor or frame is malformed
│   ├── FrameTooLargeError      over the size that was agreed
│   └── NonFiniteError          a NaN or an infinity where a number is needed
├── SessionError           a frame for a session or graph that is not there
│   └── ExpiredGraphError       its pending graph was freed before the backward came
├── CapacityError          the peer is full; try again later
├── UpdateError            a client's update is non-finite or absurdly large
├── SecureSumError         a party of a secure sum was told, or sent, what its rules forbid
├── PrivacyError           a release that may not be made
│   ├── BudgetError             it would spend more than its budget
│   ├── UnpricedError           the accountant has no price for it
│   └── LedgerError             the ledger's chain does not hold, or it knows of no such charge
├── RoundError             a round or a run cannot go on
│   └── QuorumError             too few clients answered
├── ConnectionFailedError  nothing answers at an address
├── AccessError            the certificate that a caller shows does not allow what it asks
│   └── TicketError             nor does the ticket that it presents
├── ListenError            an address cannot be taken to listen on
├── DeadlineError          a wait ran past its limit
└── StorageError           SQL or an artifact cannot be read or written
    ├── SchemaError             the database's schema is not this code's
    ├── LeaseError              the run is not this process's to drive, or to drive any more
    └── IntegrityError          a stored file is not what was written: its hash or its signature says so
"""

from __future__ import annotations

from typing import ClassVar


class TrunklineError(Exception):
    """Root of the tree. `str(error)` is one line that may be shown to any peer."""

    exit_code: ClassVar[int] = 1
    grpc_status: ClassVar[str] = "INTERNAL"


class ConfigError(TrunklineError):
    exit_code = 2
    grpc_status = "INVALID_ARGUMENT"


class DataError(TrunklineError):
    grpc_status = "INVALID_ARGUMENT"


class ModelError(TrunklineError):
    grpc_status = "FAILED_PRECONDITION"


class UnsupportedModelError(ModelError):
    grpc_status = "UNIMPLEMENTED"


class AgreementError(TrunklineError):
    grpc_status = "FAILED_PRECONDITION"


class FrameError(TrunklineError):
    grpc_status = "INVALID_ARGUMENT"


class FrameTooLargeError(FrameError):
    grpc_status = "RESOURCE_EXHAUSTED"


class NonFiniteError(FrameError):
    pass


class SessionError(TrunklineError):
    grpc_status = "NOT_FOUND"


class ExpiredGraphError(SessionError):
    pass


class CapacityError(TrunklineError):
    grpc_status = "RESOURCE_EXHAUSTED"


class UpdateError(TrunklineError):
    grpc_status = "INVALID_ARGUMENT"


class SecureSumError(TrunklineError):
    grpc_status = "FAILED_PRECONDITION"


class PrivacyError(TrunklineError):
    grpc_status = "FAILED_PRECONDITION"


class BudgetError(PrivacyError):
    pass


class UnpricedError(PrivacyError):
    pass


class LedgerError(PrivacyError):
    grpc_status = "DATA_LOSS"


class HeadsFullError(LedgerError):
    """A ledger keeps no head of yet another signer or unit: what there may be of them is bounded."""


class RoundError(TrunklineError):
    grpc_status = "ABORTED"


class QuorumError(RoundError):
    pass


class ConnectionFailedError(TrunklineError):
    exit_code = 3
    grpc_status = "UNAVAILABLE"


class AccessError(TrunklineError):
    exit_code = 3
    grpc_status = "PERMISSION_DENIED"


class TicketError(AccessError):
    pass


class ListenError(TrunklineError):
    grpc_status = "UNAVAILABLE"


class DeadlineError(TrunklineError):
    exit_code = 4
    grpc_status = "DEADLINE_EXCEEDED"


class StorageError(TrunklineError):
    grpc_status = "INTERNAL"


class SchemaError(StorageError):
    grpc_status = "FAILED_PRECONDITION"


class LeaseError(StorageError):
    grpc_status = "FAILED_PRECONDITION"


class IntegrityError(StorageError):
    grpc_status = "DATA_LOSS"


def error_named(name: str) -> type[TrunklineError] | None:
    """The class called `name`, so that a peer's error keeps its type across the wire."""
    classes: list[type[TrunklineError]] = [TrunklineError]
    for cls in classes:
        if cls.__name__ == name:
            return cls
        classes.extend(cls.__subclasses__())
    return None
