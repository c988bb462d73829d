"""Web cameras as they are: wrong lengths, wrong boundaries, single pictures, passwords."""

import base64
import http.server
import itertools
import threading
import time
from contextlib import contextmanager, suppress

import cv2
import numpy as np
import pytest

from engines.errors import SourceError
from realtime.sources import web_camera
from realtime.sources.spec import open_source
from realtime.sources.video import SourceOptions, VideoFile
from realtime.sources.web_camera import MOST_BYTES, JpegSplitter
from tests.realtime.media import picture, write_video


def jpeg(index, *parameters):
    return cv2.imencode(".jpg", picture(index), list(parameters))[1].tobytes()


JPEGS = [jpeg(index) for index in range(8)]


def with_thumbnail(content):
    """The picture with a smaller one inside, as cameras' EXIF data has."""
    small = cv2.imencode(".jpg", picture(0)[:32, :32])[1].tobytes()
    return content[:2] + b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small + content[2:]


@contextmanager
def serving(answer):
    """The address of a server on loopback; ``answer`` writes what its handler is asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with suppress(OSError):
                answer(self)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def head(handler, kind, **more):
    handler.send_response(200)
    handler.send_header("Content-Type", kind)
    for name, value in more.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def stream(parts, kind="multipart/x-mixed-replace; boundary=frame", chunked=False, **more):
    def answer(handler):
        handler.protocol_version = "HTTP/1.1" if chunked else "HTTP/1.0"
        head(handler, kind, **({"Transfer_Encoding": "chunked"} if chunked else {}), **more)
        for part in parts:
            pieces = [part[at : at + 700] for at in range(0, len(part), 700)] if chunked else [part]
            for piece in pieces:
                handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            handler.wfile.flush()
        handler.wfile.write(b"0\r\n\r\n" if chunked else b"")

    return answer


def part(
    content,
    before=b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n",
    behind=b"\r\n",
    wrong=0,
):
    return (before % (len(content) + wrong) if b"%d" in before else before) + content + behind


STREAMS = {
    "right": [part(each) for each in JPEGS],
    "wrong length": [
        part(each, wrong=37 if index % 2 else -20) for index, each in enumerate(JPEGS)
    ],
    "no length": [part(each, b"--frame\r\nContent-Type: image/jpeg\r\n\r\n") for each in JPEGS],
    "another boundary": [
        part(each, b"--other\r\ncontent-type: image/jpeg\r\n\r\n") for each in JPEGS
    ],
    "no dashes, lower case": [
        part(each, b"frame\ncontent-type:image/jpeg\ncontent-length:%d\n\n", b"") for each in JPEGS
    ],
    "more empty lines": [
        part(each, b"\r\n\r\n--frame\r\n\r\nContent-Type: image/jpeg\r\n\r\n\r\n") for each in JPEGS
    ],
    "garbage": [part(each, behind=b"\xff\xd8 \xff\x00garbage\xff\xd9\r\n") for each in JPEGS],
    "thumbnails": [part(with_thumbnail(each)) for each in JPEGS],
    "nothing between": JPEGS,
    "several scans": [part(jpeg(index, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)) for index in range(8)],
}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("kind", STREAMS)
def test_every_picture_of_a_stream_comes(kind, chunked):
    with (
        serving(stream(STREAMS[kind], chunked=chunked)) as address,
        open_source(f"{address}/video") as source,
    ):
        assert source.live
        found = list(source)
    assert [frame.index for frame in found] == list(range(8))
    for index, frame in enumerate(found):
        assert np.abs(frame.image_bgr.astype(int) - picture(index)).mean() < 4


def test_half_a_picture_is_left_out():
    parts = [
        part(each[: len(each) // 2] if index == 3 else each) for index, each in enumerate(JPEGS)
    ]
    with serving(stream(parts)) as address, open_source(address) as source:
        assert len(list(source)) == 7


def test_pictures_of_another_name_and_a_wrong_total_length_are_a_stream_too():
    for kind, more in (
        ("application/octet-stream", {}),
        ("multipart/x-mixed-replace", {"Content_Length": "50"}),
    ):
        with serving(stream(JPEGS, kind, **more)) as address, open_source(address) as source:
            assert len(list(source)) == 8


def test_the_splitter_finds_the_same_however_the_bytes_come():
    content = b"".join(STREAMS["garbage"] + STREAMS["thumbnails"])
    for size in (1, 7, 1000, len(content)):
        splitter = JpegSplitter()
        found = [
            each
            for at in range(0, len(content), size)
            for each in splitter.feed(content[at : at + size])
        ]
        assert found == JPEGS + [with_thumbnail(each) for each in JPEGS]


def test_a_picture_without_end_is_an_error():
    splitter, block = JpegSplitter(), b"\x55" * 2**20
    assert list(splitter.feed(JPEGS[0][:-2])) == []
    for _ in range(MOST_BYTES // 2**20 - 1):
        assert list(splitter.feed(block)) == []
    with pytest.raises(SourceError, match="does not end"):
        list(splitter.feed(block + block))


def test_an_address_of_one_picture_is_asked_again(monkeypatch):
    """Three different pictures, one of them twice, and once "it is the same": three frames."""
    asked = []

    def answer(handler):
        asked.append(handler.headers["If-None-Match"])
        number = len(asked)
        if number == 3:
            handler.send_response(304)
            handler.end_headers()
            return
        head(handler, "image/jpeg", ETag=f'"{number}"')
        handler.wfile.write(JPEGS[{1: 0, 2: 0, 4: 1}.get(number, 2)])

    monkeypatch.setattr(web_camera, "POLL_S", 0.01)
    with serving(answer) as address, open_source(f"{address}/snap.jpg") as source:
        found = list(itertools.islice(source, 3))
        assert source.notes == ["answers with one picture: it is asked again every 0.01 s"]
    assert [frame.index for frame in found] == [0, 1, 2]
    assert asked[:5] == [None, '"1"', '"2"', '"2"', '"4"']


@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_one_picture_may_be_enough(ending):
    content = cv2.imencode(ending, picture(0))[1].tobytes()
    answer, once = (
        stream([content], "image/jpeg" if ending == ".jpg" else "image/png"),
        SourceOptions(poll=False),
    )
    with serving(answer) as address, open_source(f"{address}/photo{ending}", once) as source:
        (frame,) = source
    assert np.abs(frame.image_bgr.astype(int) - picture(0)).mean() < 4


def test_a_password_goes_only_to_who_asks_and_to_nobody_else():
    asked = []

    def answer(handler):
        asked.append((handler.path, handler.headers["Authorization"]))
        if handler.path == "/moved":
            handler.send_response(302)
            handler.send_header("Location", f"{other}/elsewhere")
            handler.end_headers()
        elif handler.headers["Authorization"] is None and handler.path == "/video":
            handler.send_response(401)
            handler.send_header("WWW-Authenticate", 'Basic realm="camera"')
            handler.end_headers()
        else:
            head(handler, "image/jpeg")
            handler.wfile.write(JPEGS[0])

    once = SourceOptions(poll=False)
    with serving(answer) as address, serving(answer) as other:
        given = address.replace("//", "//me:p%40ss@")
        with open_source(f"{given}/video", once) as source:
            assert len(list(source)) == 1
        with open_source(f"{given}/moved", once) as source:
            assert len(list(source)) == 1
        with pytest.raises(
            SourceError, match="401 Unauthorized: is the user's name and password right"
        ) as error:
            open_source(f"{address}/video", once)
    assert asked[1] == ("/video", "Basic " + base64.b64encode(b"me:p@ss").decode())
    assert ("/elsewhere", None) in asked
    assert "p%40ss" not in str(error.value)


def test_what_is_no_picture_is_left_to_ffmpeg_and_what_is_nothing_is_told(tmp_path):
    film = write_video(tmp_path / "clip.mp4").read_bytes()
    whole = stream([film], "video/mp4", Content_Length=str(len(film)))
    with serving(whole) as address, open_source(f"{address}/camera") as source:
        assert isinstance(source, VideoFile)
        assert len(list(source)) == 12
    for path in ("/camera", "/clip.mp4"):
        with pytest.raises(SourceError, match="cannot open http"):
            open_source(address + path)


def test_a_camera_that_stalls_is_told(monkeypatch):
    monkeypatch.setattr(web_camera, "OPEN_TIMEOUT_S", 0.3)

    def answer(handler):
        if handler.path == "/begins":
            head(handler, "multipart/x-mixed-replace; boundary=frame")
            handler.wfile.write(part(JPEGS[0]))
            handler.wfile.flush()
        time.sleep(1.5)

    with serving(answer) as address:
        with open_source(f"{address}/begins", SourceOptions(stall_s=0.3)) as source:
            frames = iter(source)
            next(frames)
            with pytest.raises(SourceError, match="stopped: nothing came"):
                next(frames)
        with pytest.raises(SourceError, match="no answer within"):
            open_source(f"{address}/silent")
