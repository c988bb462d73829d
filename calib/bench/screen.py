"""Measures latency from glass to glass: from an event on the screen, through the camera, to its
picture on the screen.

::

    screen: code n, drawn at t(n) ─► camera ─► source ─► engine ─► drawing
            ─► window: shown at T, code n read off the frame

A code passes through the display once, on its way to the camera, and T is taken when the finished
picture is handed to the display. So T - t(n) holds the display's delay, the camera's and ours, each
once: what lies between an event before the lens and the eyes that watch it. Of each code only the
first sighting counts: waiting for the next exposure is part of it.

Codes are ArUco markers (Garrido-Jurado et al., "Automatic generation and detection of highly
reliable fiducial markers under occlusion", 2014): black and white cells that differ in many places
from each other, read from any side, none corrected.
"""

import http.server
import itertools
import queue
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, Protocol

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from calib.bench.machine import machine
from calib.bench.turns import engine_facts, warm_up
from engines.choose import open_localizer
from engines.errors import SightlineError, SourceError, sightline_command
from engines.localizer import ImageBgr
from engines.options import EngineOptions
from realtime.capture import latest_frames
from realtime.frames import FrameRecord
from realtime.pipeline import run_frames
from realtime.sinks import has_display
from realtime.sources.spec import open_source
from realtime.statistics import PERCENTILES, Run, percentiles

CODES = 1000
CODE_PX, BORDER_PX = 350, 65
LOOP_FPS = 30.0
UNREAD_FRAMES = 4
PATIENCE_S = 8.0
TITLE = "Sightline - point the camera here"


class Codes:
    """Codes that are shown one after the other, and when each was shown.

    Their numbers begin again after ``CODES``.
    """

    def __init__(self) -> None:
        self._dictionary = cv2.aruco.getPredefinedDictionary(cv2.aruco.DICT_5X5_1000)
        parameters = cv2.aruco.DetectorParameters()
        parameters.errorCorrectionRate = (
            0.0  # a code that is not read cleanly is not read: torn frames hold two halves
        )
        self._detector = cv2.aruco.ArucoDetector(self._dictionary, parameters)
        self._lock = threading.Lock()
        self._shown_ns: dict[int, int] = {}
        self.count = 0

    def next(self) -> ImageBgr:
        """The picture of the next code. It counts as shown now."""
        code = self.count % CODES
        marker = cv2.aruco.generateImageMarker(self._dictionary, code, CODE_PX)
        edges = (BORDER_PX,) * 4
        picture = cv2.copyMakeBorder(
            cv2.cvtColor(marker, cv2.COLOR_GRAY2BGR), *edges, cv2.BORDER_CONSTANT, value=(255,) * 3
        )
        self.count += 1
        with self._lock:
            self._shown_ns[code] = time.monotonic_ns()
        return np.asarray(picture, np.uint8)

    def seen(self, image_bgr: ImageBgr) -> int | None:
        """When the newest code in the image was shown (``time.monotonic_ns()``).

        It is None where no code can be read, or none is new.

        A camera may also see older codes, in the picture of the picture: they are forgotten.
        """
        _, found, _ = self._detector.detectMarkers(cv2.cvtColor(image_bgr, cv2.COLOR_BGR2GRAY))
        with self._lock:
            times_ns = (
                [self._shown_ns[int(code)] for code in found.ravel() if int(code) in self._shown_ns]
                if found is not None
                else []
            )
            newest_ns = max(times_ns, default=None)
            if newest_ns is not None:
                self._shown_ns = {
                    code: at_ns for code, at_ns in self._shown_ns.items() if at_ns > newest_ns
                }
        return newest_ns


class Screen(Protocol):
    """Shows codes and finished pictures."""

    def show(self, picture: ImageBgr) -> None:
        """A finished picture, in full when this returns."""


