"""A live source's connections, one after the other: how it is doing, its frames numbered and timed through all of them."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from engines.base import SourceError
from realtime.frames import Frame
from realtime.inbox import Inbox
from realtime.sources import open_source
from realtime.video import Source, SourceOptions

OPENING_S = 12.0  # of an address; FFmpeg gives up sooner, if it can. How long a camera's driver takes is its own affair
FIRST_FRAME_S = 10.0  # some cameras take their time to begin
LOOK_EVERY_S = 0.1
LEAVE_S = 1.0
NS = 1_000_000_000


@dataclass
class Connection:
    """How a live source is doing; its reader writes, anyone reads.

    Attributes:
        name: of its frames, different from all others'.
        spec: what the user typed, without a password.
        state: ``opening``, ``live``, ``waiting`` (to try again), ``ended`` (a file played to its end) or ``failed`` (for good).
        trouble: the last error, in words.
        width_px, height_px: of its last frame.
        rate_fps: nominal.
        reconnects: how often it came back.
    """

    name: str
    spec: str
    state: str = "opening"
    trouble: str = ""
    width_px: int = 0
    height_px: int = 0
    rate_fps: float = 0.0
    reconnects: int = 0


class Series:
    """One source's frames on their way into the inbox, numbered and timed through all its connections."""

    def __init__(self, connection: Connection, inbox: Inbox, place: int) -> None:
        self.connection, self.inbox = connection, inbox
        self._place, self._index, self._first_ns, self._begin_s = place, 0, 0, 0.0

    def begin(self, frame: Frame, captured_ns: int) -> None:
        """The first frame of a connection has come: it is live, times go on from here."""
        connection = self.connection
        if connection.width_px:
            connection.reconnects += 1
        connection.state, connection.trouble = "live", ""
        self._first_ns = self._first_ns or captured_ns
        self._begin_s = (captured_ns - self._first_ns) / NS - frame.pts_s

    def put(self, frame: Frame, captured_ns: int) -> None:
        """Hand a frame on; waits where the inbox does."""
        connection = self.connection
        connection.height_px, connection.width_px = frame.image_bgr.shape[:2]
        pts_s = self._begin_s + frame.pts_s
        frame = replace(frame, source=connection.name, index=self._index, pts_s=pts_s, captured_ns=captured_ns)
        if self.inbox.put(frame, self._place):
            self._index += 1


class Attempt:
    """One connection, in a thread of its own that is left behind when nothing comes from it any more.

    A call that a stopped server or a driver holds up cannot be interrupted, but done without: when it comes back, its thread
    closes the source and ends, and what it brings does not count.

    Args:
        spec: see ``realtime.sources.open_source``.
        options: how it is opened.
        series: where its frames go.
        told: gets what of the source is not read, in words.

    Attributes:
        live: whether it may be a camera or a network stream, which is worth opening again; an address may turn out a file.
    """

    def __init__(self, spec: str, options: SourceOptions, series: Series, told: Callable[[str], None] = lambda _: None) -> None:
        self._spec, self._options, self._series, self._told = spec, options, series, told
        self._source: Source | None = None
        self._error: Exception | None = None
        self._notes = 0
        self._lock, self._left, self._done = threading.Lock(), False, threading.Event()
        self._asked_s, self._patience_s = time.monotonic(), OPENING_S if "://" in spec else math.inf
        self.live = spec.isdigit() or "://" in spec

    def run(self) -> None:
        """Put every frame of the connection, until it ends or the inbox closes.

        Raises:
            SightlineError: as the source raises, or nothing came for so long as the options say.
        """
        name = f"connection of {self._series.connection.name}"
        threading.Thread(target=self._read, name=name, daemon=True).start()
        while not self._done.wait(LOOK_EVERY_S):
            if self._series.inbox.closed.is_set():
                if not self._done.wait(LEAVE_S):
                    self._leave()
                return
            if self._silent_s > self._patience_s:
                self._leave()
                raise SourceError(f"{self._series.connection.spec}: nothing came for {self._patience_s:g} s")
        if self._error is not None:
            raise self._error

    @property
    def _silent_s(self) -> float:
        """How long the source has been waited for."""
        return time.monotonic() - max(self._asked_s, self._source.heard_s if self._source else 0.0)

    def _leave(self) -> None:
        with self._lock:
            self._left = True

    def _read(self) -> None:
        try:
            with open_source(self._spec, self._options) as self._source:
                self._read_open(self._source)
        except Exception as error:  # raised by run, where it can be dealt with
            self._error = error
        finally:
            self._done.set()

    def _read_open(self, source: Source) -> None:
        series, start_s = self._series, time.monotonic()
        self.live, series.connection.rate_fps = source.live, source.rate_fps
        self._asked_s, self._patience_s = time.monotonic(), max(FIRST_FRAME_S, self._options.stall_s)
        if not source.live:
            self._patience_s = math.inf
        for number, frame in enumerate(source):
            self._asked_s, captured_ns = math.inf, frame.captured_ns  # now the source waits for us
            if not source.live:  # a file: at its own pace
                series.inbox.closed.wait(max(0.0, frame.pts_s - (time.monotonic() - start_s)))
                captured_ns = time.monotonic_ns()
            with self._lock:
                if self._left or series.inbox.closed.is_set():
                    return
                if number == 0:
                    series.begin(frame, captured_ns)
                series.put(frame, captured_ns)
                self._tell(source)
            if source.live:
                self._asked_s, self._patience_s = time.monotonic(), self._options.stall_s
        self._tell(source)

    def _tell(self, source: Source) -> None:
        """Whatever was not told yet."""
        for note in source.notes[self._notes :]:
            self._told(note)
        self._notes = len(source.notes)
