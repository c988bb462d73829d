"""Who may look: tokens, other sites, and what every answer says to browsers."""

import json
from urllib.parse import parse_qs, urlsplit

import pytest

from realtime.web.server import Address, MetricsSink, PageServer
from tests.realtime.web.served import LOCAL, get, post, show

pytest.importorskip("fastapi", reason="the page needs: pip install '.[web]'")


def test_beyond_this_machine_a_new_token_is_made_each_time(session):
    tokens = set()
    for _ in range(2):
        with PageServer(session, str, Address("0.0.0.0", 0)) as server:
            (token,) = parse_qs(urlsplit(server.url).query)["token"]
            tokens.add(token)
            local = server.url
            assert local.startswith("http://127.0.0.1:")
            assert all(f":{server.port}/?token={token}" in url for url in server.urls_beyond)
            assert not any("0.0.0.0" in url or "127." in url for url in server.urls_beyond)
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


def test_on_this_machine_no_token_is_needed_and_every_answer_is_hardened(session):
    with PageServer(session, lambda: "an engine", LOCAL) as server:
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


def test_other_sites_pages_cannot_use_a_browser_on_this_machine(session):
    before = session.settings
    with PageServer(session, str, LOCAL) as server:
        assert get(server.url, "/state", {"Host": "evil.example"})[0].status == 403
        assert (
            post(
                server.url, "/settings", {"box": not before.box}, {"Origin": "http://evil.example"}
            )[0]
            == 403
        )
        assert get(server.url, "/snapshot.jpg", {"Sec-Fetch-Site": "cross-site"})[0].status == 403
        assert session.settings == before
        assert post(server.url, "/settings", {"box": not before.box})[0] == 200
    assert session.settings.box is not before.box


def test_who_is_not_let_in_gets_a_page_in_a_browser_and_json_elsewhere(session):
    opened = {"Accept": "text/html,application/xhtml+xml", "Sec-Fetch-Mode": "navigate"}
    with PageServer(session, str, LOCAL, token="<right>") as server:
        reply, content = get(server.url.partition("?")[0], "/?token=wrong", opened)
        assert (reply.status, reply.headers["Content-Type"]) == (401, "text/html; charset=utf-8")
        assert b"The token is missing or wrong" in content
        assert b'name="token"' in content
        assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
        reply, content = get(server.url, "/?token=wrong", opened | {"Sec-Fetch-Mode": "cors"})
        assert (reply.status, "error" in json.loads(content)) == (401, True)
        for _ in range(6):
            reply, content = get(server.url, "/?token=wrong", opened)
        assert (reply.status, b"<form" in content) == (429, False)
        assert int(reply.headers["Retry-After"]) > 0
    with PageServer(session, str, LOCAL) as server:
        reply, content = get(server.url, "/", opened | {"Host": "evil.example"})
        assert (reply.status, b"<title>" in content, b"<form" in content) == (403, True, False)


FOREIGN = [
    {"Host": "evil.example"},
    {"Host": "evil.example:9100"},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": "[::1"},
    {"Host": "127.0.0.1@evil.example"},
    {"Host": "10.0.0.1"},
    {"Host": ""},
    {"Host": "localhost:99999999"},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://["},
    {"Host": "evil.example", "Origin": "http://evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
]


@pytest.mark.parametrize("path", ["/metrics", "/snapshot.jpg", "/nothing"])
def test_the_metrics_have_the_guard_of_the_page(session, path):
    show(session, 0)
    with MetricsSink(0, session) as sink:
        url = f"http://127.0.0.1:{sink.port}"
        for headers in FOREIGN:
            reply, content = get(url, path, headers)
            assert 400 <= reply.status < 500, headers
            assert b"error" in content or not content
        for host in ("127.0.0.1", "localhost", "LOCALHOST:1", "[::1]", "[::1]:9100"):
            assert get(url, path, {"Host": host})[0].status == (404 if path == "/nothing" else 200)


def test_a_token_opens_the_metrics_too(session):
    with MetricsSink(0, session, "s3cret \N{SNOWMAN}") as sink:
        url = f"http://127.0.0.1:{sink.port}"
        assert get(url, "/metrics")[0].status == 401
        assert get(url, "/metrics", {"Authorization": b"Bearer nothing"})[0].status == 401
        assert (
            get(url, "/metrics", {"Authorization": "Bearer s3cret \N{SNOWMAN}".encode()})[0].status
            == 200
        )
        assert get(url, "/metrics", {"Accept": "text/plain;version=\xff"})[0].status == 401
        assert (
            get(url, "/metrics?token=s3cret%20%E2%98%83", {"Accept": "text/plain;version=\xff"})[
                0
            ].status
            == 200
        )
