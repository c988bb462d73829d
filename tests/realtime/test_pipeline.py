"""The frame loop with a mock engine: order, accounting, timing, policies."""

import json
import threading
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from engines.errors import EngineError, InputError, OutputError, SourceError
from engines.localizer import Localizer
from realtime.capture import every_frame, latest_frames
from realtime.file_sinks import JsonlSink
from realtime.frame_queue import LATEST, FrameQueue
from realtime.frames import Frame
from realtime.pipeline import Live, run_frames
from realtime.session import Settings
from realtime.sources.spec import open_source
from realtime.statistics import Run
from tests.engines.mock import MockEngine
from tests.realtime.media import picture, write_video
from tests.realtime.scripted import Collector, Scripted, wait_until

PATIENCE_S = 20.0


def test_every_frame_is_localized_drawn_and_written_once_in_order(localizer, tmp_path):
    collector, run = Collector(), Run()
    with JsonlSink(tmp_path / "log.jsonl") as log:
        for record in run_frames(every_frame(Scripted()), localizer, [log, collector], run):
            x0, y0, x1, y1 = record.found.box_xyxy_px
            square = 4 + 3 * record.frame.index
            assert (x0, y0, x1, y1) == pytest.approx((square, 30, square + 24, 54), abs=2.0)
    assert collector.records == list(range(8))
    assert all(p.shape == (96, 128, 3) for p in collector.pictures)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["frame"] for row in rows] == list(range(8))
    required = {
        "source",
        "frame",
        "pts_s",
        "captured_ns",
        "outcome",
        "cause",
        "class_id",
        "class_name",
        "score",
        "x0",
        "y0",
        "x1",
        "y1",
        "read_ms",
        "wait_ms",
        "prepare_ms",
        "engine_ms",
        "draw_ms",
        "write_ms",
        "total_ms",
    }
    for row in rows:
        assert required <= set(row)
        parts = sum(
            row[f"{stage}_ms"] for stage in ("read", "wait", "prepare", "engine", "draw", "write")
        )
        assert parts <= row["total_ms"] + 0.01
        assert row["read_ms"] == 0.5


def test_the_picture_is_a_copy(localizer):
    frames = []

    def keep():
        for each in every_frame(Scripted(2)):
            frames.append(each.record.frame.image_bgr)
            yield each

    list(run_frames(keep(), localizer, [Collector()], Run()))
    np.testing.assert_array_equal(frames[1], picture(1))


def test_without_a_sink_that_wants_pictures_nothing_is_drawn(localizer):
    records = list(run_frames(every_frame(Scripted(2)), localizer, [], Run()))
    assert "draw" not in records[0].stages_ms


def test_a_failing_sink_stops_the_run(localizer):
    class Full(Collector):
        def write(self, record, picture):
            raise OutputError("disk full")

    with pytest.raises(OutputError, match="disk full"):
        list(run_frames(every_frame(Scripted()), localizer, [Full()], Run()))


def one_after_the_other(source, localizer):
    """What the loop must give, written without it."""
    for frame in source:
        outputs = localizer.infer([localizer.prepare(frame.image_bgr)])
        height, width = frame.image_bgr.shape[:2]
        yield frame.index, localizer.read(outputs, 0, width, height)


@pytest.mark.parametrize("under_way", [1, 2])
def test_overlapping_changes_neither_order_nor_a_single_bit(tiny_localizer, under_way, tmp_path):
    video = str(write_video(tmp_path / "clip.mp4", 20))
    expected = list(one_after_the_other(open_source(video), tiny_localizer))
    collector = Collector()
    loop = run_frames(
        every_frame(open_source(video)), tiny_localizer, [collector], Run(), under_way=under_way
    )
    got = [(record.frame.index, record.found) for record in loop]
    assert (
        collector.records
        == [index for index, _ in got]
        == [index for index, _ in expected]
        == list(range(20))
    )
    for (_, a), (_, b) in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.map_hw, b.map_hw)
        assert replace(a, map_hw=b.map_hw) == b
    assert len({float(found.map_hw.sum()) for _, found in got}) == 20, (
        "every frame has a map of its own"
    )


def test_as_many_frames_are_under_way_as_asked_for():
    seen = []

    class Watched(Collector):
        def write(self, record, picture):
            expected = min(6, record.frame.index + 1 + 3)
            wait_until(lambda: engine.calls >= expected)
            seen.append(engine.calls - expected)

    engine = MockEngine(32, slots=3)
    list(run_frames(every_frame(Scripted(6)), Localizer(engine), [Watched()], Run(), under_way=3))
    assert seen == [0] * 6, "the engine gets the next three, and no more, while one is written"


class Broken(MockEngine):
    """Fails at the sixth frame."""

    def run(self, feeds):
        if self.calls_run == 5:
            raise EngineError("the engine broke")
        self.calls_run += 1
        return super().run(feeds)

    calls_run = 0


class FailsAtFive(Collector):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, record, picture):
        if record.frame.index == 5:
            raise self.error
        super().write(record, picture)


