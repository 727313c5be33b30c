"""A unit's chain of rows: how each row's hash is made, what a signed head promises, and what breaks a chain.

Everything is hashed or signed in one encoding. A value is its type (`s` text, `i` whole number), the length of its
bytes (8 bytes, big-endian), and its bytes: UTF-8, or decimal digits. A sequence is its values one after the other,
which no other sequence encodes to. Then, with SHA-256 in lower-case hexadecimal:

- unit_id = SHA-256 of ("trunkline privacy unit 1", client, dataset, level).
- hash of a row = SHA-256 of ("trunkline privacy row 1", each column of storage.records.LedgerRow but `hash`, in their
  order there). `seq` counts a unit's rows from 1; `previous` is the hash of the row before, and unit_id in the first.
- A head's signature is Ed25519 of ("trunkline privacy head 1", unit_id, seq, hash, run, round, attempt).

Nothing here is secret: whoever may write to the database can make a sound chain anew, from any row on. What they cannot
make is the signature of a head, nor take back a head that another party holds.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from operator import attrgetter
from sys import intern

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from contract.errors import ConfigError
from contract.identity import parse_public_key
from contract.privacy_records import Unit
from storage.ledger_rows import COLUMNS, content_fault
from storage.records import HeadSigner, LedgerRow, SignedHead

_HASHED = attrgetter(*(name for name in COLUMNS if name != "hash"))


def unit_id_of(unit: Unit) -> str:
    """The name of a unit's chain."""
    return _sha256("trunkline privacy unit 1", unit.client, unit.dataset, unit.level)


def row_hash(row: LedgerRow) -> str:
    """What a row's `hash` must be; its columns must be of their types."""
    return _sha256("trunkline privacy row 1", *_HASHED(row))


def chained(row: LedgerRow, unit_id: str, seq: int, previous: str) -> LedgerRow:
    """`row` as number `seq` of a chain whose row before hashes to `previous`."""
    placed = replace(row, unit_id=unit_id, seq=seq, previous=previous)
    return replace(placed, hash=row_hash(placed))


def signed_head(
    signer: HeadSigner, unit_id: str, seq: int, row_sha256: str, attempt: tuple[str, int, int]
) -> SignedHead:
    """A head over the row with this hash, signed after `attempt` (run, round, attempt) was settled."""
    unsigned = SignedHead(unit_id, seq, row_sha256, *attempt, signer=signer.public_key_text, signature="")
    return replace(unsigned, signature=signer.sign(_head_message(unsigned)).hex())


def head_fault(head: SignedHead) -> str | None:
    """Why a head's signature is none of its signer, or None."""
    try:
        _key_of(head.signer).verify(bytes.fromhex(head.signature), _head_message(head))
    except InvalidSignature:
        return f"its signature is not made by {head.signer}"
    except (ConfigError, ValueError) as error:
        return f"it is not signed: {error}"
    return None


@lru_cache(maxsize=64)
def _key_of(signer: str) -> Ed25519PublicKey:
    """Kept, because to prove that a key is one takes longer than a signature's check, and few keys sign all heads."""
    return Ed25519PublicKey.from_public_bytes(parse_public_key(signer, "the signer"))


def head_shown(head: SignedHead) -> str:
    """A head in words."""
    after = f"attempt {head.attempt} at round {head.round} of run {head.run}" if head.run else f"budget {head.round}"
    return f"the head signed after {after}, at row {head.seq},"


