"""The frame loop: the only one. Source to engine to drawing to sinks, every stage timed, every captured frame accounted for.

::

    reading thread             the loop                          the engine's threads
    Frame ─► (a few wait) ─►   prepare (resize) ─► submit ─►     one graph, several frames under way
                               draw ─► write (every sink) ◄─     collect, in order
"""

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from engines.base import Ticket
from engines.localizer import ImageBgr, Localizer
from realtime.frames import Frame, FrameRecord
from realtime.governed import Governed
from realtime.latency import Run
from realtime.overlay import Painter
from realtime.sinks import Sink
from realtime.sources import Source

READ_AHEAD_FRAMES = 2

Records = Generator[FrameRecord, None, None]


def run_frames(
    records: Records,
    localizer: Localizer | Governed,
    sinks: Sequence[Sink],
    run: Run,
    painter: Painter | None = None,
    under_way: int = 0,
) -> Records:
    """Localize, draw and write each frame that is not dropped; yields every record when it is finished, in order.

    An error of a stage is raised once, after the frames before it are finished where they can be (an error of a sink is not
    waited for). However the loop ends, the engine is left idle and ``records`` closed.

    Args:
        records: from ``every_frame`` or ``latest_frames``.
        localizer: prepares, runs and reads the engine; a ``Governed`` one may change from frame to frame.
        sinks: each gets every record, and the drawing where there is one; logs get it last, when all is timed.
        run: filled as the loop goes, so that an interrupted run can still be summed up.
        painter: draws; None for the usual look.
        under_way: frames in the engine at once. 1 has each frame's answer soonest: for live sources. 0, for as many as it
            takes, has the most frames a second: it works on while a frame is drawn and written. Results are the same.
    """
    governed = localizer if isinstance(localizer, Governed) else None
    begun: deque[_Begun] = deque()
    failure: Exception | None = None
    more, most = True, under_way or localizer.engine.slots
    pace, painter = _Pace(run, most), painter or Painter()
    run.start()
    try:
        while True:
            while more and len(begun) < most:
                try:
                    begun.append(_begin(records, localizer, run))
                except StopIteration:
                    more = False
                except Exception as error:  # kept until the frames before it are finished
                    more, failure = False, error
            if not begun:
                break
            record = begun[0].record
            _finish(begun[0], sinks, run, painter)
            begun.popleft()
            if governed is not None and record.outcome == "shown":
                governed.finished(record, time.monotonic(), pace.frame_ms())
            yield record
        if failure is not None:
            raise failure
    finally:
        for left in begun:
            with suppress(Exception):
                left.abandon()
        records.close()


@dataclass
class _Begun:
    """A frame that the engine works on; ``localizer`` is None for a dropped one, which nothing works on."""

    record: FrameRecord
    localizer: Localizer | None = None
    ticket: Ticket = None
    submitted_ns: int = 0
    heat_map_every: int = 1

    def abandon(self) -> None:
        """Leave the engine as if the frame had never been there."""
        if self.localizer is not None:
            self.localizer.collect(self.ticket)


def _begin(records: Records, chosen: Localizer | Governed, run: Run) -> _Begun:
    """Take the next frame and hand it to the engine.

    Raises:
        StopIteration: there is none.
    """
    asked_ns = time.monotonic_ns()
    record = next(records)
    taken_ns = time.monotonic_ns()
    run.idle_ms["source"] += (taken_ns - asked_ns) / 1e6
    if record.outcome != "shown":
        return _Begun(record)
    frame, heat_map_every = record.frame, 1
    if isinstance(chosen, Governed):
        localizer, heat_map_every, record.rung = chosen.localizer, chosen.rung.heat_map_every, chosen.rung.name
    else:
        localizer = chosen
    prepared = localizer.prepare(frame.image_bgr)
    submitted_ns = time.monotonic_ns()
    record.stages_ms["read"] = frame.read_ms
    record.stages_ms["wait"] = (taken_ns - frame.captured_ns) / 1e6
    record.stages_ms["prepare"] = (submitted_ns - taken_ns) / 1e6
    return _Begun(record, localizer, localizer.submit([prepared]), submitted_ns, heat_map_every)


def _finish(begun: _Begun, sinks: Sequence[Sink], run: Run, painter: Painter) -> None:
    """Take the answer from the engine, draw, write and count."""
    record, localizer = begun.record, begun.localizer
    pictures = [sink for sink in sinks if sink.needs_picture]
    if localizer is not None:
        asked_ns = time.monotonic_ns()
        outputs = localizer.collect(begun.ticket)
        begun.localizer = None
        height, width = record.frame.image_bgr.shape[:2]
        record.found = localizer.read(outputs, 0, width, height)
        found_ns = time.monotonic_ns()
        run.idle_ms["engine"] += (found_ns - asked_ns) / 1e6
        record.stages_ms["engine"] = (found_ns - begun.submitted_ns) / 1e6
        picture = _drawn(record, painter, begun.heat_map_every) if pictures else None
        mark_ns = time.monotonic_ns()
        for sink in pictures:
            sink.write(record, picture)
        done_ns = time.monotonic_ns()
        record.stages_ms["write"] = (done_ns - mark_ns) / 1e6
        record.total_ms = record.frame.read_ms + (done_ns - record.frame.captured_ns) / 1e6
    for sink in sinks:
        if not sink.needs_picture:
            sink.write(record, None)
    run.add(record)


