"""A real RTSP camera for tests: GStreamer's server as a program of its own, which can be killed,
stopped and started again.
"""

import signal
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

PYTHON = "/usr/bin/python3"  # Debian's: python3-gi is for that one
SCRIPT = Path(__file__).parent / "rtsp_server.py"
NEEDS = "apt-get install python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-ugly"
COLUMNS, ROWS = 6, 4
RATE = 25


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def number_in(image_bgr):
    """The number that a frame shows; None where a field is neither black nor white: filler, or a
    damaged frame.
    """
    height, width = image_bgr.shape[:2]
    rows, columns = (
        (np.arange(n) + 0.5) * side / n for n, side in ((ROWS, height), (COLUMNS, width))
    )
    fields = [
        image_bgr[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4] for y in rows for x in columns
    ]
    if any(20 < value < 235 for field in fields for value in (field.min(), field.max())):
        return None
    return int("".join("1" if field.mean() > 127 else "0" for field in fields), 2)


class RtspCamera:
    """Serves ``address`` while it runs."""

    def __init__(self):
        self.port = free_port()
        self.address = f"rtsp://127.0.0.1:{self.port}/clock"
        self._process = None

    def start(self, width=320, height=240):
        command = [PYTHON, str(SCRIPT), str(self.port), str(width), str(height), str(RATE)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if self._process.stdout.readline().strip() != "ready":
            pytest.skip(
                f"no RTSP server here ({NEEDS}): {self._process.stderr.read().strip().splitlines()[-1:]}"
            )

    def kill(self):
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def stop(self):
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self._process.send_signal(signal.SIGCONT)
