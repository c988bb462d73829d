"""Live runs with real parts: a real RTSP server that dies, stalls and changes size; several sources; the ledger."""

import http.server
import threading
import time
from array import array
from collections import Counter
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest

from engines.backends.mock import MockEngine
from engines.base import EngineError, ModelError, SourceError
from engines.localizer import Localizer
from realtime import connection
from realtime.frames import Frame
from realtime.hub import Hub
from realtime.inbox import LATEST, Policy
from realtime.ledger import Ledger
from realtime.pipeline import Live, run_frames
from realtime.readers import Feed
from realtime.video import Source, SourceOptions
from tests.realtime.cameras import number_in, rtsp_camera  # noqa: F401  (a fixture)
from tests.realtime.media import picture, web_server, write_video

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
        live = Live(lambda: self.hub.settings, self.feed.stop)
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
        self.hub.closed.set()
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
        assert not [t for t in threading.enumerate() if t.name.startswith(("read ", "engine"))]


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
        assert "nothing came for 1 s" in run.feed.connections[0].trouble, "noticed in time, not when FFmpeg gives up"
        rtsp_camera.go_on()
        run.wait_for_more(20)
    assert_no_frame_twice_and_none_invented(run)
    run.check()


def test_a_camera_that_hangs_from_the_start_is_opened_when_it_answers(rtsp_camera, tmp_path):  # noqa: F811
    rtsp_camera.start()
    rtsp_camera.stop()
    with Watched(rtsp_camera.address, str(write_video(tmp_path / "clip.mp4", 500))) as run:
        run.wait_for(lambda: run.feed.connections[0].state == "waiting")
        assert "no answer within 5 s" in run.feed.connections[0].trouble
        assert run.shown("clip")
        rtsp_camera.go_on()
        run.wait_for_more(10, "clock")
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


def test_a_file_on_a_web_server_plays_once_and_a_broken_off_one_is_not_begun_again(tmp_path):
    write_video(tmp_path / "clip.mp4", 10)
    whole = write_video(tmp_path / "whole.avi", 150, codec="mpeg4").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    with web_server(tmp_path) as address:
        with Watched(f"{address}/clip.mp4") as run:
            run._thread.join(PATIENCE_S)
        assert run.error is None
        assert run.feed.captured["clip"] == 10
        run.check()
        with Watched(f"{address}/cut.avi") as run:
            run._thread.join(PATIENCE_S)
        assert "cut off" in str(run.error) or "damaged" in str(run.error)
        run.check()


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
    assert engine.calls == 63 if batch == 1 else 30 <= engine.calls < 60


def test_frames_older_than_their_age_are_dropped(tmp_path):
    video = str(write_video(tmp_path / "clip.mp4", 50))
    with Watched(video, policy=Policy.of("max-age 100"), delay_s=0.06) as run:
        run._thread.join(PATIENCE_S)
    run.check()
    causes = run.ledger.summary()["causes"]
    assert causes["older than 100 ms"] > 5
    assert set(causes) == {"older than 100 ms"}
    assert np.median([row["wait_ms"] for row in run.shown()]) < 100


def test_max_age_keeps_order_and_every_drops_nothing(tmp_path):
    video = str(write_video(tmp_path / "clip.mp4", 25))
    with Watched(video, policy=Policy.of("every"), delay_s=0.05) as run:
        run._thread.join(PATIENCE_S)
    run.check()
    assert [row["frame"] for row in run.shown()] == list(range(25))


@pytest.mark.parametrize("text", ["newest", "max-age", "max-age 0", "max-age x", ""])
def test_an_unknown_policy_is_a_mistake(text):
    with pytest.raises(SourceError, match="write latest, every"):
        Policy.of(text)


def test_a_run_that_is_stopped_accounts_for_what_was_waiting(tmp_path):
    video = str(write_video(tmp_path / "clip.mp4", 250))
    with Watched(video, policy=Policy.of("every"), delay_s=0.1) as run:
        run.wait_for_more(5)
    run.check()
    assert run.error is None
    assert run.ledger.summary()["causes"].get("the run ended", 0) >= 1


class Breaks(MockEngine):
    def run(self, feeds):
        if self.calls > 10:
            raise EngineError("the engine broke")
        time.sleep(0.03)
        return super().run(feeds)


def test_when_the_engine_breaks_every_frame_still_ends_once(tmp_path):
    video = str(write_video(tmp_path / "clip.mp4", 100))
    with Watched(video, engine=Breaks(32)) as run:
        run._thread.join(PATIENCE_S)
        for record in run.feed.left():
            run.write(record, None)
            run.ledger.add(record)
    assert "the engine broke" in str(run.error)
    assert run.ledger.summary()["failed"] == 1
    run.check()


