"""What the ledger's tests charge, and who admits it and signs for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contract.errors import BudgetError
from contract.identity import public_key_text
from contract.privacy_records import Budget, Channel, Level, PricedRelease, PrivacyEvent, Standing, Unit, View
from storage.records import Charge

BUDGET = Budget(epsilon=8.0, delta=1e-5, order=12.5, gaussian_share={"holder": 0.1, "trunk": 1.0})
RUN = "r1"


class Key:
    """A key that signs heads; one seed byte is one key."""

    def __init__(self, seed: int = 1) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)

    @property
    def public_key_text(self) -> str:
        return public_key_text(self._key.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)


def unit(client: str = "ward", dataset: str = "notes", level: Level = "client") -> Unit:
    return Unit(client, dataset, level)


def release(noise: float = 1.0, channel: Channel = "adapter_sum") -> PricedRelease:
    event = PrivacyEvent("gaussian", {"noise_multiplier": noise.hex(), "clip": (0.1).hex()})
    return PricedRelease(
        channel, event, {"holder": View(10, "1", "zero-out"), "orchestrator": View(10, (0.05).hex(), "zero-out")}
    )


def charge(
    of: Unit | None = None, number: int = 1, attempt: int = 1, paid: PricedRelease | None = None, run: str = RUN
) -> Charge:
    return Charge(of or unit(), run, number, attempt, paid or release(), "test 1")


def admit_all(standing: Standing, proposed: Sequence[PricedRelease]) -> None:
    """Every unit can afford everything."""


def cap(most: int, client_most: int = 10**9) -> Callable[[Standing, Sequence[PricedRelease]], None]:
    """Admits while a unit has at most `most` releases, and its client `client_most` over all of its units."""

    def admit(standing: Standing, proposed: Sequence[PricedRelease]) -> None:
        spent = sum(sum(counts.values()) for counts in standing.spent.values())
        for name, total, limit in (("unit", spent, most), ("client", sum(standing.client_spent.values()), client_most)):
            if total + len(proposed) > limit:
                raise BudgetError(f"the {name} has spent {total} of {limit}, {len(proposed)} more were proposed")

    return admit


def spent_of(standing: Standing) -> int:
    return sum(sum(counts.values()) for counts in standing.spent.values())
