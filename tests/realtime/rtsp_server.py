"""A real RTSP server (GStreamer's) that shows a clock as black and white fields. Run by the
system's Python, which has ``gi``:

/usr/bin/python3 rtsp_server.py PORT WIDTH HEIGHT RATE

Frames are numbered by the time of day, so that numbers go on when the server is started again.
``rtsp://127.0.0.1:PORT/clock``.
"""

import sys
import time

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

COLUMNS, ROWS = 6, 4  # 24 bits, the highest first
PORT, WIDTH, HEIGHT, RATE = (int(word) for word in sys.argv[1:5])


def gray(number):
    """The frame of that number, uint8 ``[HEIGHT, WIDTH]``."""
    bits = [number >> (COLUMNS * ROWS - 1 - i) & 1 for i in range(COLUMNS * ROWS)]
    lines = []
    for row in range(ROWS):
        fields = bits[row * COLUMNS : (row + 1) * COLUMNS]
        lines.append(
            b"".join((b"\xff" if fields[x * COLUMNS // WIDTH] else b"\0") for x in range(WIDTH))
        )
    return b"".join(lines[y * ROWS // HEIGHT] for y in range(HEIGHT))


class Clock(GstRtspServer.RTSPMediaFactory):
    """The same running stream for every client."""

    def __init__(self):
        super().__init__()
        self.set_shared(True)
        self.last = 0

    def do_create_element(self, url):
        caps = f"video/x-raw,format=GRAY8,width={WIDTH},height={HEIGHT},framerate={RATE}/1"
        return Gst.parse_launch(
            f"( appsrc name=clock is-live=true do-timestamp=true format=time caps={caps} ! videoconvert ! video/x-raw,format=I420 "
            f"! x264enc tune=zerolatency speed-preset=ultrafast sliced-threads=false key-int-max={RATE} ! rtph264pay name=pay0 pt=96 )"
        )

    def do_configure(self, media):
        source = media.get_element().get_by_name_recurse_up("clock")
        GLib.timeout_add(1000 // RATE, self.push, source)

    def push(self, source):
        number = max(self.last + 1, int(time.time() * RATE) % (1 << COLUMNS * ROWS))
        self.last = number
        return source.emit("push-buffer", Gst.Buffer.new_wrapped(gray(number))) == Gst.FlowReturn.OK


Gst.init(None)
server = GstRtspServer.RTSPServer()
server.set_address("127.0.0.1")
server.set_service(str(PORT))
server.get_mount_points().add_factory("/clock", Clock())
assert server.attach(None), f"port {PORT} is taken"
print("ready", flush=True)
GLib.MainLoop().run()