class WindowScreen:
    """A window with the code beside the finished picture. Each picture has a new code.

    ``q`` or Escape ends the run.
    """

    def __init__(self, codes: Codes) -> None:
        self._codes = codes
        cv2.namedWindow(TITLE, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
        self._draw(self._codes.next(), None)

    def show(self, picture: ImageBgr) -> None:
        """See ``Screen.show``."""
        self._draw(self._codes.next(), picture)

    def _draw(self, code: ImageBgr, picture: ImageBgr | None) -> None:
        if picture is not None:
            height = code.shape[0]
            small = cv2.resize(
                picture, (round(picture.shape[1] * height / picture.shape[0]), height)
            )
            code = np.hstack([code, np.asarray(small, np.uint8)])
        cv2.imshow(TITLE, code)
        if cv2.waitKey(1) & 0xFF in (ord("q"), 27):
            raise KeyboardInterrupt


class LoopScreen:
    """A screen and a camera in one, to try the measurement.

    It is a stream that replays the codes a known time after they were shown.

    Attributes:
        address: of the stream (Motion JPEG over HTTP).
    """

    def __init__(self, codes: Codes, delay_ms: float) -> None:
        self._codes, self._delay_s = codes, delay_ms / 1e3
        self._closed = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/screen.mjpg"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def show(self, picture: ImageBgr) -> None:
        """See ``Screen.show``: nobody looks at it."""

    def close(self) -> None:
        """End the stream."""
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def _replayed(self) -> Iterator[bytes]:
        """JPEGs at ``LOOP_FPS``. Each comes its delay after its code was shown."""
        waiting: deque[tuple[float, bytes]] = deque()
        begin_s = time.monotonic()
        for number in itertools.count():
            due_s = begin_s + number / LOOP_FPS
            while waiting and waiting[0][0] <= due_s:
                self._closed.wait(max(0.0, waiting[0][0] - time.monotonic()))
                yield waiting.popleft()[1]
            if self._closed.wait(max(0.0, due_s - time.monotonic())):
                return
            shown_s, code = time.monotonic(), self._codes.next()
            waiting.append((shown_s + self._delay_s, bytes(cv2.imencode(".jpg", code)[1])))

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        screen = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                try:
                    for jpeg in screen._replayed():
                        head = (
                            "--frame\r\nContent-Type: image/jpeg\r\nContent-Length:"
                            f" {len(jpeg)}\r\n\r\n"
                        )
                        self.wfile.write(head.encode() + jpeg + b"\r\n")
                except OSError:
                    return  # the reader has gone

            def log_message(self, *_: object) -> None: ...

        return Handler


class ScreenSink:
    """Shows every finished picture. A thread reads the codes of its frame.

    Attributes:
        glass_ms: from a code's being drawn to its picture's being shown.
        own_ms: of these, from capture to shown.
    """

    needs_picture = True

    def __init__(self, screen: Screen, codes: Codes) -> None:
        self.glass_ms, self.own_ms = array("d"), array("d")
        self._screen, self._codes = screen, codes
        self._unread: queue.Queue[tuple[ImageBgr, int, int] | None] = queue.Queue(UNREAD_FRAMES)
        self._reader = threading.Thread(target=self._read, name="read codes", daemon=True)

    def __enter__(self) -> "ScreenSink":
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._unread.put(None)
        self._reader.join(timeout=5.0)

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``realtime.sinks.Sink.write``."""
        if picture is None:
            return
        self._screen.show(picture)
        shown_ns = time.monotonic_ns()
        if not self._unread.full():  # a frame more or less: this thread alone puts
            self._unread.put((record.frame.image_bgr, record.frame.captured_ns, shown_ns))

    def _read(self) -> None:
        while (item := self._unread.get()) is not None:
            image, captured_ns, shown_ns = item
            drawn_ns = self._codes.seen(image)
            if drawn_ns is not None:
                self.glass_ms.append((shown_ns - drawn_ns) / 1e6)
                self.own_ms.append((shown_ns - captured_ns) / 1e6)


def bench_screen(
    source: str, choice: EngineOptions, seconds: float, console: Console
) -> dict[str, Any]:
    """Show codes, watch them through a camera, the engine and the drawing, and time the whole way.

    Args:
        source: a camera or stream that sees this screen; ``loop:MS``: neither screen nor camera,
            but a stream that replays the codes so much later, to try the measurement.
        choice: the engine.
        seconds: how long.
        console: for progress.

    Returns:
        ``glass_to_glass_ms`` (percentiles), ``own_ms`` (of it, from capture to shown),
        ``elsewhere_ms`` (the rest: display, exposure, transfer), ``codes_shown``, ``codes_seen``,
        ``frames``, ``dropped``, ``source``, ``engine``, ``machine``.

    Raises:
        SightlineError: no display, or the camera sees no code.
    """
    localizer = open_localizer(choice)
    warm_up(localizer)
    run, codes = Run(), Codes()
    with (
        _screen(source, codes) as (screen, address),
        open_source(address) as frames,
        ScreenSink(screen, codes) as sink,
    ):
        real = address == source
        what = "point the camera at the code on the screen" if real else "a virtual loop"
        console.print(f"{seconds:g} s: {what}")
        begin_s = time.monotonic()
        with closing(
            run_frames(latest_frames(frames, paced=False), localizer, [sink], run, under_way=1)
        ) as records:
            for _ in records:
                passed_s = time.monotonic() - begin_s
                if passed_s >= seconds:
                    break
                if not sink.glass_ms and passed_s >= PATIENCE_S:
                    break
    if not sink.glass_ms:
        raise SightlineError(
            f"{source} sees no code: point it at the window, with nothing between, not too close,"
            " not too bright"
        )
    elsewhere_ms = [glass - own for glass, own in zip(sink.glass_ms, sink.own_ms, strict=True)]
    return {
        "glass_to_glass_ms": percentiles(sink.glass_ms),
        "own_ms": percentiles(sink.own_ms),
        "elsewhere_ms": percentiles(array("d", elsewhere_ms)),
        "codes_shown": codes.count,
        "codes_seen": len(sink.glass_ms),
        "frames": run.outcomes["shown"],
        "dropped": run.outcomes["dropped"],
        "source": source,
        "engine": engine_facts(choice, localizer),
        "machine": machine(),
    }


@contextmanager
def _screen(source: str, codes: Codes) -> Iterator[tuple[Screen, str]]:
    """Open the screen, and say which source sees it."""
    if not source.startswith("loop:"):
        if not has_display():
            raise SightlineError(
                "glass to glass needs a display for its code; to try it without one:"
                f" {sightline_command('bench', screen=True)} loop:100",
                option="screen",
            )
        try:
            yield WindowScreen(codes), source
        finally:
            cv2.destroyAllWindows()
        return
    try:
        delay_ms = float(source.removeprefix("loop:"))
        if not 0 <= delay_ms <= CODES / LOOP_FPS * 500:
            raise ValueError
    except ValueError:
        raise SourceError(
            f"'{source}': write loop:MS, the delay in milliseconds, like loop:100"
        ) from None
    with closing(LoopScreen(codes, delay_ms)) as screen:
        yield screen, screen.address


def print_screen(result: dict[str, Any], console: Console) -> None:
    """Print the result as a table."""
    table = Table(
        title=f"glass to glass: {result['source']}, {result['engine']}", title_justify="left"
    )
    table.add_column("")
    for name in PERCENTILES:
        table.add_column(f"{name.replace('_', '.')} ms", justify="right")
    rows = {
        "screen to screen": "glass_to_glass_ms",
        "ours: capture to shown": "own_ms",
        "display and camera": "elsewhere_ms",
    }
    for title, key in rows.items():
        table.add_row(title, *(f"{result[key][name]:.1f}" for name in PERCENTILES))
    console.print(
        table,
        f"{result['codes_seen']} of {result['codes_shown']} codes seen, {result['frames']} frames",
    )
