"""A source and a sink whose every step is known."""

import time

from realtime.frames import Frame
from realtime.sources.video import Source
from tests.realtime.media import picture


class Scripted(Source):
    """Frames of a moving square, ``gap_s`` apart in presentation time; may break at the end."""

    name = "scripted"

    def __init__(self, frames=8, gap_s=0.0, error=None):
        self.frames, self._gap_s, self._error = frames, gap_s, error

    def __iter__(self):
        for index in range(self.frames):
            yield Frame(
                picture(index), self.name, index, index * self._gap_s, time.monotonic_ns(), 0.5
            )
        if self._error:
            raise self._error


class Collector:
    needs_picture = True

    def __init__(self, delay_s=0.0):
        self.records, self.pictures, self.delay_s = [], [], delay_s

    def write(self, record, picture):
        time.sleep(self.delay_s)
        self.records.append(record.frame.index)
        self.pictures.append(picture)


def wait_until(condition):
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s, "it did not come about"
        time.sleep(0.001)
