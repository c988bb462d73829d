"""The frame loop: the only one. Source to engine to drawing to sinks, every stage timed, every captured frame accounted for.

::

    Frame ─► prepare (resize) ─► engine (one graph) ─► draw ─► write (every sink)
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from engines.localizer import ImageBgr, Localizer
from realtime.frames import Frame, FrameRecord
from realtime.latency import Run
from realtime.overlay import draw
from realtime.sinks import Sink
from realtime.sources import Source


def run_frames(
    records: Iterator[FrameRecord], localizer: Localizer, sinks: Sequence[Sink], run: Run, inset: bool = True
) -> Iterator[FrameRecord]:
    """Localize, draw and write each frame that is not dropped; yields every record when it is finished.

    Args:
        records: from ``every_frame`` or ``latest_frames``.
        localizer: prepares, runs and reads the engine.
        sinks: each gets every record, and the drawing where there is one; logs get it last, when all is timed.
        run: filled as the loop goes, so that an interrupted run can still be summed up.
        inset: draw the heat map.
    """
    pictures = [sink for sink in sinks if sink.needs_picture]
    logs = [sink for sink in sinks if not sink.needs_picture]
    run.start()
    for record in records:
        begin_ns = time.monotonic_ns()
        if record.outcome == "shown":
            _localize(record, localizer)
            picture = _drawn(record, inset) if pictures else None
            mark_ns = time.monotonic_ns()
            for sink in pictures:
                sink.write(record, picture)
            record.stages_ms["write"] = (time.monotonic_ns() - mark_ns) / 1e6
            record.total_ms = record.frame.read_ms + (time.monotonic_ns() - begin_ns) / 1e6
        for sink in logs:
            sink.write(record, None)
        run.add(record)
        yield record


def _localize(record: FrameRecord, localizer: Localizer) -> None:
    frame = record.frame
    start_ns = time.monotonic_ns()
    prepared = localizer.prepare(frame.image_bgr)
    prepared_ns = time.monotonic_ns()
    outputs = localizer.infer([prepared])
    height, width = frame.image_bgr.shape[:2]
    record.found = localizer.read(outputs, 0, width, height)
    done_ns = time.monotonic_ns()
    record.stages_ms["read"] = frame.read_ms
    record.stages_ms["prepare"] = (prepared_ns - start_ns) / 1e6
    record.stages_ms["engine"] = (done_ns - prepared_ns) / 1e6


def _drawn(record: FrameRecord, inset: bool) -> ImageBgr:
    start_ns = time.monotonic_ns()
    assert record.found is not None  # set by _localize
    status = f"{record.frame.source} {record.frame.index}   {record.stages_ms['engine']:.1f} ms"
    picture = draw(record.frame.image_bgr, record.found, record.frame.truth_xyxy_px, status, inset)
    record.stages_ms["draw"] = (time.monotonic_ns() - start_ns) / 1e6
    return picture


def every_frame(source: Source) -> Iterator[FrameRecord]:
    """Each frame in turn, as fast as they are taken; nothing is dropped."""
    return (FrameRecord(frame) for frame in source)


def latest_frames(source: Source, paced: bool) -> Iterator[FrameRecord]:
    """The newest frame whenever one is asked for; frames that came and went unseen are recorded as dropped.

    Args:
        source: read in a thread of its own.
        paced: hold each frame back until its timestamp, so that a file plays at its own pace.

    Raises:
        SourceError: as the source raises, after the frames that it gave.
    """
    mailbox = _Mailbox()

    def read() -> None:
        start_ns = time.monotonic_ns()
        try:
            for frame in source:
                wait_s = frame.pts_s - (time.monotonic_ns() - start_ns) / 1e9 if paced else 0.0
                if mailbox.closed.wait(max(0.0, wait_s)):
                    return
                mailbox.put(replace(frame, captured_ns=time.monotonic_ns()) if paced else frame)
            mailbox.end(None)
        except Exception as error:  # handed to the loop, which raises it where it can be dealt with
            mailbox.end(error)

    reader = threading.Thread(target=read, name=f"read {source.name}", daemon=True)
    reader.start()
    try:
        yield from mailbox.records()
    finally:
        mailbox.closed.set()
        reader.join(timeout=2.0)


class _Mailbox:
    """One waiting frame at most; a newer one pushes it out, and its record says so."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._changed = threading.Condition()
        self._waiting: Frame | None = None
        self._pushed_out: list[FrameRecord] = []
        self._ended = False
        self._error: Exception | None = None

    def put(self, frame: Frame) -> None:
        with self._changed:
            if self._waiting is not None:
                dropped = FrameRecord(self._waiting, "dropped", "a newer frame was waiting")
                dropped.release()
                self._pushed_out.append(dropped)
            self._waiting = frame
            self._changed.notify()

    def end(self, error: Exception | None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify()

    def records(self) -> Iterator[FrameRecord]:
        """Dropped records and the newest frame, until the source has ended; then its error, if any, is raised."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._ended)
                records, frame = self._pushed_out, self._waiting
                self._pushed_out, self._waiting = [], None
                ended = self._ended
            yield from records
            if frame is not None:
                yield FrameRecord(frame)
            elif ended:
                if self._error is not None:
                    raise self._error
                return