def _drawn(record: FrameRecord, painter: Painter, heat_map_every: int) -> ImageBgr:
    start_ns = time.monotonic_ns()
    assert record.found is not None  # set by _finish
    status = f"{record.frame.source} {record.frame.index}   {record.stages_ms['engine']:.1f} ms"
    picture = painter.paint(record.frame, record.found, status, heat_map_every)
    record.stages_ms["draw"] = (time.monotonic_ns() - start_ns) / 1e6
    return picture


class _Pace:
    """What a frame takes of the loop's time, waiting for the source not counted.

    With several under way, answers may come in bunches: it is the mean of as many frames.
    """

    def __init__(self, run: Run, under_way: int) -> None:
        self._run, self._last_ns, self._last_idle_ms = run, time.monotonic_ns(), 0.0
        self._last_ms: deque[float] = deque(maxlen=under_way)

    def frame_ms(self) -> float:
        """Called once for each finished frame."""
        now_ns, idle_ms = time.monotonic_ns(), self._run.idle_ms["source"]
        self._last_ms.append((now_ns - self._last_ns) / 1e6 - (idle_ms - self._last_idle_ms))
        self._last_ns, self._last_idle_ms = now_ns, idle_ms
        return sum(self._last_ms) / len(self._last_ms)


def every_frame(source: Source) -> Records:
    """Each frame in turn, as fast as they are taken; nothing is dropped. A thread reads ``READ_AHEAD_FRAMES`` ahead.

    Raises:
        SourceError: as the source raises, after the frames that it gave.
    """
    return _read_in_thread(source, _Buffer(READ_AHEAD_FRAMES, drops=False), paced=False)


def latest_frames(source: Source, paced: bool) -> Records:
    """The newest frame whenever one is asked for; frames that came and went unseen are recorded as dropped.

    Args:
        source: read in a thread of its own.
        paced: hold each frame back until its timestamp, so that a file plays at its own pace.

    Raises:
        SourceError: as the source raises, after the frames that it gave.
    """
    return _read_in_thread(source, _Buffer(1, drops=True), paced)


def _read_in_thread(source: Source, buffer: "_Buffer", paced: bool) -> Records:
    def read() -> None:
        start_ns = time.monotonic_ns()
        try:
            for frame in source:
                wait_s = frame.pts_s - (time.monotonic_ns() - start_ns) / 1e9 if paced else 0.0
                if buffer.closed.wait(max(0.0, wait_s)):
                    return
                buffer.put(replace(frame, captured_ns=time.monotonic_ns()) if paced else frame)
            buffer.end(None)
        except Exception as error:  # handed to the loop, which raises it where it can be dealt with
            buffer.end(error)

    reader = threading.Thread(target=read, name=f"read {source.name}", daemon=True)
    reader.start()
    try:
        yield from buffer.records()
    finally:
        buffer.close()
        reader.join(timeout=2.0)


class _Buffer:
    """Frames between the reading thread and the loop, at most ``capacity``.

    When it is full, the reader waits; or, where it ``drops``, a newer frame pushes the oldest out, and its record says so.
    """

    def __init__(self, capacity: int, drops: bool) -> None:
        self.closed = threading.Event()
        self._capacity, self._drops = capacity, drops
        self._changed = threading.Condition()
        self._waiting: deque[FrameRecord] = deque()
        self._pushed_out: list[FrameRecord] = []
        self._ended = False
        self._error: Exception | None = None

    def put(self, frame: Frame) -> None:
        with self._changed:
            if self._drops and len(self._waiting) == self._capacity:
                dropped = self._waiting.popleft()
                dropped.outcome, dropped.cause = "dropped", "a newer frame was waiting"
                dropped.release()
                self._pushed_out.append(dropped)
            self._changed.wait_for(lambda: len(self._waiting) < self._capacity or self.closed.is_set())
            self._waiting.append(FrameRecord(frame))
            self._changed.notify_all()

    def end(self, error: Exception | None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more is taken: whoever waits to put a frame here need not."""
        with self._changed:
            self.closed.set()
            self._changed.notify_all()

    def records(self) -> Iterator[FrameRecord]:
        """Dropped records and waiting frames, until the source has ended; then its error, if any, is raised."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                records, self._pushed_out = self._pushed_out, []
                if self._waiting:
                    records.append(self._waiting.popleft())
                elif not records and self._error is not None:
                    raise self._error
                elif not records:
                    return
                self._changed.notify_all()
            yield from records