def test_a_frame_that_cannot_be_used_fails_alone(tmp_path):
    video = str(write_video(tmp_path / "tiny.mp4", 10, width=48, height=4))
    with Watched(video, str(write_video(tmp_path / "clip.mp4", 10)), engine=MockEngine(32, batch=2)) as run:
        run._thread.join(PATIENCE_S)
    assert run.error is None
    summary = run.ledger.summary()["sources"]
    assert (summary["tiny"]["frames"], summary["tiny"]["failed"] + summary["tiny"]["dropped"]) == (0, 10)
    assert summary["clip"]["frames"] > 0
    assert any("at least 8 a side" in cause for cause in summary["tiny"]["causes"])
    run.check()


def test_what_is_looked_for_and_drawn_changes_while_it_runs(tmp_path):
    video = str(write_video(tmp_path / "clip.mp4", 500))
    with Watched(video) as run:
        assert run.hub.needs_picture is False
        first = run.hub.wait_newer("clip")
        assert first.record.found.class_name == "thing"
        run.hub.look_for("other")
        run.hub.change(heat_map="off")
        later = run.hub.wait_newer("clip", first.number + 3)
        assert later.record.found.class_name == "other"
        corner = (slice(-24, -6), slice(-32, -6))
        assert first.picture[corner].std() > 5
        assert later.picture[corner].std() < 3, "the heat map is gone"
        assert run.hub.snapshot("clip")[:2] == b"\xff\xd8"
        with pytest.raises(ModelError, match="unknown to this network"):
            run.hub.look_for("yeti")
        with pytest.raises(ValueError, match="from 0 to 1"):
            run.hub.change(alpha=2)
        run.hub.look_for(None)
        assert run.hub.wait_newer("clip", run.hub.newest("clip").number + 3).record.found.class_name == "thing"
        assert run.hub.rolling()["sources"]["clip"]["fps"] > 0
    assert run.hub.wait_newer("clip", 10**6, timeout_s=60) is None, "nothing comes after the end, and nobody waits for it"


class Motion(http.server.BaseHTTPRequestHandler):
    """A camera as many sell them: JPEGs one after the other, without end; every connection breaks off after a second."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for index in range(25):
            jpeg = cv2.imencode(".jpg", picture(index))[1].tobytes()
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n".encode()
            self.wfile.write(head + jpeg + b"\r\n")
            time.sleep(0.04)

    def log_message(self, *_):
        pass


def test_a_camera_that_speaks_http_is_opened_again_and_again():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Motion) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Watched(f"http://127.0.0.1:{server.server_address[1]}/video") as run:
            run.wait_for(lambda: run.feed.connections[0].reconnects >= 2 and run.shown())
        server.shutdown()
    run.check()
    assert run.feed.connections[0].width_px == 128
    pts_s = [row["pts_s"] for row in run.shown()]
    assert pts_s == sorted(set(pts_s))


class Hasty(Source):
    """A camera that gives a frame every ``gap_s`` or so."""

    name, live = "hasty", True

    def __init__(self, frames, gap_s):
        self._count, self._gap_s = frames, gap_s

    def __iter__(self):
        for index in range(self._count):
            image = np.full((480, 640, 3), index % 256, np.uint8)
            yield Frame(image, self.name, index, index * self._gap_s, time.monotonic_ns(), 0.1)
            time.sleep(self._gap_s)
        threading.Event().wait(0.2)
        raise SourceError("the cable is out")


def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.long
@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    ("policy", "frames", "gap_s", "engine_s"),
    [("latest", 20_000, 0.001, 0.004), ("max-age 50", 20_000, 0.001, 0.004), ("latest", 30_000, 0.02, 0.045)],
    ids=["20,000 frames", "20,000 frames, max-age", "10 minutes"],
)
def test_a_source_faster_than_the_engine_costs_neither_age_nor_memory(monkeypatch, policy, frames, gap_s, engine_s):
    ages_ms, resident, drawn = array("d"), [], []

    class Light(Watched):
        needs_picture = True

        def write(self, record, picture):
            ages_ms.append(record.total_ms or (time.monotonic_ns() - record.frame.captured_ns) / 1e6)
            drawn.append(picture.shape)
            if len(ages_ms) % 100 == 0:
                resident.append(resident_mb())

    class Engine(MockEngine):
        def run(self, feeds):
            time.sleep(engine_s)
            return super().run(feeds)

    monkeypatch.setattr(connection, "open_source", lambda *_: Hasty(frames, gap_s))
    with Light("0", policy=Policy.of(policy), engine=Engine(32)) as run:
        end = time.monotonic() + 900
        while run.feed.captured["camera0"] < frames and time.monotonic() < end:
            time.sleep(0.2)
    assert run.feed.captured["camera0"] >= frames
    summary = run.ledger.summary()
    print({k: summary[k] for k in ("fps", "frames", "dropped", "age_ms")})
    print("resident MB:", [round(mb) for mb in resident[:: max(1, len(resident) // 10)]])
    assert summary["frames"] + summary["dropped"] == run.feed.captured["camera0"]
    assert summary["dropped"] > summary["frames"]
    quarter = len(ages_ms) // 4
    assert np.median(ages_ms[-quarter:]) < 2 * np.median(ages_ms[:quarter]) + 10, "age does not grow"
    assert max(resident[len(resident) // 4 :]) - resident[len(resident) // 4] < 15, "nor does memory"
