"""The page's server without a browser: addresses, tokens, and one JPEG for however many viewers."""

import asyncio
import http.client
import json
import socket
import sys
import threading
import time
from urllib.parse import parse_qs, urlsplit

import cv2
import numpy as np
import pytest

from engines.base import EngineError, OutputError
from engines.localizer import Localization
from realtime.connection import Connection
from realtime.follow.following import Following
from realtime.follow.options import FollowOptions
from realtime.frames import Frame, FrameRecord, Track, Tracked
from realtime.hub import Hub
from realtime.ledger import Ledger
from realtime.web.server import Address, PageServer

pytest.importorskip("fastapi", reason="the page needs: pip install 'sightline[web]'")
LOCAL = Address(port=0)


@pytest.fixture
def hub():
    with Hub([Connection("cam", "0"), Connection("door", "1")], Ledger(["cam", "door"]), ("cat", "dog")) as found:
        yield found


def show(hub, index, source="cam", objects=None):
    found = Localization((1.0, 2.0, 30.0, 40.0), 0, "cat", 0.5, np.zeros((4, 4), np.float32))
    image = np.full((48, 64, 3), index % 256, np.uint8)
    record = FrameRecord(
        Frame(image, source, index, index / 30, time.monotonic_ns(), 0.1), found=found, total_ms=5.0, objects=objects
    )
    record.stages_ms = {"read": 0.1, "engine": 3.0}
    hub.write(record, image)
    hub.ledger.add(record)


def get(url, path="", headers=None):
    connection = http.client.HTTPConnection(urlsplit(url).hostname, urlsplit(url).port, timeout=10)
    connection.request("GET", path or "/", headers=headers or {})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply, content


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [("8000", "127.0.0.1", 8000, True), ("0.0.0.0:80", "0.0.0.0", 80, False), ("[::1]:9", "::1", 9, True),
     ("[::]:9", "::", 9, False), ("localhost:1", "localhost", 1, True), ("192.168.1.7:1", "192.168.1.7", 1, False),
     ("127.evil.example.invalid:1", "127.evil.example.invalid", 1, False)],
)  # fmt: skip
def test_addresses_are_read(text, host, port, loopback):
    address = Address.of(text)
    assert (address.host, address.port) == (host, port)
    assert address.is_loopback is loopback


