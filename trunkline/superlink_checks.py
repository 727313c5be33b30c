"""Whether a SuperLink elsewhere can be reached from here as its sites reach it: address, TLS, clock."""

from __future__ import annotations

import http.client
import ssl
import time
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path

from contract.addresses import split_address
from contract.ticket import LEEWAY_S
from trunkline.clocks import judge_skew
from trunkline.finding import DoubtfulError, NotReadyError, SkippedError
from trunkline.tls_checks import EARLY_DAYS

ANSWER_S = 10.0
_DATE_ERROR_S = 1.0  # HTTP tells whole seconds


@dataclass(frozen=True, slots=True)
class AskedSuperLink:
    """What a SuperLink said of itself, or the gate before it: `status` of /health, days that its certificate is good
    for (None without TLS), and how far its clock is ahead (None where it does not say), right to `clock_error_s`."""

    address: str
    status: int
    days_left: float | None
    clock_skew_s: float | None
    clock_error_s: float


def ask_superlink(address: str, root_certificates: Path | None) -> AskedSuperLink:
    """Asks by TLS where `root_certificates` is given, else in clear. Raises NotReadyError."""
    host, port = split_address("superlink", address)
    connection = _connection(host, port, root_certificates)
    try:
        connection.connect()  # first, so that it is no part of the round trip that the clocks are compared by
        shown = connection.sock.getpeercert() if isinstance(connection.sock, ssl.SSLSocket) else None
        asked_s = time.time()
        connection.request("GET", "/health")
        reply = connection.getresponse()
        answered_s = time.time()
    except ssl.SSLError as error:
        why = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason
        raise NotReadyError(
            f"{address}: TLS came to nothing: {why}",
            "name the CA that issued the SuperLink's certificate, or the gate's, by --root-certificates",
        ) from None
    except (OSError, http.client.HTTPException) as error:
        how = "in clear" if root_certificates is None else "by TLS"
        raise NotReadyError(
            f"{address} does not answer {how}: {error}",
            "start flower-superlink there, open the port, and give --root-certificates where it uses TLS, only there",
        ) from None
    finally:
        connection.close()
    told_s = _moment_s(reply.getheader("date", ""))
    skew_s = None if told_s is None else told_s + _DATE_ERROR_S / 2 - (asked_s + answered_s) / 2
    return AskedSuperLink(
        address, reply.status, _days_left(shown), skew_s, _DATE_ERROR_S / 2 + (answered_s - asked_s) / 2
    )


def check_superlink(address: str, root_certificates: Path | None) -> str:
    """A SuperLink or its gate answers there, by a certificate that is trusted and good for a while yet."""
    told = ask_superlink(address, root_certificates)
    if told.status not in (http.HTTPStatus.OK, http.HTTPStatus.FORBIDDEN):
        raise NotReadyError(
            f"{address} answers /health with {told.status}: it is no SuperLink", "name the SuperLink's HOST:PORT"
        )
    what = "a SuperLink" if told.status == http.HTTPStatus.OK else "a gate that hands on what sites ask"
    if told.days_left is None:
        raise DoubtfulError(f"{address} is {what}, without TLS", "give the SuperLink certificates: docs/deployment.md")
    detail = f"{address} is {what}, its certificate good for {told.days_left:.0f} days more"
    if told.days_left < EARLY_DAYS:
        raise DoubtfulError(detail, "have a new one issued before this one ends")
    return detail


def check_superlink_clock(address: str, root_certificates: Path | None) -> str:
    """Its clock agrees with this machine's, as far as HTTP tells it."""
    try:
        told = ask_superlink(address, root_certificates)
    except NotReadyError as error:
        raise SkippedError(f"not asked: {error}") from None
    if told.clock_skew_s is None:
        raise SkippedError(f"{address} does not tell its time")
    return judge_skew(f"the clock of {address}", told.clock_skew_s, told.clock_error_s, LEEWAY_S)


def _connection(host: str, port: int, root_certificates: Path | None) -> http.client.HTTPConnection:
    if root_certificates is None:
        return http.client.HTTPConnection(host, port, timeout=ANSWER_S)
    try:
        trust = ssl.create_default_context(cafile=root_certificates)
    except (OSError, ssl.SSLError) as error:
        raise NotReadyError(f"{root_certificates}: {error}", "name a PEM file of the CA's certificate") from None
    return http.client.HTTPSConnection(host, port, timeout=ANSWER_S, context=trust)


def _moment_s(date: str) -> float | None:
    """Seconds since 1970 of an HTTP date; None for what is none."""
    try:
        told = parsedate_to_datetime(date)
    except (ValueError, OverflowError):
        return None
    return (told if told.tzinfo is not None else told.replace(tzinfo=UTC)).timestamp()


def _days_left(shown: object) -> float | None:
    if not isinstance(shown, dict):
        return None
    return (ssl.cert_time_to_seconds(str(shown["notAfter"])) - time.time()) / 86_400
