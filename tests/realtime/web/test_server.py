"""Addresses of the page, and what happens when it is begun and ended."""

import ipaddress
import socket
import sys
import threading
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest

from engines.errors import EngineError, OutputError
from realtime.web.server import Address, PageServer, qr_code
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


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "127.0.0.1", "192.0.2.7"])
def test_other_machines_are_told_addresses_that_they_can_open(host):
    told = Address(host, 8000).beyond
    if host == "192.0.2.7":
        assert told == [host]
    elif host == "127.0.0.1":
        assert told == []
    for each in map(ipaddress.ip_address, told):
        assert each.version == (6 if ":" in host else 4)
        assert not each.is_unspecified
        assert not each.is_loopback


def test_a_phone_reads_the_code_and_a_narrow_terminal_has_none():
    segno = pytest.importorskip("segno", reason="codes need: pip install '.[web]'")
    url = "http://192.168.178.41:8000/?token=KJ8-u4hY2cM_bq0ZkS7dTQ"
    code = qr_code(url, 80)
    rows = code.plain.splitlines()
    assert max(map(len, rows)) < 60
    halves = {"█": (255, 255), "▀": (255, 0), "▄": (0, 255), " ": (0, 0)}
    pixels = np.array([[halves[each] for each in row] for row in rows], np.uint8)
    image = np.repeat(np.repeat(pixels.transpose(0, 2, 1).reshape(-1, len(rows[0])), 8, 0), 8, 1)
    assert cv2.QRCodeDetector().detectAndDecode(image)[0] == url
    assert qr_code(url, 30) is None
    assert segno.make_qr(url, error="l").symbol_size(border=2)[0] == len(rows[0])


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
