"""Small real media files, made on the spot."""

import http.server
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

SQUARE_PX = 24


def picture(index: int, width: int = 128, height: int = 96) -> np.ndarray:
    """A bright square that moves over a dark field."""
    image = np.full((height, width, 3), 20, np.uint8)
    x = 4 + 3 * index % (width - SQUARE_PX - 4)
    image[30 : 30 + SQUARE_PX, x : x + SQUARE_PX] = 230
    return image


def write_video(
    path: Path,
    frames: int = 12,
    *,
    pts: list[int] | None = None,
    time_base: Fraction = Fraction(1, 25),
    codec: str = "libx264",
    width: int = 128,
    height: int = 96,
    rotation: int = 0,
) -> Path:
    """A video with exactly the given timestamps (in units of ``time_base``)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = time_base
        stream.options = {"bf": "0"} if codec == "libx264" else {}
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(index, width, height), format="bgr24")
            frame.pts, frame.time_base = (pts[index] if pts else index), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if rotation:
        _set_rotation(path, rotation)
    return path


def _set_rotation(path: Path, degrees: int) -> None:
    """Write the display matrix into the track header box (ISO 14496-12, section 8.3.2)."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # version 0: 40 bytes before the matrix
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = [cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30]
    content[start : start + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(content)


def write_images(folder: Path, count: int = 5, suffix: str = ".png") -> Path:
    """Images whose natural order differs from their alphabetical one."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        cv2.imwrite(str(folder / f"shot {index + 8}{suffix}"), picture(index))
    return folder


def timestamps_s(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [float(frame.pts * stream.time_base) for frame in container.decode(stream)]


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """The address of a real web server on loopback that serves a folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
