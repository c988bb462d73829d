"""Live runs with real parts: a real RTSP server that dies, stalls and changes size; several sources; the ledger."""

import threading
import time
from collections import Counter
from contextlib import closing

import pytest

from engines.backends.mock import MockEngine
from engines.localizer import Localizer
from realtime.hub import Hub
from realtime.inbox import LATEST, Policy
from realtime.ledger import Ledger
from realtime.pipeline import Live, run_frames
from realtime.readers import Feed
from realtime.video import SourceOptions
from tests.realtime.cameras import number_in, rtsp_camera  # noqa: F401  (a fixture)
from tests.realtime.media import write_video

PATIENCE_S = 30.0


class Watched:
    """A live run in a thread, as ``live.stream`` sets it up; keeps the rows of all records and what numbers were seen."""

    def __init__(self, *specs, policy=LATEST, engine=None, delay_s=0.0, stall_s=1.0):
        self.engine, self.delay_s = engine or MockEngine(32), delay_s
        localizer = Localizer(self.engine)
        self.told, self.rows, self.numbers, self.sizes, self.error = [], [], [], [], None
        self.feed = Feed(specs, SourceOptions(stall_s=stall_s), policy, localizer.batch, self.told.append)
        self.ledger = Ledger([each.name for each in self.feed.connections])
        self.hub = Hub(self.feed.connections, self.ledger, localizer.class_names, stop=self.feed.stop)
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
        live = Live(lambda: self.hub.settings, lambda: self.feed.ready)
        try:
            with closing(run_frames(self.feed.records(), self._localizer, [self.hub, self], self.ledger, live=live)) as loop:
                for _ in loop:
                    pass
        except Exception as error:
            self.error = error

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.hub.stop()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def wait_for(self, what):
        end = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < end, (self.told, self.feed.connections)
            time.sleep(0.02)

    def shown(self, source=None):
        return [row for row in list(self.rows) if row["outcome"] == "shown" and source in (None, row["source"])]

    def wait_for_more(self, frames=10, source=None):
        """So many more shown frames; seconds until they were there."""
        target, begin = len(self.shown(source)) + frames, time.monotonic()
        self.wait_for(lambda: len(self.shown(source)) >= target)
        return time.monotonic() - begin

    def check(self):
        """Every captured frame is in the ledger exactly once, by two counts that know nothing of each other."""
        summary = self.ledger.summary()
        captured = self.feed.captured
        assert Counter(row["source"] for row in self.rows) == Counter({k: v for k, v in captured.items() if v})
        for name, source in summary["sources"].items():
            assert source["frames"] + source["dropped"] + source["failed"] == captured[name]
            assert sum(source["causes"].values()) == source["dropped"] + source["failed"]
            indices = sorted(row["frame"] for row in self.rows if row["source"] == name)
            assert indices == list(range(captured[name])), "each once"
        assert not [t for t in threading.enumerate() if t.name.startswith("read ")]


def assert_no_frame_twice_and_none_invented(run):
    assert None not in run.numbers, "every frame that was inferred is one that the camera sent, whole"
    assert run.numbers == sorted(set(run.numbers)), "none twice, none out of order"
    pts_s = [row["pts_s"] for row in run.shown()]
    assert pts_s == sorted(set(pts_s)), "times go on through all connections"


def test_a_camera_that_dies_comes_back_with_another_size(rtsp_camera):  # noqa: F811
    rtsp_camera.start(320, 240)
    with Watched(rtsp_camera.address) as run:
        run.wait_for_more(20)
        rtsp_camera.kill()
        run.wait_for(lambda: run.feed.connections[0].state == "waiting")
        rtsp_camera.start(480, 360)
        run.wait_for_more(20)
        connection = run.feed.connections[0]
        assert (connection.state, connection.width_px, connection.height_px) == ("live", 480, 360)
        assert connection.reconnects == 1
    assert set(run.sizes) == {(240, 320), (360, 480)}
    assert_no_frame_twice_and_none_invented(run)
    run.check()
    assert any("trying again" in line for line in run.told)


def test_a_camera_that_stalls_is_opened_again(rtsp_camera):  # noqa: F811
    rtsp_camera.start()
    with Watched(rtsp_camera.address) as run:
        run.wait_for_more(20)
        rtsp_camera.stop()
        run.wait_for(lambda: run.feed.connections[0].state == "waiting")
        assert "nothing came for too long" in run.feed.connections[0].trouble
        rtsp_camera.go_on()
        run.wait_for_more(20)
    assert_no_frame_twice_and_none_invented(run)
    run.check()


def test_one_dead_camera_leaves_the_rest_running(rtsp_camera, tmp_path):  # noqa: F811
    rtsp_camera.start()
    video = write_video(tmp_path / "clip.mp4", 25)
    with Watched(rtsp_camera.address, "rtsp://127.0.0.1:9/none", str(video)) as run:
        run.wait_for_more(10, "clock")
        run.wait_for(lambda: run.feed.connections[2].state == "ended")
        rtsp_camera.kill()
        run.wait_for(lambda: run.feed.connections[0].state == "waiting")
        rtsp_camera.start()
        run.wait_for_more(10, "clock")
        assert [each.state for each in run.feed.connections] == ["live", "waiting", "ended"]
    run.check()
    assert run.feed.captured["clip"] == 25
    assert run.feed.captured["none"] == 0


def test_when_nothing_can_be_opened_the_run_ends_with_the_reason():
    with Watched("rtsp://user:secret@127.0.0.1:9/none", "99") as run:
        run._thread.join(PATIENCE_S)
        assert "cannot" in str(run.error)
        assert "secret" not in str(run.error)
    run.check()


def test_a_file_that_is_not_there_is_a_mistake_whatever_else_runs(rtsp_camera, tmp_path):  # noqa: F811
    rtsp_camera.start()
    with Watched(rtsp_camera.address, str(tmp_path / "nothing.mp4")) as run:
        run._thread.join(PATIENCE_S)
        assert "does not exist" in str(run.error)
    run.check()


class Slow(MockEngine):
    """Too slow for 50 frames a second one by one."""

    def run(self, feeds):
        time.sleep(0.03)
        return super().run(feeds)


@pytest.mark.parametrize("batch", [1, 3])
def test_frames_of_several_cameras_share_calls_and_a_slow_one_is_not_waited_for(tmp_path, batch):
    quick = [str(write_video(tmp_path / f"{name}.mp4", 30)) for name in "ab"]
    slow = str(write_video(tmp_path / "slow.mp4", 3, pts=[0, 15, 30]))
    engine = Slow(32, batch=batch)
    with Watched(*quick, slow, engine=engine, policy=Policy("every")) as run:
        run._thread.join(PATIENCE_S)
    assert run.error is None
    run.check()
    assert [len(run.shown(name)) for name in ("a", "b", "slow")] == [30, 30, 3]
    assert engine.calls == 63 if batch == 1 else 31 <= engine.calls < 60


def test_frames_older_than_their_age_are_dropped(tmp_path):
    video = str(write_video(tmp_path / "clip.mp4", 50))
    with Watched(video, policy=Policy.of("max-age 100"), delay_s=0.06) as run:
        run._thread.join(PATIENCE_S)
    run.check()
    causes = run.ledger.summary()["causes"]
    assert causes["older than 100 ms"] > 5
    assert set(causes) == {"older than 100 ms"}
    assert max(row["wait_ms"] for row in run.shown()) < 100