@pytest.mark.parametrize("text", ["", "x", "host:", "1.2.3.4:x", "70000", "-1", "²"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(OutputError, match="PORT"):
        Address.of(text)


def test_a_port_in_use_is_named(hub):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OutputError, match=f"{port}.*another port"):
            PageServer(hub, str, Address(port=port))


def test_beyond_this_machine_a_new_token_is_made_each_time(hub):
    tokens = set()
    for _ in range(2):
        with PageServer(hub, str, Address("0.0.0.0", 0)) as server:
            (token,) = parse_qs(urlsplit(server.url).query)["token"]
            tokens.add(token)
            local = server.url.replace("0.0.0.0", "127.0.0.1")
            assert get(local, "/state")[0].status == 401
            reply, _ = get(local, f"/?token={token}")
            assert reply.status == 303
            assert reply.headers["Location"] == "/"
            cookie = reply.headers["Set-Cookie"]
            assert "httponly" in cookie.lower()
            assert "samesite=lax" in cookie.lower()
            assert get(local, "/state", {"Cookie": cookie.partition(";")[0]})[0].status == 200
    assert len(tokens) == 2
    assert min(map(len, tokens)) >= 20


def test_on_this_machine_no_token_is_needed_and_every_answer_is_hardened(hub):
    with PageServer(hub, lambda: "an engine", LOCAL) as server:
        assert "?" not in server.url
        reply, content = get(server.url)
        assert b"Sightline" in content
        assert "default-src 'self'" in reply.headers["Content-Security-Policy"]
        assert reply.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "server" not in reply.headers
        for name in ("page.css", "page.js", "charts.js", "icon.svg"):
            assert get(server.url, f"/{name}")[0].status == 200
        assert b"://" not in get(server.url, "/page.js")[1], "nothing is fetched from elsewhere"
        assert get(server.url, "/../server.py")[0].status == 404


def test_state_tells_of_every_source(hub):
    show(hub, 0)
    with PageServer(hub, lambda: "an engine", LOCAL) as server:
        state = json.loads(get(server.url, "/state")[1])
    assert state["title"] == "an engine"
    assert [source["name"] for source in state["sources"]] == ["cam", "door"]
    assert state["sources"][0]["frames"] == 1
    assert state["sources"][0]["stages_ms"]["engine"]["p50"] == 3.0
    assert state["settings"] == {
        "wanted_class": None, "box": True, "heat_map": "inset", "alpha": 0.5, "smoothing": 0.0, "record": None,
    }  # fmt: skip


def post(url, path, body):
    connection = http.client.HTTPConnection(urlsplit(url).hostname, urlsplit(url).port, timeout=10)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    answer = json.loads(reply.read())
    connection.close()
    return reply.status, answer


def test_a_click_says_what_is_followed_where_anything_is(hub):
    with PageServer(hub, str, LOCAL) as server:
        assert json.loads(get(server.url, "/state")[1])["follows"] is False
        status, answer = post(server.url, "/settings", {"point": [0.5, 0.5]})
        assert (status, "--follow" in answer["error"]) == (400, True)
        hub.following = Following(FollowOptions(follow=True))
        assert post(server.url, "/settings", {"point": [0.5, 0.25], "source": "door"})[0] == 200
        assert post(server.url, "/settings", {"point": [0.5, 1.5]})[0] in (400, 422)
        assert post(server.url, "/settings", {"point": [0.5, 0.5], "source": "attic"})[0] == 400
        assert json.loads(get(server.url, "/state")[1])["follows"] is True
    image = np.random.default_rng(0).integers(0, 255, (100, 200, 3), np.uint8)
    for name, whole in (("cam", True), ("door", False)):
        seen = hub.following.view(FrameRecord(Frame(image, name, 0, 0.0, 0, 0.0)))
        assert (seen.shape == image.shape) is whole


def test_the_page_is_told_of_each_object_that_is_followed(hub):
    box = (1.0, 2.0, 30.0, 40.0)
    each = Tracked(box, 0, "cat", 0.5, Track("following", box, 0.9, 7, box))
    with PageServer(hub, str, LOCAL) as server:
        show(hub, 0)
        assert [source["objects"] for source in json.loads(get(server.url, "/state")[1])["sources"]] == [[], []]
        show(hub, 1, objects=(each,))
        told = json.loads(get(server.url, "/state")[1])["sources"][0]["objects"]
    assert told == [each.row()]
    assert (told[0]["track_id"], told[0]["confidence"], told[0]["x1"]) == (7, 0.9, 30.0)


def test_a_source_without_pictures_is_waited_for_and_then_told(hub):
    with PageServer(hub, str, LOCAL) as server:
        assert get(server.url, "/frame.jpg?source=door&wait_s=0.2")[0].status == 204


def test_one_jpeg_is_made_for_all_viewers_and_none_while_nobody_looks(hub, monkeypatch):
    made, real = [], cv2.imencode
    monkeypatch.setattr(cv2, "imencode", lambda *given: made.append(1) or real(*given))
    show(hub, 0)
    assert not hub.needs_picture
    assert not made
    from realtime.web.broadcast import Broadcast

    async def watch():
        broadcast = Broadcast(hub, "cam")
        viewers = [asyncio.create_task(broadcast.newer(0, 20.0)) for _ in range(20)]
        while not hub.needs_picture:  # until the thread looks out for pictures
            await asyncio.sleep(0.05)
        show(hub, 1)
        first = await asyncio.gather(*viewers)
        show(hub, 2)
        later = await asyncio.gather(*[broadcast.newer(first[0].number, 20.0) for _ in range(20)])
        return first, later

    first, later = asyncio.run(watch())
    assert {shown.number for shown in first} == {2}, "what was drawn before anybody looked is old"
    assert {shown.number for shown in later} == {3}
    assert len(made) == 2
    assert hub.needs_picture


def test_the_encoding_thread_ends_when_nobody_looks_and_begins_again(hub, monkeypatch):
    monkeypatch.setattr("realtime.web.broadcast.IDLE_S", 0.2)
    monkeypatch.setattr("realtime.web.broadcast.WAIT_S", 0.05)
    from realtime.web.broadcast import Broadcast

    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "encode cam"]

    async def watch():
        broadcast = Broadcast(hub, "cam")
        for _ in range(2):
            waiting = asyncio.create_task(broadcast.newer(0, 20.0))
            for index in range(400):
                if not waiting.done():
                    show(hub, index)
                    await asyncio.sleep(0.05)
            assert await waiting is not None
            end = time.monotonic() + 20
            while threads() and time.monotonic() < end:
                await asyncio.sleep(0.05)
            assert not threads()

    asyncio.run(watch())


def test_without_the_packages_it_says_how_to_get_them(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(EngineError, match=r"sightline\[web\]"):
        PageServer(hub, str, LOCAL)


def test_viewers_are_let_go_when_the_run_ends(hub):
    with PageServer(hub, str, LOCAL) as server:
        show(hub, 0)
        with socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port)) as viewer:
            viewer.sendall(b"GET /live.mjpg HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert b"multipart" in viewer.recv(4096)
            begin = time.monotonic()
            server.__exit__(None, None, None)
            assert time.monotonic() - begin < 3.0
    assert not [thread for thread in threading.enumerate() if thread.name == "page"]
