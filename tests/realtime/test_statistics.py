"""What a run sums up, and which stage it names as the one that holds the others up."""

import time
from dataclasses import replace

import numpy as np
import pytest

from engines.localizer import Localization, Localizer
from realtime.capture import every_frame
from realtime.frames import Frame, FrameRecord
from realtime.pipeline import run_frames
from realtime.statistics import LiveRun, Run, verdict_of
from realtime.terminal import localized_in_words
from tests.engines.mock import MockEngine
from tests.realtime.scripted import Collector, Scripted


def test_run_sums_up(localizer):
    run = Run()
    list(run_frames(every_frame(Scripted(10)), localizer, [], run))
    summary = run.summary()
    assert summary["frames"] == 10
    assert summary["dropped"] == 0
    latency = summary["latency_ms"]
    assert latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p99_9"] <= latency["max"]
    assert latency["max"] == pytest.approx(max(run.total_ms), abs=1e-3), "no outlier is removed"
    assert "corloc" not in summary
    assert summary["verdict"].endswith("-limited")


def test_a_run_says_in_how_many_frames_there_is_a_box_and_in_how_many_nothing_sure():
    frame = Frame(np.zeros((8, 8, 3), np.uint8), "s", 0, 0.0, time.monotonic_ns(), 0.0)
    boxed = Localization((1.0, 2.0, 3.0, 4.0), 0, "cat", 0.5, np.zeros((4, 4), np.float32))
    answers = [boxed, replace(boxed, confidence=0.9), replace(boxed, confidence=0.1).sure(0.5)]
    run, live = Run(), LiveRun(["s"])
    for found in (*answers, replace(boxed, box_xyxy_px=None)):
        for each in (run, live):
            each.add(FrameRecord(frame, found=found, stages_ms={"engine": 1.0}, total_ms=1.0))
    for summary in (run.summary(), live.summary(), live.rolling()):
        assert (summary["frames"], summary["localized"], summary["nothing_sure"]) == (4, 2, 1)
    assert localized_in_words(run.summary()) == "a box in 2 of them, nothing sure in view in 1"
    assert localized_in_words({}) == "", "of an older version"


def test_a_run_may_have_several_passes(localizer):
    run, passes_s = Run(), 0.0
    for _ in range(3):
        begin_s = time.monotonic()
        list(run_frames(every_frame(Scripted(10)), localizer, [Collector(0.01)], run))
        passes_s += time.monotonic() - begin_s
        time.sleep(0.2)
    assert run.summary()["frames"] == 30
    assert run.fps >= 30 / passes_s, "time between passes does not count"


@pytest.mark.parametrize(
    ("source", "engine", "prepare", "drawing", "sink", "verdict"),
    [
        (500, 100, 200, 100, 50, "source-limited"),
        (100, 500, 200, 100, 50, "engine-limited"),
        (100, 100, 50, 300, 0, "drawing-limited"),
        (100, 100, 50, 30, 400, "sink-limited"),
        (100, 100, 500, 30, 40, "prepare-limited"),
        (300, 200, 500, 450, 0, "prepare-limited"),  # own work is most, though much of it overlaps
        (100, 100, 0, 0, 0, "loop-limited"),
        (0, 0, 10, 20, 49, "loop-limited"),  # less than a twentieth
        (0, 0, 0, 0, 50, "sink-limited"),
    ],
)
def test_a_run_is_limited_by_what_is_waited_for_or_by_the_work_that_took_most(
    source, engine, prepare, drawing, sink, verdict
):
    """Of a second. What took no time limits nothing."""
    work_ms = {"prepare": prepare, "drawing": drawing, "sink": sink}
    assert verdict_of({"source": source, "engine": engine}, work_ms, 1000) == verdict


def test_work_is_what_the_stages_of_the_frames_took(localizer):
    class Log:
        needs_picture = False

        def write(self, record, picture):
            time.sleep(0.01)

    run = Run()
    list(run_frames(every_frame(Scripted(5)), localizer, [Collector(), Log()], run))
    for work, stage in (("prepare", "prepare"), ("drawing", "draw")):
        assert run.work_ms[work] == pytest.approx(sum(run.times.stages[stage].values_ms))
    assert run.work_ms["sink"] >= sum(run.times.stages["write"].values_ms) + 50, (
        "logs count as well"
    )


@pytest.mark.parametrize(
    ("read_s", "engine_s", "write_s", "verdict"),
    [(0.05, 0, 0, "source-limited"), (0, 0.05, 0, "engine-limited"), (0, 0, 0.05, "sink-limited")],
)
def test_the_verdict_names_what_holds_the_others_up(read_s, engine_s, write_s, verdict):
    """A stage that takes ten times as long as all others, so that a busy machine does not
    matter.
    """

    class SlowSource(Scripted):
        def __iter__(self):
            for frame in super().__iter__():
                time.sleep(read_s)
                yield frame

    class SlowEngine(MockEngine):
        def run(self, feeds):
            time.sleep(engine_s)
            return super().run(feeds)

    run = Run()
    localizer = Localizer(SlowEngine(32, slots=2))
    list(run_frames(every_frame(SlowSource(10)), localizer, [Collector(write_s)], run, under_way=2))
    assert run.verdict == verdict
