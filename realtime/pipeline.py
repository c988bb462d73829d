"""The frame loop: the only one. Source to engine to drawing to sinks, every stage timed, every captured frame accounted for.

::

    reading threads            the loop                          the engine's threads
    Frame ─► (a few wait) ─►   prepare (resize) ─► submit ─►     one graph, several calls under way
                               draw ─► write (every sink) ◄─     collect, in order
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from engines.base import Array, InputError, Ticket
from engines.localizer import ImageBgr, Localizer
from realtime.frames import FrameRecord
from realtime.governed import Governed
from realtime.hub import Settings
from realtime.inbox import Records
from realtime.latency import Run
from realtime.overlay import Look, Painter, clock
from realtime.sinks import Sink


@dataclass(frozen=True)
class Live:
    """What the loop asks of a live run's surroundings.

    Attributes:
        settings: those of the moment.
        ready: whether a frame can be taken without waiting.
    """

    settings: Callable[[], Settings]
    ready: Callable[[], bool]


def run_frames(
    records: Records, localizer: Localizer | Governed, sinks: Sequence[Sink], run: Run, under_way: int = 0,
    live: Live | None = None,
) -> Records:  # fmt: skip
    """Localize, draw and write each frame that is not dropped; yields every record when it is finished, in order.

    Records that are ``followed`` share an engine call with the next one, as far as the engine's batch goes. An error of a stage
    is raised once, after the frames before it are finished where they can be (an error of a sink is not waited for). However
    the loop ends, the engine is left idle and ``records`` closed.

    Args:
        records: from ``realtime.readers``.
        localizer: prepares, runs and reads the engine; a ``Governed`` one may change from frame to frame.
        sinks: each gets every record, and the drawing where there is one; logs get it last, when all is timed.
        run: filled as the loop goes, so that an interrupted run can still be summed up.
        under_way: engine calls at once. 0, for as many as it takes, has the most frames a second: it works on while a frame is
            drawn and written. Results are the same.
        live: for live sources, which want each answer soon: one call at once, of the newest frames when the engine is free; it
            gets the next ones before the last ones are drawn, if any wait. A frame that cannot be used fails alone, and frames
            that are under way when the run fails are entered as failed.
    """
    governed = localizer if isinstance(localizer, Governed) else None
    most = 1 if live else under_way or localizer.engine.slots
    loop, pace, drawing = _Loop(records, localizer, run, live), _Pace(run, most), _Drawing(live)
    failed_by: BaseException | None = None
    run.start()
    try:
        while loop.begin(most):
            call = loop.begun[0]
            call.collect(run)
            loop.begin_ready()
            while call.records:
                record = _finish(call, sinks, run, drawing)
                if governed is not None and record.outcome == "shown":
                    governed.finished(record, time.monotonic(), pace.frame_ms())
                yield record
            loop.begun.popleft()
        if loop.failure is not None:
            raise loop.failure
    except BaseException as error:
        failed_by = error
        raise
    finally:
        for left in loop.begun:
            with suppress(Exception):
                left.abandon()
            for record in left.records if live else ():
                record.fail(failed_by)
                with suppress(Exception):
                    _enter(record, sinks, run)
        records.close()


@dataclass
class _Call:
    """Frames that the engine works on in one call; ``localizer`` is None where it works on none, as for dropped ones."""

    records: deque[FrameRecord]
    localizer: Localizer | None = None
    ticket: Ticket = None
    submitted_ns: int = 0
    heat_map_every: int = 1
    outputs: dict[str, Array] = field(default_factory=dict)
    found_ns: int = 0
    place: int = 0  # in the batch, of the first of the records

    @property
    def under_way(self) -> bool:
        return self.localizer is not None and not self.found_ns

    def collect(self, run: Run) -> None:
        """Take the answer from the engine."""
        if self.localizer is not None:
            asked_ns = self.found_ns = time.monotonic_ns()
            self.outputs = self.localizer.collect(self.ticket)
            self.found_ns = time.monotonic_ns()
            run.idle_ms["engine"] += (self.found_ns - asked_ns) / 1e6

    def abandon(self) -> None:
        """Leave the engine as if the frames had never been there."""
        if self.under_way and self.localizer is not None:
            self.localizer.collect(self.ticket)


class _Loop:
    """What has begun and is not finished, in order, and how more begins."""

    def __init__(self, records: Records, chosen: Localizer | Governed, run: Run, live: Live | None) -> None:
        self.begun: deque[_Call] = deque()
        self.failure: Exception | None = None
        self._records, self._chosen, self._run, self._live, self._more = records, chosen, run, live, True

    def begin(self, most: int) -> bool:
        """Wait for frames and hand them over, until ``most`` calls have begun or the source ends; False if none is left."""
        while self._more and len(self.begun) < most:
            self._begin()
        return bool(self.begun)

    def begin_ready(self) -> None:
        """Hand over what is there already in a live run, for one call at most."""
        while self._more and self._live is not None and self._live.ready() and not self.begun[-1].under_way:
            self._begin()

    def _begin(self) -> None:
        call = _Call(deque())
        try:
            self._fill(call)
        except StopIteration:
            self._more = False
            return
        except Exception as error:  # kept until the frames before it are finished
            self._more, self.failure = False, error
            if self._live is None:
                return
            for record in call.records:
                record.fail(error)
        if call.records:
            self.begun.append(call)

    def _fill(self, call: _Call) -> None:
        """Take the next frames and hand them to the engine.

        Raises:
            StopIteration: there is none.
        """
        call.records.append(self._take())
        if call.records[0].outcome != "shown":
            return
        chosen, rung = self._chosen, ""
        localizer = chosen.localizer if isinstance(chosen, Governed) else chosen
        if isinstance(chosen, Governed):
            call.heat_map_every, rung = chosen.rung.heat_map_every, chosen.rung.name
        if self._live is not None:
            localizer.look_for(self._live.settings().class_index)
        prepared = self._prepared(localizer, call.records[-1])
        while call.records[-1].followed and len(call.records) < localizer.batch:
            call.records.append(self._take())
            prepared += self._prepared(localizer, call.records[-1])
        if prepared:
            call.submitted_ns = time.monotonic_ns()
            call.ticket = localizer.submit(prepared)
            call.localizer = localizer
        for record in call.records:
            record.rung, record.began_ns["engine"] = rung, call.submitted_ns

    def _take(self) -> FrameRecord:
        asked_ns = time.monotonic_ns()
        record = next(self._records)
        taken_ns = time.monotonic_ns()
        self._run.idle_ms["source"] += (taken_ns - asked_ns) / 1e6
        if record.outcome == "shown":
            captured_ns, read_ms = record.frame.captured_ns, record.frame.read_ms
            record.stages_ms |= {"read": read_ms, "wait": (taken_ns - captured_ns) / 1e6}
            record.began_ns |= {"read": captured_ns - round(read_ms * 1e6), "wait": captured_ns, "prepare": taken_ns}
        return record

    def _prepared(self, localizer: Localizer, record: FrameRecord) -> list[ImageBgr]:
        """The frame as the engine takes it; nothing, and the record failed, if it cannot be used in a live run.

        Raises:
            InputError: it cannot be used.
        """
        try:
            image = localizer.prepare(record.frame.image_bgr)
        except InputError as error:
            if self._live is None:
                raise
            record.fail(error)
            return []
        record.stages_ms["prepare"] = (time.monotonic_ns() - record.began_ns["prepare"]) / 1e6
        return [image]


def _finish(call: _Call, sinks: Sequence[Sink], run: Run, drawing: "_Drawing") -> FrameRecord:
    """Take the next frame of a call from the engine's answer, draw, write and count it."""
    record, localizer = call.records[0], call.localizer
    if record.outcome == "shown" and localizer is not None:
        pictures = [sink for sink in sinks if sink.needs_picture]
        height, width = record.frame.image_bgr.shape[:2]
        record.found = localizer.read(call.outputs, call.place, width, height)
        call.place += 1
        record.stages_ms["engine"] = (call.found_ns - call.submitted_ns) / 1e6
        picture = drawing.of(record, call.heat_map_every) if pictures else None
        mark_ns = record.began_ns["write"] = time.monotonic_ns()
        for sink in pictures:
            sink.write(record, picture)
        done_ns = time.monotonic_ns()
        record.stages_ms["write"] = (done_ns - mark_ns) / 1e6
        record.total_ms = record.frame.read_ms + (done_ns - record.frame.captured_ns) / 1e6
    call.records.popleft()
    _enter(record, sinks, run)
    return record


def _enter(record: FrameRecord, sinks: Sequence[Sink], run: Run) -> None:
    for sink in sinks:
        if not sink.needs_picture:
            sink.write(record, None)
    run.add(record)


class _Drawing:
    """Draws frames by the settings of the moment."""

    def __init__(self, live: Live | None) -> None:
        self._settings: Callable[[], Look] = live.settings if live else Look
        self._painter = Painter()

    def of(self, record: FrameRecord, heat_map_every: int) -> ImageBgr:
        start_ns = record.began_ns["draw"] = time.monotonic_ns()
        assert record.found is not None  # set by _finish
        status = f"{record.frame.source} {record.frame.index}   {record.stages_ms['engine']:.1f} ms"
        if record.frame.pts is not None:  # whole files, whose pictures must not depend on the machine
            status = f"{record.frame.source}   {clock(record.frame.pts_s)}"
        picture = self._painter.paint(record.frame, record.found, status, self._settings(), heat_map_every)
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
