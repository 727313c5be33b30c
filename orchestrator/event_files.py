"""A run's numbers as TensorBoard shows them: one event file in the run's own directory.

Whoever takes a run up writes the file anew from SQL, so that a resumed run has no number twice and none too few.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from orchestrator.audience import Listener
from orchestrator.scalars import Point, RunScalars
from storage.records import RoundCommit

_PREFIX = "events.out.tfevents."


class EventFile(Listener):
    """Written as each round is committed; what stands in it is on the disk's way before the next round begins."""

    what = "TensorBoard"

    def __init__(self, directory: Path, scalars: RunScalars) -> None:
        """Raises OSError where the directory cannot be written to."""
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob(f"{_PREFIX}*"):
            old.unlink()
        self._scalars = scalars
        self._file = RecordWriter((directory / f"{_PREFIX}{int(time.time())}.trunkline.{os.getpid()}").open("wb"))
        self._file.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        for point in scalars.history():
            self._add(point)
        self._file.flush()

    def committed(self, commit: RoundCommit) -> None:
        for point in self._scalars.newest(commit.number):
            self._add(point)
        self._file.flush()

    def ended(self, well: bool) -> None:
        for point in self._scalars.judgements():
            self._add(point)
        self._file.close()

    def _add(self, point: Point) -> None:
        for name, value in point.values.items():
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
            event = Event(wall_time=point.at.timestamp(), step=point.round, summary=summary)
            self._file.write(event.SerializeToString())
