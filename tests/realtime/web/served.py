"""A page that is served over a hub without a run: pictures are shown by hand, and asked for over
HTTP.
"""

import http.client
import json
import threading
import time
from contextlib import contextmanager
from itertools import count
from urllib.parse import urlsplit

import numpy as np

from engines.localizer import Localization
from realtime.frames import Frame, FrameRecord
from realtime.web.server import Address

LOCAL = Address(port=0)


def show(session, index, source="cam", objects=None, also=()):
    """A picture with a cat; sinks in ``also`` get its record, too."""
    found = Localization((1.0, 2.0, 30.0, 40.0), 0, "cat", 0.5, np.zeros((4, 4), np.float32))
    image = np.full((48, 64, 3), index % 256, np.uint8)
    record = FrameRecord(
        Frame(image, source, index, index / 30, time.monotonic_ns(), 0.1),
        found=found,
        total_ms=5.0,
        objects=objects,
    )
    record.stages_ms = {"read": 0.1, "engine": 3.0}
    session.write(record, image)
    session.live_run.add(record)
    for sink in also:
        sink.write(record, None)


@contextmanager
def pictures_of(session, *sources, also=()):
    """New pictures come, as long as the block lasts; see ``show``."""
    done = threading.Event()

    def work():
        for index in count():
            for source in sources:
                show(session, index, source, also=also)
            if done.wait(0.05):
                return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def get(url, path="", headers=None):
    connection = http.client.HTTPConnection(urlsplit(url).hostname, urlsplit(url).port, timeout=10)
    connection.request("GET", path or "/", headers=headers or {})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply, content


def post(url, path, body, headers=None):
    connection = http.client.HTTPConnection(urlsplit(url).hostname, urlsplit(url).port, timeout=10)
    connection.request(
        "POST", path, json.dumps(body), {"Content-Type": "application/json"} | (headers or {})
    )
    reply = connection.getresponse()
    answer = json.loads(reply.read())
    connection.close()
    return reply.status, answer
