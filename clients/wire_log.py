"""What left this site: every field and its size, so that a site can prove it.

Totals by kind are always kept. With a path, each message is also written as one JSON line:
`{"channel": "trunk", "message": "forward", "bytes": 61, "fields": {"microbatch": 2, "hidden.dtype": 9, ...}}`.
Sizes only: no value of any field is ever written here.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from contract.errors import ConfigError


def field_sizes(message: Message, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yields (dotted field name, bytes) for every field that `message` puts on the wire, tag and length included.

    A sub-message's own tag and length count towards its first field, so that the sizes add up to the message's.
    """
    for descriptor, value in message.ListFields():
        name = prefix + descriptor.name
        alone = type(message)()
        if descriptor.is_repeated:
            getattr(alone, descriptor.name).MergeFrom(value)
        elif descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(alone, descriptor.name).CopyFrom(value)
        else:
            setattr(alone, descriptor.name, value)
        size = alone.ByteSize()
        parts = [] if descriptor.is_repeated or not isinstance(value, Message) else list(field_sizes(value, f"{name}."))
        if not parts:
            yield name, size
            continue
        envelope = size - value.ByteSize()
        for index, (part, part_size) in enumerate(parts):
            yield part, part_size + (envelope if index == 0 else 0)


class WireLog:
    """Counts, and with a `path` also lists, what is sent. Safe to use from several threads."""

    def __init__(self, path: Path | str | None = None) -> None:
        """Raises ConfigError when `path` cannot be written."""
        self._lock = threading.Lock()
        self._sent: Counter[str] = Counter()
        self._received_bytes = 0
        self._file: TextIO | None = None
        if path is not None:
            try:
                self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 (open for the object's life)
            except OSError as error:
                raise ConfigError(f"wire-log {str(path)!r} cannot be written: {error.strerror}") from error

    @property
    def sent_bytes(self) -> int:
        with self._lock:
            return sum(self._sent.values())

    @property
    def received_bytes(self) -> int:
        with self._lock:
            return self._received_bytes

    def sent_message(self, kind: str, message: Message) -> None:
        """Notes one protobuf message that goes to the trunk."""
        fields = dict(field_sizes(message)) if self._file is not None else {}
        self.sent("trunk", kind, message.ByteSize(), fields)

    def sent(self, channel: str, kind: str, size_bytes: int, fields: Mapping[str, int]) -> None:
        """Notes one message of `size_bytes` in all, made of `fields` (name -> bytes)."""
        with self._lock:
            self._sent[f"{channel}.{kind}"] += size_bytes
            self._write({"channel": channel, "message": kind, "bytes": size_bytes, "fields": dict(fields)})

    def received(self, size_bytes: int) -> None:
        with self._lock:
            self._received_bytes += size_bytes

    def summary(self) -> str:
        """One line: bytes sent by kind, and bytes received."""
        with self._lock:
            kinds = " ".join(f"{kind}={size}" for kind, size in sorted(self._sent.items()))
            return f"sent_bytes={sum(self._sent.values())} received_bytes={self._received_bytes} {kinds}".rstrip()

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _write(self, entry: Mapping[str, object]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry, sort_keys=True) + "\n")
            self._file.flush()
