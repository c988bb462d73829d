"""What readers put into the loop: all frames or the newest, in order, and no more than fit."""

import threading
import time

import pytest

from engines.errors import SourceError
from engines.localizer import Localizer
from realtime.capture import Feed, every_frame, joined, latest_frames
from realtime.frame_queue import EVERY, READ_AHEAD_FRAMES
from realtime.pipeline import run_frames
from realtime.sources.video import SourceOptions
from realtime.statistics import Run
from tests.engines.mock import MockEngine
from tests.realtime.media import write_images
from tests.realtime.scripted import Collector, Scripted


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


@pytest.mark.parametrize("under_way", [1, 3])
def test_a_slow_sink_holds_the_reader_back(under_way):
    read, written, ahead = [], [], []

    class Counted(Scripted):
        def __iter__(self):
            for frame in super().__iter__():
                read.append(frame.index)
                yield frame

    class Slow(Collector):
        def write(self, record, picture):
            time.sleep(0.01)
            ahead.append(len(read) - len(written))
            written.append(record.frame.index)

    localizer = Localizer(MockEngine(32, slots=3))
    list(run_frames(every_frame(Counted(40)), localizer, [Slow()], Run(), under_way=under_way))
    assert written == list(range(40))
    most = (
        under_way + READ_AHEAD_FRAMES + 2
    )  # in the engine, waiting, in the reader's hand, being written
    assert max(ahead) <= most
    assert max(ahead) > under_way, "it does read ahead"


def test_a_file_plays_again_while_that_is_asked_for(tmp_path):
    folder, again = write_images(tmp_path / "photos", 3), [True, True, False]
    feed = Feed([str(folder)], SourceOptions(photos_fps=20.0), EVERY)
    feed.repeats = lambda: again.pop(0)
    frames = [each.record.frame for each in feed.frames()]
    assert [each.index for each in frames] == list(range(9))
    times_s = [each.pts_s for each in frames]
    assert times_s == sorted(times_s)
    (connection,) = feed.connections
    assert (connection.state, connection.reconnects, again) == ("ended", 0, [])


def test_neighbours_share_a_call_and_what_came_before_an_error_is_given():
    frames = list(joined(every_frame(Scripted(3))))
    assert [frame.record.frame.index for frame in frames] == [0, 1, 2]
    assert [frame.batch_with_next for frame in frames] == [True, True, False]
    broken, given = joined(every_frame(Scripted(2, error=SourceError("broken")))), []
    with pytest.raises(SourceError, match="broken"):
        given.extend(frame.record.frame.index for frame in broken)
    assert given == [0, 1]
