"""What is lost of a stream on its way, with real streams that lack some of their packets."""

import http.server
import io
import threading
from contextlib import contextmanager, suppress

import av
import cv2
import numpy as np
import pytest

from engines.errors import SourceError
from realtime.sources.spec import open_source
from realtime.sources.video import VideoFile
from tests.virtual_camera import DemoCamera

TS_BYTES = 188
FRAMES, KEY_EVERY = 75, 15
CAMERA = DemoCamera(FRAMES)


def shot(index):
    return cv2.resize(CAMERA.shoot(index)[0], (320, 240), interpolation=cv2.INTER_AREA)


def transport_stream(options):
    """H.264 in an MPEG transport stream, as bytes."""
    out = io.BytesIO()
    with av.open(out, "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = (
            320,
            240,
            "yuv420p",
            KEY_EVERY,
        )
        for index in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shot(index), format="bgr24")))
        container.mux(stream.encode(None))
    return out.getvalue()


@contextmanager
def served(content, kind):
    """The address of a server that sends it without telling how long it is, as cameras do."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/cam"
        server.shutdown()


def frames_of(content, kind):
    with (
        served(content, kind) as address,
        VideoFile(address) as source,
        suppress(SourceError),
    ):  # at its end it breaks off
        assert source.live
        got = []
        for frame in source:
            got.append(frame)
    return got


@pytest.mark.parametrize("lost", [1, 40])
@pytest.mark.parametrize(
    "options",
    [
        {"preset": "ultrafast", "tune": "zerolatency", "threads": "4"},
        {"preset": "veryfast", "bf": "0"},
        {"preset": "fast", "bf": "2"},
    ],
    ids=["slices", "whole pictures", "pictures out of order"],
)
def test_no_picture_that_lost_something_passes_for_whole(options, lost):
    stream = transport_stream(options)
    clean = {
        round(frame.pts_s * 25): frame.image_bgr.astype(int)
        for frame in frames_of(stream, "video/mp2t")
    }
    assert len(clean) >= FRAMES - 2
    packets = [stream[i : i + TS_BYTES] for i in range(0, len(stream), TS_BYTES)]
    at = len(packets) // 3
    got = frames_of(b"".join(packets[:at] + packets[at + lost :]), "video/mp2t")
    spoilt = [
        frame
        for frame in got
        if np.abs(frame.image_bgr - clean[round(frame.pts_s * 25)]).max() > 16
    ]
    assert len(spoilt) > 3, "a loss spreads"
    assert all(frame.damaged for frame in spoilt)
    assert sum(frame.damaged for frame in got) <= 2 * KEY_EVERY + 2, "until the next key picture"
    assert not got[-1].damaged


def test_half_a_jpeg_is_no_frame():
    whole = [cv2.imencode(".jpg", shot(index))[1].tobytes() for index in range(3)]
    parts = [whole[0], whole[1][: len(whole[1]) // 2], whole[2]]
    heads = [
        b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(part)
        for part in parts
    ]
    body = b"".join(head + part + b"\r\n" for head, part in zip(heads, parts, strict=True))
    got = frames_of(body, "multipart/x-mixed-replace; boundary=frame")
    assert [
        int(np.abs(frame.image_bgr.astype(int) - shot(index)).mean()) < 5
        for frame, index in zip(got, (0, 2), strict=True)
    ]


def test_a_file_that_lost_something_is_an_error_or_read_as_it_is(tmp_path):
    stream = transport_stream({"preset": "veryfast"})
    (tmp_path / "cut.ts").write_bytes(stream[: TS_BYTES * 40] + stream[TS_BYTES * 43 :])
    with open_source(str(tmp_path / "cut.ts")) as source:
        assert not any(frame.damaged for frame in source)
