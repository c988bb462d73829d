"""Addresses of the page, and what happens when it is begun and ended."""

import socket
import sys
import threading
from urllib.parse import urlsplit

import pytest

from engines.errors import EngineError, OutputError
from realtime.web.server import Address, PageServer
from tests.realtime.web.served import LOCAL, show

pytest.importorskip("fastapi", reason="the page needs: pip install '.[web]'")


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("8000", "127.0.0.1", 8000, True),
        ("0.0.0.0:80", "0.0.0.0", 80, False),
        ("[::1]:9", "::1", 9, True),
        ("[::]:9", "::", 9, False),
        ("localhost:1", "localhost", 1, True),
        ("192.168.1.7:1", "192.168.1.7", 1, False),
        ("127.evil.example.invalid:1", "127.evil.example.invalid", 1, False),
    ],
)
def test_addresses_are_read(text, host, port, loopback):
    address = Address.of(text)
    assert (address.host, address.port) == (host, port)
    assert address.is_loopback is loopback


@pytest.mark.parametrize("text", ["", "x", "host:", "1.2.3.4:x", "70000", "-1", "²"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(OutputError, match="PORT"):
        Address.of(text)


def test_a_port_in_use_is_named(session):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OutputError, match=f"{port}.*another port"):
            PageServer(session, str, Address(port=port))


def test_without_the_packages_it_says_how_to_get_them(session, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(EngineError, match="pip install 'fastapi"):
        PageServer(session, str, LOCAL)


def test_viewers_are_let_go_when_the_run_ends(session):
    with PageServer(session, str, LOCAL) as server:
        show(session, 0)
        with socket.create_connection(
            (urlsplit(server.url).hostname, urlsplit(server.url).port)
        ) as viewer:
            viewer.sendall(b"GET /live.mjpg HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert b"multipart" in viewer.recv(4096)
            server.__exit__(None, None, None)  # comes back, though the viewer has not gone
    assert not [thread for thread in threading.enumerate() if thread.name == "page"]
