"""An audit report: a ledger with its budgets and recomputed epsilons, in a file that the ledger's key vouches for.

The file is one line of JSON, written in one way only (sorted names, no spaces):

    {"body":{"accountant":...,"format":"trunkline privacy report 1","ledger":{...},"made_at":...,"settings":{RUN:{...}},
             "signer":"ed25519:...","spending":[...]},"signature":...}

`ledger` is as storage.ledger_report says, `settings` are the runs' but for paths and addresses, `spending` is the rows
of `budget show`. The signature, in hexadecimal, is over `body` as it is written. Whoever reads the file recomputes all
of it; no database is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from contract.config import RunConfig
from contract.durable_file import replace_file
from contract.errors import ConfigError, IntegrityError, StorageError, TrunklineError
from contract.identity import parse_public_key
from contract.output import plain_data
from contract.public_file import read_public_file
from orchestrator.ledger_key import LedgerKey
from orchestrator.ledger_replay import Replay
from orchestrator.spending_view import Settings, spending_rows
from privacy.accountant import ACCOUNTANT
from storage.ledger import Ledger
from storage.ledger_report import peer_heads_in, verify_report
from storage.ledger_rows import COLUMNS
from storage.records import LedgerRow, SignedHead

FORMAT = "trunkline privacy report 1"
MAX_REPORT_BYTES = 2_000_000_000
_SIGNED_AS = b"trunkline privacy report\x00"  # so that no signature over anything else is one over a report
_FIELDS = {"accountant", "format", "ledger", "made_at", "settings", "signer", "spending"}
_OWN_PLACES = ("model", "data", "trunk-address")
_LAST_DIGITS = 1e-9
"""Another machine's mathematical library may round an epsilon's last digits otherwise."""


def report_body(ledger: Ledger, settings: Settings, client: str | None, key: LedgerKey, now: datetime) -> Any:
    """What a report says, as JSON's own types; of one client or of all."""
    held = ledger.report(client)
    replay = _replayed(held)
    told = {run: config for run, config in settings.items() if any(one.run == run for one in replay.spending())}
    return {
        "accountant": ACCOUNTANT,
        "format": FORMAT,
        "ledger": held,
        "made_at": now.isoformat(timespec="seconds"),
        "settings": {run: _shareable(config) for run, config in told.items()},
        "signer": key.public_key_text,
        "spending": plain_data(list(spending_rows(replay.spending(), replay.budgets, told))),
    }


def write_report(path: Path, body: Any, key: LedgerKey) -> None:
    """Sign `body` and write it to `path`, whole. Raises StorageError where it cannot be written."""
    text = _canonical(body)
    data = _canonical({"body": body, "signature": key.sign(_SIGNED_AS + text).hex()}) + b"\n"
    try:
        replace_file(path, data)
    except OSError as error:
        raise StorageError(f"cannot write the report {path}: {error.strerror}") from error


def read_report(path: Path, signers: Collection[str]) -> dict[str, Any]:
    """The body of the report in the file `path`, signed by one of `signers`; where none are named, by its own signer.

    Raises ConfigError where the file cannot be read, IntegrityError where it is no such report.
    """
    data = read_public_file(path, MAX_REPORT_BYTES, "the report")
    body, signature = _parts(path, data)
    signer = body["signer"]
    if signers and signer not in signers:
        raise IntegrityError(f"the report {path} is signed by {str(signer)[:80]}, who is none of those that were named")
    try:
        key = Ed25519PublicKey.from_public_bytes(parse_public_key(str(signer), "the report's signer"))
        key.verify(signature, _SIGNED_AS + _canonical(body))
    except (InvalidSignature, ConfigError) as error:
        raise IntegrityError(f"the report {path} was changed, or {str(signer)[:80]} did not sign it") from error
    return body


def peer_heads_of(path: Path) -> list[SignedHead]:
    """The heads that the ledger of the report in `path` was sent by its peers. Raises as read_report."""
    try:
        return peer_heads_in(read_report(path, ())["ledger"])
    except (TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"the report {path} holds no ledger") from error


def _parts(path: Path, data: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        if len(data) > MAX_REPORT_BYTES:
            raise ValueError(f"it is over {MAX_REPORT_BYTES} bytes")
        whole = json.loads(data)
        body, signature = whole["body"], bytes.fromhex(whole["signature"])
        as_wanted = set(whole) == {"body", "signature"} and set(body) == _FIELDS and body["format"] == FORMAT
        if not (as_wanted and isinstance(body["ledger"], dict) and isinstance(body["settings"], dict)):
            raise ValueError("its fields are others")
        if _canonical(whole) + b"\n" != data:
            raise ValueError("it is not written as this program writes it")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{path} is no {FORMAT}: {error}") from error
    return body, signature


def report_findings(body: Mapping[str, Any], outside: Iterable[SignedHead], signers: Collection[str]) -> list[str]:
    """What is wrong with a report whose signature holds: its chains, its budgets, or its sums. One line each."""
    findings = verify_report(body["ledger"], outside, signers)
    if findings:
        return findings  # sums over rows that are not what they were would only repeat it
    try:
        replay = _replayed(body["ledger"])
        settings = {run: RunConfig.from_flower(told) for run, told in body["settings"].items()}
        found = plain_data(list(spending_rows(replay.spending(), replay.budgets, settings)))
    except (TrunklineError, TypeError, AttributeError) as error:
        return [f"the report's rows cannot be priced: {error}"]
    return replay.finish() + _differences(body["spending"], found)


def _replayed(held: Mapping[str, Any]) -> Replay:
    chains: dict[str, list[LedgerRow]] = {}
    for columns in held["rows"]:
        chains.setdefault(columns["unit_id"], []).append(LedgerRow(**{name: columns[name] for name in COLUMNS}))
    replay = Replay()
    for rows in chains.values():
        replay.take(rows)
    return replay


def _differences(told: Any, found: list[dict[str, Any]]) -> list[str]:
    if not isinstance(told, list) or len(told) != len(found):
        return ["the report does not tell the spending of just those units that its rows are of"]
    return [
        f"the report says {said}; its rows come to {counted}"
        for said, counted in zip(told, found, strict=True)
        if not _same(said, counted)
    ]


def _same(said: Any, counted: dict[str, Any]) -> bool:
    if not isinstance(said, dict) or said.keys() != counted.keys():
        return False
    for name, value in counted.items():
        if isinstance(value, float) and isinstance(said[name], float):
            if not math.isclose(value, said[name], rel_tol=_LAST_DIGITS, abs_tol=_LAST_DIGITS):
                return False
        elif said[name] != value:
            return False
    return True


def _shareable(config: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_flower().items() if name not in _OWN_PLACES}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