class ChainWalk:
    """Takes one unit's rows in the order of their seq, and says what is wrong with them and with the heads over them.

    Holds what one unit's rows sum up to, never the rows. `findings` are one line each.
    """

    def __init__(self, unit_id: str) -> None:
        self.unit_id = unit_id
        self.seq, self.hash = 0, unit_id
        self.unit: tuple[str, str, str] | None = None
        self.tally: Counter[tuple[str, str]] = Counter()
        self.budget = ""
        self.findings: list[str] = []
        self._budgets = 0
        self._charges: dict[tuple[str, int, int, str], tuple[str, str, str]] = {}
        self._heads: dict[int, list[SignedHead]] = {}

    def expect(self, heads: Iterable[SignedHead]) -> None:
        """Heads that the rows must agree with; before the first row."""
        for head in heads:
            self._heads.setdefault(head.seq, []).append(head)

    def take(self, row: LedgerRow) -> None:
        """The next row; its columns must be of their types."""
        if self.unit is None:
            self.unit = (row.client, row.dataset, row.level)
        self._check_place(row)
        if row_hash(row) != row.hash:
            self.found(f"row {row.seq} was changed: it does not hash to what it says")
        fault = content_fault(row)
        if fault is not None:
            self.found(f"row {row.seq}: {fault}")
        self._follow(row)
        for head in self._heads.pop(row.seq, ()):
            if head.hash != row.hash:
                self.found(f"{head_shown(head)} is of another row {row.seq} than this chain has")
        self.seq, self.hash = row.seq, row.hash

    def skip(self, seq: int, fault: str) -> None:
        """A row whose columns are not even of their types."""
        self.found(f"row {seq}: {fault}")
        self.seq, self.hash = seq, ""

    def end(self) -> None:
        """No more rows come: heads over later ones tell of a tail that is gone."""
        for head in (head for heads in self._heads.values() for head in heads):
            self.found(f"{head_shown(head)} is over a row that this chain has no more; it ends at row {self.seq}")

    def found(self, fault: str) -> None:
        """Note a finding about this unit."""
        if self.unit is None:
            self.findings.append(f"unit {self.unit_id[:16]}: {fault}")
        else:
            client, dataset, level = self.unit
            self.findings.append(f"unit {self.unit_id[:16]} (client {client}, dataset {dataset}, {level}): {fault}")

    def _check_place(self, row: LedgerRow) -> None:
        if row.seq != self.seq + 1:
            self.found(f"row {row.seq} comes after row {self.seq}: what was between is gone")
        elif row.previous != self.hash and self.hash:
            self.found(f"row {row.seq} does not follow row {self.seq}: one of them was changed")
        named = _sha256("trunkline privacy unit 1", row.client, row.dataset, row.level)
        if (row.unit_id, named) != (self.unit_id, self.unit_id):
            self.found(
                f"row {row.seq} is of client {row.client}, dataset {row.dataset}, {row.level}, no row of this unit"
            )

    def _follow(self, row: LedgerRow) -> None:
        """Keep count of what rows change, and tell of a change that is not allowed."""
        if row.kind == "budget":
            self._budgets += 1
            self.budget = row.parameters
            if row.round != self._budgets:
                self.found(f"row {row.seq} is change {row.round} of the budget; change {self._budgets} comes next")
            return
        key = (intern(row.run), row.round, row.attempt, intern(row.channel))
        state, release, accountant = self._charges.get(key, ("", row.release, row.accountant))
        legal = state == "" if row.state == "RESERVED" else state == "RESERVED"
        if not legal:
            self.found(f"row {row.seq} makes {row.state} what is {state or 'not reserved'}")
        elif (release, accountant) != (row.release, row.accountant):
            self.found(f"row {row.seq} settles another release than the one that was reserved")
        self._charges[key] = (intern(row.state), intern(row.release), intern(row.accountant))
        if row.state in ("RESERVED", "VOID"):
            self.tally[row.run, row.release] += 1 if row.state == "RESERVED" else -1


def _head_message(head: SignedHead) -> bytes:
    named = (head.unit_id, head.seq, head.hash, head.run, head.round, head.attempt)
    return _encoded("trunkline privacy head 1", *named)


def _sha256(*values: str | int) -> str:
    return hashlib.sha256(_encoded(*values)).hexdigest()


def _encoded(*values: str | int) -> bytes:
    parts: list[bytes] = []
    for value in values:
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else b"%d" % value
        parts += (b"s" if isinstance(value, str) else b"i", len(data).to_bytes(8, "big"), data)
    return b"".join(parts)
