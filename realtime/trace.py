"""Writes the timeline of a run, every stage of every frame, in the trace-event format of Perfetto
and Chrome.

The array form needs no closing bracket, so a file that was cut off opens too.
Format: "Trace Event Format",
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

from engines.errors import OutputError
from engines.files import new_file
from engines.localizer import ImageBgr
from realtime.capture import Connection
from realtime.frames import STAGES, FrameRecord


class TraceSink:
    """A process for each source, a track for each stage; dropped and failed frames and
    reconnections are marks.

    Args:
        path: ends in ``.json``; open it in https://ui.perfetto.dev.
        connections: of the sources.

    Attributes:
        path: of the file, which is a new one: perhaps with a number behind its name.

    Raises:
        OutputError: it cannot be written.
    """

    needs_picture = False

    def __init__(self, path: Path, connections: Sequence[Connection]) -> None:
        self._processes = {each.name: number for number, each in enumerate(connections, 1)}
        self._connections = {each.name: each for each in connections}
        self._reconnects = dict.fromkeys(self._processes, 0)
        try:
            self.path = new_file(path)
            self._file: IO[str] = self.path.open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        self._write_line("[")
        for name, process in self._processes.items():
            self._event("M", process, 0, name="process_name", args={"name": name})
            for track, stage in enumerate(STAGES, 1):
                self._event("M", process, track, name="thread_name", args={"name": stage})
                self._event(
                    "M", process, track, name="thread_sort_index", args={"sort_index": track}
                )

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        source, index = record.frame.source, record.frame.index
        process, args = self._processes[source], {"frame": index}
        for track, stage in enumerate(STAGES, 1):
            if stage in record.stages_ms and stage in record.began_ns:
                begin_us, took_us = record.began_ns[stage] / 1e3, 1e3 * record.stages_ms[stage]
                self._event(
                    "X",
                    process,
                    track,
                    name=f"{stage} {index}",
                    cat=stage,
                    ts=begin_us,
                    dur=took_us,
                    args=args,
                )
        captured_us = record.frame.captured_ns / 1e3
        if record.outcome != "shown":
            self._event(
                "i",
                process,
                1,
                name=f"{record.outcome}: {record.cause}",
                ts=captured_us,
                s="p",
                args=args,
            )
        if self._connections[source].reconnects != self._reconnects[source]:
            self._reconnects[source] = self._connections[source].reconnects
            self._event("i", process, 1, name="reconnected", ts=captured_us, s="p", args=args)

    def _event(self, phase: str, process: int, track: int, **fields: Any) -> None:
        rounded = {
            key: round(value, 3) if isinstance(value, float) else value
            for key, value in fields.items()
        }
        self._write_line(json.dumps({"ph": phase, "pid": process, "tid": track, **rounded}) + ",")

    def _write_line(self, line: str) -> None:
        try:
            self._file.write(line + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
