"""Requests that nobody means well: each is refused, changes nothing, prints nothing, and the next
real one is answered.
"""

import contextlib
import json
import socket
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtime.capture import Connection
from realtime.session import Session
from realtime.statistics import LiveRun
from realtime.web.server import Address, GuardedServer, PageServer
from tests.realtime.web.served import LOCAL, get, post, show

pytest.importorskip("fastapi", reason="the page needs: pip install '.[web]'")
JSON = {"Content-Type": "application/json"}
BODIES = [
    '{"alpha": NaN}',
    '{"alpha": Infinity}',
    '{"alpha": -Infinity}',
    '{"alpha": 1e400}',
    '{"alpha": -1}',
    '{"alpha": 1' + "0" * 400 + "}",
    '{"alpha": 1' + "0" * 5000 + "}",
    '{"alpha": true}',
    '{"alpha": "0.5"}',
    '{"alpha": [0.5]}',
    '{"box": 1}',
    '{"box": "true"}',
    '{"wanted_class": "\\ud800"}',
    '{"\\ud800": 1}',
    '{"heat_map": "\\udfff"}',
    '{"source": "\\ud800", "point": [0, 0]}',
    '{"wanted_class": "cat", "point": [0, 0]}',
    '{"wanted_class": "cat", "source": "nowhere"}',
    '{"wanted_class": "cat", "alpha": 7}',
    '{"alpha": 0.1, "alpha": 0.2}',
    '{"unknown": 1}',
    '{"point": [0]}',
    '{"point": [0, NaN]}',
    '{"point": [true, false]}',
    '{"point": {}}',
    "[]",
    "[1]",
    "1",
    '"x"',
    "null",
    "",
    "{",
    "\x00",
    "[" * 60000,
    '{"a":' * 10000,
    '{"wanted_class": 1}',
    '{"smoothing": 2}',
]
TARGETS = [
    "/%",
    "/%zz",
    "/%ff",
    "/%00",
    "/\\..\\x",
    "/../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/recordings/..%2f..%2fx",
    "/recording/x.mp4",
    "/" + "a" * 9000,
    "/state?" + "a=b&" * 4000,
    "/?x=%",
    "/frame.jpg?after=NaN",
    "/frame.jpg?after=-1",
    "/frame.jpg?after=1e400",
    "/frame.jpg?wait_s=nan",
    "/frame.jpg?wait_s=inf",
    "/frame.jpg?wait_s=-1",
    "/frame.jpg?after=1" + "0" * 400,
    "/frame.jpg?source=%ED%A0%80",
    "/frame.jpg?source=",
    "/snapshot.jpg?source=../x",
    "/live.mjpg?source=%0d%0aX:%20y",
    "//evil.example/",
    "/docs",
    "/openapi.json",
]
RAW = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"GET /\r\n\r\n",
    b"\x00\r\n\r\n",
    b"GET /state HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET /state HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 40000 + b"\r\n\r\n",
    b"POST /settings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 600000000\r\n\r\n",
    b"POST /settings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /settings HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /settings HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n14000\r\n"
    + b"x" * 0x14000
    + b"\r\n",
    b"GET /state HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: "
    + b"\xff" * 20
    + b"\r\nOrigin: http://[\r\n\r\n",
    b"BREW /state HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
]


def raw(url, content):
    """The first line of what a server answers."""
    with socket.create_connection(
        (urlsplit(url).hostname, urlsplit(url).port), timeout=20
    ) as client:
        client.sendall(content)
        return client.makefile("rb").readline().decode("latin-1")


