"""Live runs with real parts: a real RTSP server that dies, stalls and changes size; several
sources; the ledger.
"""

import http.server
import threading
import time

import cv2
import pytest

from engines.errors import EngineError
from realtime.frame_queue import Policy
from tests.engines.mock import MockEngine
from tests.realtime.media import picture, web_server, write_video
from tests.realtime.watched import PATIENCE_S, Watched, assert_no_frame_twice_and_none_invented


def test_a_camera_that_dies_comes_back_with_another_size(rtsp_camera):
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
    assert any("trying again" in line for line in run.notify)


def test_a_camera_that_stalls_is_opened_again(rtsp_camera):
    rtsp_camera.start()
    with Watched(rtsp_camera.address) as run:
        run.wait_for_more(20)
        rtsp_camera.stop()
        run.wait_for(lambda: run.feed.connections[0].state == "waiting")
        assert "nothing came for 1 s" in run.feed.connections[0].trouble, (
            "noticed in time, not when FFmpeg gives up"
        )
        rtsp_camera.go_on()
        run.wait_for_more(20)
    assert_no_frame_twice_and_none_invented(run)
    run.check()


def test_a_camera_that_hangs_from_the_start_is_opened_when_it_answers(rtsp_camera, tmp_path):
    rtsp_camera.start()
    rtsp_camera.stop()
    with Watched(rtsp_camera.address, str(write_video(tmp_path / "clip.mp4", 500))) as run:
        run.wait_for(lambda: run.feed.connections[0].state == "waiting")
        assert "no answer within 5 s" in run.feed.connections[0].trouble
        assert run.shown("clip")
        rtsp_camera.go_on()
        run.wait_for_more(10, "clock")
    run.check()


def test_one_dead_camera_leaves_the_rest_running(rtsp_camera, tmp_path):
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


def test_a_file_that_is_not_there_is_a_mistake_whatever_else_runs(rtsp_camera, tmp_path):
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
            run.live_run.add(record)
    assert "the engine broke" in str(run.error)
    assert run.live_run.summary()["failed"] == 1
    run.check()


def test_a_frame_that_cannot_be_used_fails_alone(tmp_path):
    video = str(write_video(tmp_path / "tiny.mp4", 10, width=48, height=4))
    with Watched(
        video, str(write_video(tmp_path / "clip.mp4", 10)), engine=MockEngine(32, batch=2)
    ) as run:
        run._thread.join(PATIENCE_S)
    assert run.error is None
    summary = run.live_run.summary()["sources"]
    assert (summary["tiny"]["frames"], summary["tiny"]["failed"] + summary["tiny"]["dropped"]) == (
        0,
        10,
    )
    assert summary["clip"]["frames"] > 0
    assert any("at least 8 a side" in cause for cause in summary["tiny"]["causes"])
    run.check()


class Motion(http.server.BaseHTTPRequestHandler):
    """A camera as many sell them: JPEGs one after the other, without end; every connection breaks
    off after a second.
    """

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
