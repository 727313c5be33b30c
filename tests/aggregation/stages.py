"""A cohort brought to a stage, and the refusal of one of its members."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from aggregation.secure_client import SecureClient
from contract import secagg_pb2 as pb
from contract.errors import SecureSumError
from tests.aggregation.secure_sums import Cohort, cohort_of, vectors_of

VICTIM = "client-0000"
COUNT = 5
ALL = tuple(range(COUNT))


def shared(count: int = COUNT, **changes: object) -> Cohort:
    """A cohort up to the point where every member has shared its secrets."""
    cohort = cohort_of(count, **changes)
    cohort.share(cohort.members, cohort.advertise(cohort.members))
    return cohort


def uploaded(who: Sequence[int] = ALL) -> Cohort:
    cohort = shared()
    names = sorted(cohort.members)
    cohort.upload([names[number] for number in who], vectors_of(cohort))
    return cohort


def confirmed() -> Cohort:
    """Member 4 dropped out after it shared; the others are confirmed survivors."""
    cohort = uploaded(ALL[:4])
    cohort.confirm(sorted(cohort.members)[:4])
    return cohort


def refuses(reason: str, act: Callable[[], object], client: SecureClient) -> None:
    """The call ends in that refusal, and leaves the member as it was."""
    before = client.to_bytes()
    with pytest.raises(SecureSumError, match=reason):
        act()
    assert client.to_bytes() == before


def asked(cohort: Cohort, **changes: object) -> bytes:
    """The honest request to unmask with some fields changed."""
    request = pb.UnmaskRequest.FromString(cohort.server.unmask_request())
    for name, value in changes.items():
        request.ClearField(name)  # type: ignore[arg-type]
        getattr(request, name).extend(value)
    return request.SerializeToString()


def victim_of(cohort: Cohort) -> SecureClient:
    return cohort.members[VICTIM]