def request(method, target, body="", headers=JSON):
    content = body.encode("utf-8", "surrogatepass")
    lines = [
        f"{method} {target} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Length: {len(content)}",
        *map(": ".join, headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


def test_hostile_requests_are_refused_one_by_one(session, capfd):
    before = session.settings
    attacks = [
        *(request("POST", "/settings", each) for each in BODIES),
        *(request("POST", "/recording", each) for each in BODIES),
        *(request("GET", each) for each in TARGETS),
        *RAW,
        *(
            request(method, "/state")
            for method in ("POST", "PUT", "DELETE", "TRACE", "OPTIONS", "PATCH")
        ),
        request("GET", "/settings"),
        *(
            request("POST", "/settings", '{"alpha": 0.25}', {"Content-Type": kind})
            for kind in ("text/plain", "", "multipart/form-data", "json")
        ),
    ]
    with PageServer(session, str, LOCAL) as server:
        answers = [(raw(server.url, attack), attack[:200]) for attack in attacks]
        assert [each for each in answers if not each[0].startswith("HTTP/1.1 4")] == []
        assert get(server.url, "/state")[0].status == 200
        assert session.settings == before
    assert len(answers) > 100
    assert capfd.readouterr() == ("", "")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text()
    | st.sampled_from(["\ud800", "cat", "off", 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
NAMES = st.sampled_from(
    ["wanted_class", "box", "heat_map", "alpha", "smoothing", "point", "source", "on", "x"]
)


@pytest.fixture(scope="module")
def page():
    with (
        Session([Connection("cam", "0")], LiveRun(["cam"]), ("cat", "dog")) as session,
        PageServer(session, str, LOCAL) as server,
    ):
        yield session, server.url


@settings(derandomize=True, deadline=None, max_examples=60)
@given(body=st.dictionaries(NAMES, VALUES, max_size=4) | VALUES)
def test_any_body_is_taken_whole_or_refused_whole(page, body):
    session, url = page
    before = session.settings
    status = int(raw(url, request("POST", "/settings", json.dumps(body))).split()[1])
    assert status == 200 or 400 <= status < 500
    assert status == 200 or session.settings == before


async def say_hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.mark.parametrize(
    "beginning", [b"", b"GET / HTTP/1.1\r\nX: ", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[:-2]]
)
def test_half_requests_leave_room_and_end(beginning):
    with GuardedServer(say_hello, LOCAL, token="s3cret", most=8, request_s=2.0) as server:
        where, clients = ("127.0.0.1", server.port), []
        for _ in range(40):
            clients.append(socket.create_connection(where, timeout=20))
            clients[-1].sendall(beginning)
        assert get(server.url, "/?token=s3cret")[0].status == 303
        assert get(server.url, "/x", {"Authorization": "Bearer s3cret"})[1] == b"hello"
        for client in clients:  # each is closed, for the others or for its time
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1000) == b""
            client.close()


def test_a_body_that_does_not_come_ends(session):
    with (
        GuardedServer(say_hello, LOCAL, request_s=0.5) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as slow,
    ):
        slow.sendall(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\nabc")
        with contextlib.suppress(ConnectionResetError):
            assert slow.recv(1000) == b""


def test_who_watches_is_not_cut_off(session):
    server = PageServer(session, str, LOCAL)
    with server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as viewer:
        viewer.sendall(b"GET /live.mjpg HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"multipart" in viewer.recv(4096)
        others = [
            socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(100)
        ]
        assert get(server.url, "/state")[0].status == 200
        show(session, 0)
        assert viewer.recv(1)
        for other in others:
            other.close()


def test_wrong_tokens_are_slowed_down_and_the_right_one_is_not(session):
    with PageServer(session, str, LOCAL, token="s3cret") as server:
        answers = [get(server.url, f"/state?token=wrong{n}")[0] for n in range(8)]
        assert [each.status for each in answers] == [401] * 5 + [429] * 3
        assert 0 < int(answers[-1].headers["Retry-After"]) <= 60
        assert get(server.url, "/state?token=s3cret")[0].status == 200
        assert get(server.url, "/state")[0].status == 401


def test_a_recording_that_cannot_be_begun_is_refused(session, tmp_path):
    (tmp_path / "file").touch()
    with PageServer(session, str, Address(port=0), recordings=tmp_path / "file" / "rec") as server:
        status, answer = post(server.url, "/recording", {"on": True})
        assert (status, session.settings.page_recording) == (409, None)
        assert "cannot write" in answer["error"]
