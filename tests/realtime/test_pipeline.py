"""The frame loop with a mock engine: order, accounting, timing, policies."""

import json
import threading
import time

import numpy as np
import pytest

from engines.backends.mock import MockEngine
from engines.base import OutputError, SourceError
from engines.localizer import Localizer
from realtime.frames import Frame
from realtime.latency import Run
from realtime.pipeline import every_frame, latest_frames, run_frames
from realtime.sinks import JsonlSink
from realtime.sources import Source
from tests.realtime.media import picture


class Scripted(Source):
    """Frames of a moving square, ``gap_s`` apart in presentation time; may break at the end."""

    name = "scripted"

    def __init__(self, frames=8, gap_s=0.0, error=None):
        self.frames, self._gap_s, self._error = frames, gap_s, error

    def __iter__(self):
        for index in range(self.frames):
            yield Frame(picture(index), self.name, index, index * self._gap_s, time.monotonic_ns(), 0.5)
        if self._error:
            raise self._error


class Collector:
    needs_picture = True

    def __init__(self, delay_s=0.0):
        self.records, self.pictures, self.delay_s = [], [], delay_s

    def write(self, record, picture):
        time.sleep(self.delay_s)
        self.records.append(record.frame.index)
        self.pictures.append(picture)


@pytest.fixture
def localizer():
    return Localizer(MockEngine(96))


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
        "source", "frame", "pts_s", "captured_ns", "outcome", "cause", "class_id", "class_name", "score",
        "x0", "y0", "x1", "y1", "read_ms", "prepare_ms", "engine_ms", "draw_ms", "write_ms", "total_ms",
    }  # fmt: skip
    for row in rows:
        assert required <= set(row)
        parts = sum(row[f"{stage}_ms"] for stage in ("read", "prepare", "engine", "draw", "write"))
        assert parts <= row["total_ms"] + 0.01
        assert row["read_ms"] == 0.5


def test_the_picture_is_a_copy(localizer):
    frames = []

    def keep():
        for record in every_frame(Scripted(2)):
            frames.append(record.frame.image_bgr)
            yield record

    list(run_frames(keep(), localizer, [Collector()], Run()))
    np.testing.assert_array_equal(frames[1], picture(1))


def test_without_a_sink_that_wants_pictures_nothing_is_drawn(localizer):
    records = list(run_frames(every_frame(Scripted(2)), localizer, [], Run()))
    assert "draw" not in records[0].stages_ms


def test_latest_skips_what_it_cannot_keep_up_with_and_accounts_for_all(localizer):
    source, run = Scripted(40, gap_s=0.01), Run()
    collector = Collector(delay_s=0.03)
    records = list(run_frames(latest_frames(source, paced=True), localizer, [collector], run))
    assert sorted(r.frame.index for r in records) == list(range(40))
    assert run.outcomes["shown"] + run.outcomes["dropped"] == 40
    assert run.outcomes["dropped"] > 5
    assert collector.records[-1] == 39, "the newest frame is always shown"
    assert all(r.cause for r in records if r.outcome == "dropped")


def test_a_paced_file_takes_as_long_as_it_lasts(localizer):
    start = time.monotonic()
    list(run_frames(latest_frames(Scripted(11, gap_s=0.03), paced=True), localizer, [], Run()))
    assert time.monotonic() - start >= 0.3


def test_an_error_of_the_source_comes_after_its_frames(localizer):
    source = Scripted(3, error=SourceError("the cable is out"))
    run = Run()
    with pytest.raises(SourceError, match="the cable is out"):
        list(run_frames(latest_frames(source, paced=False), localizer, [Collector()], run))
    assert run.outcomes["shown"] + run.outcomes["dropped"] == 3


def test_leaving_early_ends_the_reader(localizer):
    records = latest_frames(Scripted(1000, gap_s=0.01), paced=True)
    next(records)
    records.close()
    assert not [t for t in threading.enumerate() if t.name == "read scripted"]


def test_a_failing_sink_stops_the_run(localizer):
    class Full(Collector):
        def write(self, record, picture):
            raise OutputError("disk full")

    with pytest.raises(OutputError, match="disk full"):
        list(run_frames(every_frame(Scripted()), localizer, [Full()], Run()))


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
