"""Changes to identities, each within a transaction that the Store opened, and with an event that names who made it."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from contract.errors import ConfigError, StorageError
from contract.identity import check_client_id, parse_public_key, public_key_text
from storage import schema

SIGNATURE_BYTES = 64
_SHA256 = re.compile(r"[0-9a-f]{64}")
_Found = TypeVar("_Found")


def enroll(
    session: Session, client_id: str, public_key: str, operator: str, now: datetime, certificate: str | None
) -> int:
    """Add an identity, with the hash of its TLS key if it has one; answers the roster's new version."""
    check_client_id(client_id)
    public_key = public_key_text(parse_public_key(public_key))  # in its one spelling, so that no key is there twice
    counter = _locked_roster(session)
    identity = schema.Identity
    taken = session.get(identity, client_id)
    if taken is not None:
        again = "; a revoked id is never used again: choose another" if taken.revoked_at else ""
        raise StorageError(f"client {client_id} was enrolled on {_day(taken.enrolled_at)} already{again}")
    owner = session.scalar(select(identity).where(identity.public_key == public_key))
    if owner is not None:
        was = "was the key of revoked" if owner.revoked_at else "is the key of"
        raise StorageError(f"the public key {was} client {owner.client_id}; each client has a key of its own")
    _require_free_certificate(session, client_id, certificate)
    counter.version += 1
    session.add(
        identity(
            client_id=client_id,
            public_key=public_key,
            enrolled_at=now,
            enrolled_by=operator,
            certificate_key_sha256=certificate,
            roster_version=counter.version,
        )
    )
    detail = {"client_id": client_id, "public_key": public_key, "operator": operator}
    if certificate is not None:
        detail["certificate_key_sha256"] = certificate
    _record(session, "client-enrolled", f"{operator} enrolled client {client_id}", detail, counter.version, now)
    return counter.version


def set_certificate(session: Session, client_id: str, certificate: str, operator: str, now: datetime) -> None:
    """Take another TLS key for a client's own. The roster, in which certificates do not stand, stays as it is."""
    counter = _locked_roster(session)
    identity = live_identity(session, client_id)
    _require_free_certificate(session, client_id, certificate)
    before, identity.certificate_key_sha256 = identity.certificate_key_sha256, certificate
    detail = {"client_id": client_id, "operator": operator, "certificate_key_sha256": certificate, "before": before}
    message = f"{operator} gave client {client_id} the TLS key {certificate[:12]}"
    _record(session, "client-certificate", message, detail, counter.version, now)


def revoke(session: Session, client_id: str, operator: str, reason: str, now: datetime) -> int:
    """Mark an identity as revoked, for ever; answers the roster's new version."""
    counter = _locked_roster(session)
    identity = live_identity(session, client_id)
    counter.version += 1
    identity.revoked_at, identity.revoke_reason, identity.roster_version = now, reason, counter.version
    detail = {"client_id": client_id, "operator": operator, "reason": reason}
    message = f"{operator} revoked client {client_id}: {reason}"
    _record(session, "client-revoked", message, detail, counter.version, now)
    return counter.version


def bind(session: Session, run_id: str, node_id: str, client_id: str, signature: bytes, now: datetime) -> None:
    """Note that a node showed, by its signature, that it speaks for a client in a run."""
    if len(signature) != SIGNATURE_BYTES:
        raise StorageError(f"the signature of node {node_id} is of {len(signature)} bytes, not {SIGNATURE_BYTES}")
    _locked_roster(session)  # nobody is revoked, and no other run binds the node, meanwhile
    live_identity(session, client_id)
    bound = session.scalar(client_of_node(node_id))
    if bound is not None and bound != client_id:
        raise StorageError(f"node {node_id} speaks for client {bound} already, not for {client_id}")
    if session.get(schema.NodeBinding, (node_id, run_id, client_id)) is not None:
        return
    session.add(
        schema.NodeBinding(
            node_id=node_id, run_id=run_id, client_id=client_id, bound_at=now, signature=signature.hex()
        )
    )  # fmt: skip
    session.add(
        schema.Event(
            run_id=run_id,
            kind="node-bound",
            message=f"node {node_id} speaks for client {client_id}",
            detail={"node_id": node_id, "client_id": client_id},
            at=now,
        )
    )


def live_identity(session: Session, client_id: str) -> schema.Identity:
    """The identity; raises StorageError unless it is enrolled and not revoked."""
    found = session.get(schema.Identity, client_id)
    if found is None:
        raise StorageError(f"client {client_id} is not enrolled; `trunkline clients list` shows who is")
    if found.revoked_at is not None:
        raise StorageError(f"client {client_id} was revoked on {_day(found.revoked_at)}: {found.revoke_reason}")
    return found


def client_of_node(node_id: str) -> Select[str]:
    """The one client, not revoked, that a node speaks for."""
    binding, identity = schema.NodeBinding, schema.Identity
    query = select(binding.client_id).join(identity, identity.client_id == binding.client_id)
    return query.where(binding.node_id == node_id, identity.revoked_at.is_(None)).limit(1)


def present(counter: _Found | None) -> _Found:
    """What was found of the roster's one row; without it no version is safe to use."""
    if counter is None:
        raise StorageError("the database has lost the roster's version; restore it from a backup")
    return counter


def _require_free_certificate(session: Session, client_id: str, certificate: str | None) -> None:
    """Raise StorageError where the TLS key is, or was, another client's; ConfigError for what is no hash."""
    if certificate is None:
        return
    if not _SHA256.fullmatch(certificate):
        raise ConfigError(
            f"the hash of the certificate's key is {certificate[:80]!r}; it must be 64 hexadecimal digits"
        )
    identity = schema.Identity
    owner = session.scalar(select(identity.client_id).where(identity.certificate_key_sha256 == certificate))
    if owner is not None and owner != client_id:
        raise StorageError(f"the certificate's key is that of client {owner}; each client has a key of its own")


def _locked_roster(session: Session) -> schema.RosterCounter:
    """The roster's version, held until the transaction ends: changes of identities take turns, and none shares one."""
    return present(session.get(schema.RosterCounter, schema.THE_ROSTER, with_for_update=True))


def _record(session: Session, kind: str, message: str, detail: dict[str, Any], version: int, now: datetime) -> None:
    session.add(schema.Event(kind=kind, message=message, detail=detail | {"roster_version": version}, at=now))


def _day(moment: datetime) -> str:
    return moment.date().isoformat()
