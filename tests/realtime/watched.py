"""A live run that is watched from outside, and what must be true of every one."""

import threading
import time
from collections import Counter
from contextlib import closing

from engines.localizer import Localizer
from realtime.capture import Feed
from realtime.frame_queue import LATEST
from realtime.pipeline import Live, run_frames
from realtime.session import Session
from realtime.sources.video import SourceOptions
from realtime.statistics import LiveRun
from tests.engines.mock import MockEngine
from tests.realtime.cameras import number_in

PATIENCE_S = 30.0


class Watched:
    """A live run in a thread, as ``live.stream`` sets it up; keeps the rows of all records and what
    numbers were seen.
    """

    def __init__(self, *specs, policy=LATEST, engine=None, delay_s=0.0, stall_s=1.0):
        self.engine, self.delay_s = engine or MockEngine(32), delay_s
        localizer = Localizer(self.engine)
        self.notify, self.rows, self.numbers, self.sizes, self.error = [], [], [], [], None
        self.feed = Feed(
            specs, SourceOptions(stall_s=stall_s), policy, localizer.batch, self.notify.append
        )
        self.live_run = LiveRun([each.name for each in self.feed.connections])
        self.session = Session(
            self.feed.connections, self.live_run, localizer.class_names, stop=self.feed.stop
        )
        self._localizer = localizer
        self._thread = threading.Thread(target=self._run)

    needs_picture = False

    def write(self, record, picture):
        time.sleep(self.delay_s)
        self.rows.append(record.row())
        if record.outcome == "shown":
            self.numbers.append(number_in(record.frame.image_bgr))
            self.sizes.append(record.frame.image_bgr.shape[:2])

    def _run(self):
        live = Live(lambda: self.session.settings, self.feed.stop)
        try:
            with closing(
                run_frames(
                    self.feed.frames(),
                    self._localizer,
                    [self.session, self],
                    self.live_run,
                    live=live,
                )
            ) as loop:
                for _ in loop:
                    pass
        except Exception as error:
            self.error = error

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.session.stop()
        self.session.closed.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def wait_for(self, what):
        end = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < end, (self.notify, self.feed.connections)
            time.sleep(0.02)

    def shown(self, source=None):
        return [
            row
            for row in list(self.rows)
            if row["outcome"] == "shown" and source in (None, row["source"])
        ]

    def wait_for_more(self, frames=10, source=None):
        """So many more shown frames; seconds until they were there."""
        target, begin = len(self.shown(source)) + frames, time.monotonic()
        self.wait_for(lambda: len(self.shown(source)) >= target)
        return time.monotonic() - begin

    def check(self):
        """Every captured frame is in the ledger exactly once, by two counts that know nothing of
        each other.
        """
        summary = self.live_run.summary()
        captured = self.feed.captured
        assert Counter(row["source"] for row in self.rows) == Counter(
            {k: v for k, v in captured.items() if v}
        )
        for name, source in summary["sources"].items():
            assert source["frames"] + source["dropped"] + source["failed"] == captured[name]
            assert sum(source["causes"].values()) == source["dropped"] + source["failed"]
            indices = sorted(row["frame"] for row in self.rows if row["source"] == name)
            assert indices == list(range(captured[name])), "each once"
        assert not [t for t in threading.enumerate() if t.name.startswith(("read ", "engine"))]


def assert_no_frame_twice_and_none_invented(run):
    assert None not in run.numbers, (
        "every frame that was inferred is one that the camera sent, whole"
    )
    assert run.numbers == sorted(set(run.numbers)), "none twice, none out of order"
    pts_s = [row["pts_s"] for row in run.shown()]
    assert pts_s == sorted(set(pts_s)), "times go on through all connections"
