"""A connection that hangs is left behind; what it brings later does not count."""

import threading
import time

import pytest

from engines.errors import SourceError
from realtime import capture as connection
from realtime.capture import Attempt, Connection, Series
from realtime.frame_queue import EVERY, FrameQueue
from realtime.frames import Frame
from realtime.sources.video import Source, SourceOptions
from tests.realtime.media import picture

PATIENCE_S = 20.0


def frame(index):
    return Frame(picture(index), "cam", index, index / 25, time.monotonic_ns(), 0.1)


class Hanging(Source):
    """Gives a frame, then hangs until it is let go, then gives another."""

    live = True

    def __init__(self):
        self.let_go, self.closed = threading.Event(), threading.Event()

    def __iter__(self):
        yield frame(0)
        self.let_go.wait(PATIENCE_S)
        yield frame(1)

    def close(self):
        self.closed.set()


@pytest.fixture
def series():
    return Series(Connection("cam", "rtsp://cam"), FrameQueue(EVERY), 0)


def test_a_source_that_hangs_is_left_behind_and_its_late_frame_does_not_count(monkeypatch, series):
    source = Hanging()
    monkeypatch.setattr(connection, "open_source", lambda *_: source)
    with pytest.raises(SourceError, match=r"rtsp://cam: nothing came for 0\.3 s"):
        Attempt("rtsp://cam", SourceOptions(stall_s=0.3), series).run()
    assert not source.closed.is_set()
    source.let_go.set()
    assert source.closed.wait(PATIENCE_S), "its own thread closes it"
    assert series.frame_queue.captured == [1]


def test_opening_may_hang_too(monkeypatch, series):
    let_go = threading.Event()
    monkeypatch.setattr(connection, "OPENING_S", 0.3)
    monkeypatch.setattr(connection, "open_source", lambda *_: let_go.wait(PATIENCE_S) and Hanging())
    with pytest.raises(SourceError, match="nothing came"):
        Attempt("rtsp://cam", SourceOptions(stall_s=0.3), series).run()
    let_go.set()
    assert series.frame_queue.captured == [0]


def test_a_source_that_is_heard_is_waited_for_and_so_is_the_taker(monkeypatch, series):
    class Dull(Source):
        """Much comes, of which one frame in a while can be decoded."""

        live = True

        def __iter__(self):
            for index in range(4):
                for _ in range(12):
                    time.sleep(0.05)
                    self.heard_s = time.monotonic()
                yield frame(index)

    monkeypatch.setattr(connection, "open_source", lambda *_: Dull())
    taken = []

    def take():
        for each in series.frame_queue.frames():
            time.sleep(0.7)
            taken.append(each.record.frame.index)

    taker = threading.Thread(target=take)
    taker.start()
    Attempt("rtsp://cam", SourceOptions(stall_s=0.5), series).run()
    series.frame_queue.end(None)
    taker.join(PATIENCE_S)
    assert taken == [0, 1, 2, 3]


def test_the_end_of_the_run_does_not_wait_for_what_hangs(monkeypatch, series):
    source = Hanging()
    monkeypatch.setattr(connection, "open_source", lambda *_: source)
    monkeypatch.setattr(connection, "LEAVE_S", 0.2)
    attempt = threading.Thread(
        target=Attempt("rtsp://cam", SourceOptions(stall_s=1000), series).run
    )
    attempt.start()
    series.frame_queue.close()
    attempt.join(PATIENCE_S)
    assert not attempt.is_alive()
    source.let_go.set()
