"""The frame loop, the only one: source, engine, drawing, sinks. It times every stage and accounts
for every frame.

::

    reading threads         the engine's half, a thread               the caller's thread
    Frame ─► (a few) ─►     prepare (resize) ─► submit ─► collect ─►  draw ─► every sink ─► yield
                            several calls under way, in order         one call at once
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

from engines.engine import Ticket
from engines.localizer import ImageBgr, Localization, Localizer
from realtime.annotate import Look
from realtime.frames import FrameRecord, LoopFrame, LoopFrames, View
from realtime.latency_budget import Pace
from realtime.session import Settings
from realtime.sinks import Output, Sink
from realtime.statistics import Run
from realtime.tracking.options import Following


@dataclass(frozen=True)
class Live:
    """What the loop asks of a live run's surroundings.

    Attributes:
        settings: those of the moment.
        stop: ends the records soon; may be called from any thread.
    """

    settings: Callable[[], Settings]
    stop: Callable[[], None]


def run_frames(
    frames: LoopFrames,
    localizer: Localizer,
    sinks: Sequence[Sink],
    run: Run,
    under_way: int = 0,
    live: Live | None = None,
    following: Following | None = None,
) -> Generator[FrameRecord, None, None]:
    """Localize, draw and write each frame that is not dropped; yields every record when it is
    finished, in order.

    Reading, the engine, and drawing with writing overlap: a thread feeds the engine; the caller's
    draws, calls the sinks and yields. An answer is handed over when the one before it is written:
    as little as may be is under way.

    A frame that says ``batch_with_next`` shares an engine call with the next one, as far as the
    engine's batch goes. An error of a stage is raised once, after the frames before it are finished
    where they can be (an error of a sink is not waited for). However the loop ends, the engine is
    left idle and ``frames`` closed.

    Args:
        frames: from ``realtime.capture``; the engine's half takes them.
        localizer: prepares, runs and reads the engine. It is told how long each frame took, and may
            change its setting from frame to frame.
        sinks: each gets every record, and the drawing where there is one; logs get it last, when
            all is timed.
        run: filled as the loop goes, so that an interrupted run can still be summed up.
        under_way: engine calls at once. 0, for as many as it takes, has the most frames a second.
            Results are the same.
        live: for live sources, which want each answer soon: one call at once, of the newest frames
            when the engine is free. A frame that cannot be used fails alone, and frames that are
            under way when the run fails are entered as failed.
        following: decides what the engine sees of each frame, and what its answer means; None for
            the whole of it. With several calls under way, a frame's window is chosen before the
            answers just before it are there.
    """
    most = 1 if live else under_way or localizer.engine.slots
    half = _EngineHalf(frames, localizer, run, most, live, following)
    output = Output(sinks, run, live.settings if live else Look, alone=live is not None)
    call, failed_by = _Call(deque()), None
    run.start()
    try:
        for call in half.answers():
            while call.frames:
                record = call.frames[0].record
                output.draw_and_write(record, call.heat_map_every)
                call.frames.popleft()
                output.enter(record)
                yield record
    except BaseException as error:
        failed_by = error
        raise
    finally:
        for left in (call, *half.stop()):
            for frame in left.frames if live else ():
                frame.record.fail(failed_by)
                with suppress(Exception):
                    output.enter(frame.record)
        frames.close()


@dataclass
class _Call:
    """Frames of one engine call. ``localizer`` is None where no frame asks the engine: these were
    dropped.
    """

    frames: deque[LoopFrame]
    localizer: Localizer | None = None
    ticket: Ticket = None
    submitted_ns: int = 0
    heat_map_every: int = 1
    found_ns: int = 0

    @property
    def under_way(self) -> bool:
        return self.localizer is not None and not self.found_ns

    def collect(self, run: Run, following: Following | None) -> None:
        """Take the answer from the engine, for each of the frames."""
        answers = self._answers(run)
        for frame in self.frames:
            record, view = frame.record, frame.view
            if following is not None:
                following.passes(record.frame, view.tracker if view else None)
            if record.outcome != "shown" or view is None:
                continue
            record.found = next(answers)
            if following is not None:
                record.found = following.update(record, view.tracker, record.found)
            record.stages_ms["engine"] = (self.found_ns - self.submitted_ns) / 1e6

    def _answers(self, run: Run) -> Iterator[Localization]:
        if self.localizer is None:
            return
        asked_ns = self.found_ns = time.monotonic_ns()
        outputs = self.localizer.collect(self.ticket)
        self.found_ns = time.monotonic_ns()
        run.idle_ms["engine"] += (self.found_ns - asked_ns) / 1e6
        seen = (frame.view for frame in self.frames if frame.asks_engine and frame.view)
        for place, view in enumerate(seen):
            height, width = view.image_bgr.shape[:2]
            yield self.localizer.read(outputs, place, width, height, view.tracker is not None)

    def abandon(self) -> None:
        """Leave the engine as if the frames had never been there."""
        if self.under_way and self.localizer is not None:
            self.localizer.collect(self.ticket)


class _EngineHalf:
    """Keeps the engine busy in a thread of its own, and hands its answers over, in order."""

    def __init__(
        self,
        frames: LoopFrames,
        localizer: Localizer,
        run: Run,
        most: int,
        live: Live | None,
        following: Following | None,
    ) -> None:
        self._frames = frames
        self._localizer = localizer
        self._run = run
        self._most = most
        self._live = live
        self._following = following
        self._begun: deque[_Call] = deque()
        self._failure: Exception | None = None
        self._more, self._stopped = True, False
        self._taken = threading.Semaphore(1)  # of the calls handed over, all are done with
        self._answers: SimpleQueue[_Call | BaseException | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def answers(self) -> Iterator[_Call]:
        """Give every call with its answers. The next one is handed over when this one is done.

        Raises:
            Exception: what went wrong, after what went right before it.
        """
        self._thread.start()
        while True:
            answer = self._answers.get()
            if answer is None:
                return
            if isinstance(answer, BaseException):
                raise answer
            yield answer
            if answer.localizer is not None:
                self._taken.release()

    def stop(self) -> list[_Call]:
        """End the thread and leave the engine idle. Returns the calls that were not handed over."""
        self._stopped = True
        self._taken.release()
        if self._live is not None:
            self._live.stop()
        self._thread.join()
        for left in self._begun:
            with suppress(Exception):
                left.abandon()
        return list(self._begun)

    def _work(self) -> None:
        pace = Pace(self._run, self._most)
        try:
            while not self._stopped and self._begin_some():
                self._begun[0].collect(self._run, self._following)
                if (
                    self._begun[0].localizer is not None
                ):  # what was dropped keeps no new frame waiting
                    self._taken.acquire()
                if self._stopped:
                    return
                call = self._begun.popleft()
                self._tell_localizer(call, pace)
                self._answers.put(call)
            self._answers.put(self._failure)
        except BaseException as error:  # raised by the other half, where it can be dealt with
            self._answers.put(error)

    def _tell_localizer(self, call: _Call, pace: Pace) -> None:
        """Tell it how long each frame took that the engine saw."""
        for frame in call.frames:
            record = frame.record
            if record.outcome != "shown":
                continue
            frame_ms = pace.frame_ms()
            if frame.asks_engine:
                engine_ms = record.stages_ms["engine"]
                number, now_s = record.frame.index, time.monotonic()
                self._localizer.finished(record.preset, number, engine_ms, frame_ms, now_s)

    def _begin_some(self) -> bool:
        """Wait for frames and give them to the engine, until all that may be under way are; False
        if none is left.
        """
        while self._more and sum(call.under_way for call in self._begun) < self._most:
            self._begin()
            if self._live is not None and self._begun:
                break  # an answer that is there, carried along, does not wait for the next frame
        return bool(self._begun)

    def _begin(self) -> None:
        call = _Call(deque())
        try:
            self._fill(call)
        except StopIteration:
            self._more = False
            return
        except Exception as error:  # kept until the frames before it are finished
            self._more, self._failure = False, error
            if self._live is None:
                return
            for frame in call.frames:
                frame.record.fail(error)
        if call.frames:
            self._begun.append(call)

    def _fill(self, call: _Call) -> None:
        """Take the next frames and hand them to the engine.

        Raises:
            StopIteration: there is none.
        """
        call.frames.append(self._take())
        if call.frames[0].record.outcome != "shown":
            return
        localizer = self._localizer
        call.heat_map_every = localizer.heat_map_every
        if self._live is not None:
            now = self._live.settings()
            localizer.look_for(now.class_index)
            if self._following is None:
                localizer.abstain_below(now.min_score)
            else:
                self._following.min_score = now.min_score
        prepared = self._prepared(localizer, call.frames[-1])
        while call.frames[-1].batch_with_next and len(call.frames) < localizer.batch:
            call.frames.append(self._take())
            prepared += self._prepared(localizer, call.frames[-1])
        call.submitted_ns = time.monotonic_ns()
        if prepared:
            call.ticket = localizer.submit(prepared)
            call.localizer = localizer
        for frame in call.frames:
            frame.record.preset = localizer.setting
            frame.record.began_ns["engine"] = call.submitted_ns

    def _take(self) -> LoopFrame:
        asked_ns = time.monotonic_ns()
        frame = next(self._frames)
        record = frame.record
        taken_ns = time.monotonic_ns()
        self._run.idle_ms["source"] += (taken_ns - asked_ns) / 1e6
        if record.outcome == "shown":
            captured_ns, read_ms = record.frame.captured_ns, record.frame.read_ms
            record.stages_ms |= {"read": read_ms, "wait": (taken_ns - captured_ns) / 1e6}
            record.began_ns |= {
                "read": captured_ns - round(read_ms * 1e6),
                "wait": captured_ns,
                "prepare": taken_ns,
            }
        return frame

    def _prepared(self, localizer: Localizer, frame: LoopFrame) -> list[ImageBgr]:
        """The frame as the engine takes it. Nothing where it cannot in a live run: the record has
        failed then.

        Raises:
            InputError: it cannot be used.
        """
        record = frame.record
        try:
            whole = View(record.frame.image_bgr)
            frame.view = self._following.view(record.frame) if self._following else whole
            prepared = [localizer.prepare(frame.view.image_bgr)]
        except Exception as error:  # a picture that is too much for it, too
            if self._live is None:
                raise
            record.fail(error)
            return []
        record.stages_ms["prepare"] = (time.monotonic_ns() - record.began_ns["prepare"]) / 1e6
        self._run.work_ms["prepare"] += record.stages_ms["prepare"]
        return prepared