class WithASpeck(Scripted):
    """The sixth frame is too small to find anything in."""

    def __iter__(self):
        for frame in super().__iter__():
            yield replace(frame, image_bgr=frame.image_bgr[:2, :2]) if frame.index == 5 else frame


@pytest.mark.parametrize("under_way", [1, 3])
@pytest.mark.parametrize(
    ("source", "engine", "sink", "error"),
    [
        (Scripted(5, error=SourceError("the cable is out")), MockEngine, Collector(), SourceError),
        (WithASpeck(20), MockEngine, Collector(), InputError),
        (Scripted(20), Broken, Collector(), EngineError),
        (Scripted(20), MockEngine, FailsAtFive(OutputError("disk full")), OutputError),
        (Scripted(20), MockEngine, FailsAtFive(KeyboardInterrupt()), KeyboardInterrupt),
    ],
    ids=["source", "prepare", "engine", "sink", "Ctrl-C"],
)
def test_a_failure_comes_once_after_the_frames_before_it_and_leaves_nothing_running(
    source, engine, sink, error, under_way
):
    sink.records.clear()
    running, run = engine(32, slots=3), Run()
    loop = run_frames(every_frame(source), Localizer(running), [sink], run, under_way=under_way)
    with pytest.raises(error):
        list(loop)
    assert sink.records == list(range(5))
    assert run.outcomes == {"shown": 5}
    assert list(loop) == [], "it is over"
    assert running.under_way == 0
    assert not [t for t in threading.enumerate() if t.name == "read scripted"]


def test_leaving_the_loop_early_leaves_the_engine_idle():
    engine = MockEngine(32, slots=3)
    with closing(
        run_frames(every_frame(Scripted(1000)), Localizer(engine), [], Run(), under_way=3)
    ) as records:
        next(records)
        wait_until(lambda: engine.calls == 4)
    assert engine.under_way == 0
    assert not [t for t in threading.enumerate() if t.name == "read scripted"]


def test_live_frames_are_taken_only_when_the_engine_is_free():
    """Age is not spent in queues: with nothing under way, the newest frame goes in, at most one
    ahead of what is written.
    """
    engine, taken, written = MockEngine(32, slots=3), [], []

    def watched():
        for each in latest_frames(Scripted(30, gap_s=0.005), paced=True):
            if each.record.outcome == "shown":
                taken.append((each.record.frame.index, engine.under_way, len(written)))
            yield each

    class Slow(Collector):
        def write(self, record, picture):
            time.sleep(0.02)
            written.append(record.frame.index)

    list(run_frames(watched(), Localizer(engine), [Slow()], Run(), under_way=1))
    assert len(taken) >= 2
    assert all(
        under_way == 0 and done >= number - 1 for number, (_, under_way, done) in enumerate(taken)
    )


def test_source_engine_and_sink_work_at_the_same_time():
    """They meet, once for each frame: with the sink at one frame, the engine is at the next, and
    the source at the one after.
    """
    frames, meetings = 20, []
    together = threading.Barrier(3, lambda: meetings.append(1))

    class MeetingSource(Scripted):
        def __iter__(self):
            for frame in super().__iter__():
                if frame.index >= 2:
                    together.wait(timeout=PATIENCE_S)
                yield frame

    class MeetingEngine(MockEngine):
        runs = 0

        def run(self, feeds):
            self.runs += 1
            if 1 < self.runs < frames:
                together.wait(timeout=PATIENCE_S)
            return super().run(feeds)

    class MeetingSink(Collector):
        def write(self, record, picture):
            if record.frame.index < frames - 2:
                together.wait(timeout=PATIENCE_S)
            super().write(record, picture)

    sink = MeetingSink()
    list(
        run_frames(
            every_frame(MeetingSource(frames)), Localizer(MeetingEngine(32, slots=2)), [sink], Run()
        )
    )
    assert sink.records == list(range(frames))
    assert len(meetings) == frames - 2


def test_a_live_run_gives_the_engine_the_next_frame_while_it_draws_the_last():
    frame_queue, seen = FrameQueue(LATEST), []

    class Engine(MockEngine):
        """While it works, three more frames come, of which the newest stays."""

        def collect(self, ticket):
            outputs = super().collect(ticket)
            for index in range(3 * self.calls, 3 * self.calls + 3 if self.calls < 4 else 0):
                frame_queue.put(
                    Frame(picture(index), "many", index, index / 25, time.monotonic_ns(), 0.5)
                )
            return outputs

    class Watching(Collector):
        def write(self, record, picture):
            seen.append(record.frame.index)
            if record.frame.index == 11:
                frame_queue.stop()
            else:
                wait_until(lambda: engine.calls == len(seen) + 1)

    engine = Engine(32, slots=3)
    frame_queue.put(Frame(picture(0), "many", 0, 0.0, time.monotonic_ns(), 0.5))
    live = Live(Settings, frame_queue.stop)
    records = list(
        run_frames(frame_queue.frames(), Localizer(engine), [Watching()], Run(), live=live)
    )
    assert seen == [0, 5, 8, 11], "one call at once, of the newest frame, and no more"
    assert [record.frame.index for record in records if record.outcome == "dropped"] == [
        3,
        4,
        6,
        7,
        9,
        10,
    ]
