"""One JPEG for however many viewers, and nothing for those who hold others up."""

import asyncio
import contextlib
import socket
import threading
import time
from urllib.parse import urlsplit

import cv2
import pytest

from tests.realtime.web.page import streaming, wait_for
from tests.realtime.web.served import show

pytest.importorskip("fastapi", reason="the page needs: pip install '.[web]'")


def test_one_jpeg_is_made_for_all_viewers_and_none_while_nobody_looks(session, monkeypatch):
    made, real = [], cv2.imencode
    monkeypatch.setattr(cv2, "imencode", lambda *given: made.append(1) or real(*given))
    show(session, 0)
    assert not session.needs_picture
    assert not made
    from realtime.web.app import Broadcast

    async def watch():
        broadcast = Broadcast(session, "cam")
        viewers = [asyncio.create_task(broadcast.newer(0, 20.0)) for _ in range(20)]
        while not session.needs_picture:  # until the thread looks out for pictures
            await asyncio.sleep(0.05)
        show(session, 1)
        first = await asyncio.gather(*viewers)
        show(session, 2)
        later = await asyncio.gather(*[broadcast.newer(first[0].number, 20.0) for _ in range(20)])
        return first, later

    first, later = asyncio.run(watch())
    assert {shown.number for shown in first} == {2}, "what was drawn before anybody looked is old"
    assert {shown.number for shown in later} == {3}
    assert len(made) == 2
    assert session.needs_picture


def test_the_encoding_thread_ends_when_nobody_looks_and_begins_again(session, monkeypatch):
    monkeypatch.setattr("realtime.web.app.IDLE_S", 0.2)
    monkeypatch.setattr("realtime.web.app.WAIT_S", 0.05)
    from realtime.web.app import Broadcast

    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "encode cam"]

    async def watch():
        broadcast = Broadcast(session, "cam")
        for _ in range(2):
            waiting = asyncio.create_task(broadcast.newer(0, 20.0))
            for index in range(400):
                if not waiting.done():
                    show(session, index)
                    await asyncio.sleep(0.05)
            assert await waiting is not None
            end = time.monotonic() + 20
            while threads() and time.monotonic() < end:
                await asyncio.sleep(0.05)
            assert not threads()

    asyncio.run(watch())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with streaming(tmp_path_factory.mktemp("page")) as found:
        wait_for(lambda: found.state()["all"]["frames"] > 3)
        yield found


def test_the_next_picture_is_waited_for_and_is_never_an_older_one(run):
    numbers = []
    for _ in range(5):
        reply, content = run.ask(f"/frame.jpg?after={numbers[-1] if numbers else 0}")
        numbers.append(int(reply.headers["X-Number"]))
        assert content[:2] == b"\xff\xd8"
    assert numbers == sorted(set(numbers))


class Viewer:
    """Opens Motion JPEG; reads it in a thread, or never."""

    def __init__(self, run, reads):
        address = urlsplit(run.url)
        self.read_bytes = 0
        self.socket = socket.create_connection((address.hostname, address.port))
        self.socket.sendall(f"GET /live.mjpg HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
        if reads:
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        with contextlib.suppress(OSError):
            while chunk := self.socket.recv(1 << 18):
                self.read_bytes += len(chunk)


def frames_in(run, seconds):
    begin, before = time.monotonic(), run.state()["all"]["frames"]
    time.sleep(seconds)
    return (run.state()["all"]["frames"] - before) / (time.monotonic() - begin)


def frames_with_viewers_in(run, seconds):
    """The same while 20 viewers watch, of which one is stuck."""
    viewers = [Viewer(run, reads=index > 0) for index in range(20)]
    try:
        wait_for(lambda: all(viewer.read_bytes > 100_000 for viewer in viewers[1:]))
        time.sleep(2.0)  # until all buffers towards the stuck one are full
        watched = frames_in(run, seconds)
        before = [viewer.read_bytes for viewer in viewers[1:]]
        wait_for(
            lambda: all(
                viewer.read_bytes > was for viewer, was in zip(viewers[1:], before, strict=True)
            )
        )
        return watched
    finally:
        for viewer in viewers:
            viewer.socket.close()


def test_twenty_viewers_of_which_one_is_stuck_leave_the_run_alone(run):
    """A run that waited for the stuck one would show nothing at all; what twenty viewers cost a
    busy machine is not the point.
    """
    alone = frames_in(run, 2.0)
    assert frames_with_viewers_in(run, 2.0) > 0.2 * alone > 0
