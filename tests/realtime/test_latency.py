"""What a run sums up, and which stage it names as the one that holds the others up."""

import time

import pytest

from engines.backends.mock import MockEngine
from engines.localizer import Localizer
from realtime.latency import Run
from realtime.pipeline import run_frames
from realtime.readers import every_frame
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
    assert summary["verdict"] in ("source-limited", "engine-limited", "sink-limited")


def test_a_run_may_have_several_passes(localizer):
    run, passes_s = Run(), 0.0
    for _ in range(3):
        begin_s = time.monotonic()
        list(run_frames(every_frame(Scripted(10)), localizer, [Collector(0.01)], run))
        passes_s += time.monotonic() - begin_s
        time.sleep(0.2)
    assert run.summary()["frames"] == 30
    assert run.fps >= 30 / passes_s, "time between passes does not count"
    assert run.verdict == "sink-limited"


@pytest.mark.parametrize(
    ("read_s", "engine_s", "write_s", "verdict"),
    [(0.02, 0, 0, "source-limited"), (0, 0.02, 0, "engine-limited"), (0, 0, 0.02, "sink-limited")],
)
def test_the_verdict_names_what_holds_the_others_up(read_s, engine_s, write_s, verdict):
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
    list(run_frames(every_frame(SlowSource(15)), localizer, [Collector(write_s)], run, under_way=2))
    assert run.verdict == verdict
