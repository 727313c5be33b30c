"""Traces by OpenTelemetry, one from a round over its clients' training to their sessions at the trunk.

They are made where OTEL_EXPORTER_OTLP_ENDPOINT is set and the extra `otel` is installed; elsewhere nothing of it is
imported. A span tells when something began and ended and which round it was of: no text, no tensor, no count.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

logger = logging.getLogger("trunkline.traces")

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
HEADER = "traceparent"
"""The W3C's name, in gRPC metadata and in a round's order: 55 characters, of which none is ours to choose."""
FLUSH_S = 5.0

_current: ContextVar[str] = ContextVar("trunkline_traceparent", default="")


def tracer(service: str) -> Tracer | None:
    """What makes this process's spans; None where nobody asked, or, with a warning, where they cannot be made."""
    if not any(os.environ.get(name) for name in VARIABLES):
        return None
    try:
        return Tracer(service)
    except ImportError as error:
        logger.warning("no traces: %s; pip install 'trunkline[otel]' brings it", error)
    except Exception as error:  # noqa: BLE001 (told; the work is worth more than its traces)
        logger.warning("no traces: %s: %s", type(error).__name__, error)
    return None


def current() -> str:
    """The traceparent of the span that this thread or task is in; empty where it is in none."""
    return _current.get()


class Span:
    """Something that takes a while; `traceparent` is what names it to another process."""

    def __init__(self, span: Any, traceparent: str) -> None:
        self._span = span
        self.traceparent = traceparent

    def note(self, **attributes: str | int) -> None:
        """Attributes, each named `trunkline.NAME`."""
        self._span.set_attributes({f"trunkline.{name}": value for name, value in attributes.items()})

    def end(self, error: str = "") -> None:
        """End it; `error` is the kind of what went wrong."""
        if error:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What the block starts elsewhere is part of this span; it ends with the block."""
        token, error = _current.set(self.traceparent), ""
        try:
            yield
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            _current.reset(token)
            self.end(error)


class Tracer:
    """Sends spans by OTLP over HTTP, from a thread of its own: who waits for nothing is never held up."""

    def __init__(self, service: str) -> None:
        """Raises ImportError without the extra. The exporter reads OpenTelemetry's own variables."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or service}
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("trunkline")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, parent: str = "", **attributes: str | int) -> Span:
        """A span under the one that `parent` (a traceparent) names; with none, or what is none, a new trace's first."""
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        under = self._propagator.extract({HEADER: parent}, context=Context())
        span = self._tracer.start_span(name, context=under)
        told: dict[str, str] = {}
        self._propagator.inject(told, context=set_span_in_context(span, Context()))
        begun = Span(span, told.get(HEADER, ""))
        begun.note(**attributes)
        return begun

    def close(self) -> None:
        """Send what has ended, for FLUSH_S at most, and make no more; what is not sent by then is lost."""
        sending = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
        sending.start()
        sending.join(FLUSH_S)
