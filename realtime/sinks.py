"""The sinks: what the loop hands its records to, how it draws for them, and the display window."""

import os
import re
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import cv2

from engines.localizer import ImageBgr
from engines.text import in_words
from realtime.annotate import Annotator, Look, clock
from realtime.frames import FrameRecord
from realtime.statistics import Run


class Sink(AbstractContextManager["Sink"], Protocol):
    """Takes finished frames in order."""

    @property
    def needs_picture(self) -> bool:
        """Whether it wants the drawing now, not only the record."""
        ...

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """Take one frame.

        Raises:
            OutputError: it cannot be written.
        """


class WindowSink:
    """A window on the screen for each source; q or Escape calls ``stop``. When the display goes
    away, the run goes on.
    """

    def __init__(self, title: str, stop: Callable[[], None]) -> None:
        self.needs_picture = True
        self._title, self._stop = title, stop
        self._open: set[str] = set()

    def __enter__(self) -> Self:
        os.environ.setdefault(
            "QT_LOGGING_RULES", "*.warning=false"
        )  # Qt misses fonts that OpenCV does not ship
        return self

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        if picture is None or not self.needs_picture:
            return
        title = f"{self._title} - {record.frame.source}"
        try:
            if title not in self._open:
                cv2.namedWindow(
                    title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL
                )
                cv2.resizeWindow(title, picture.shape[1], picture.shape[0])
                self._open.add(title)
            cv2.imshow(title, picture)
            if cv2.waitKey(1) & 0xFF in (ord("q"), 27):
                self._stop()
        except cv2.error:  # there is no display, or no more: go on without
            self.needs_picture = False

    def __exit__(self, *_: object) -> None:
        with suppress(cv2.error):
            for title in self._open:
                cv2.destroyWindow(title)


def has_display() -> bool:
    """Whether a window can be opened here: there is a display, and it answers (Qt ends the program
    where it does not).
    """
    if os.name == "nt" or sys.platform == "darwin":
        return True
    name, folder = os.environ.get("WAYLAND_DISPLAY"), os.environ.get("XDG_RUNTIME_DIR", "")
    if name and _answers(socket.AF_UNIX, str(Path(folder) / name)):
        return True
    found = re.fullmatch(r"(?:unix)?([^:/]*):(\d+)(?:\.\d+)?", os.environ.get("DISPLAY", ""))
    if not found:
        return False
    if found[1]:
        return _answers(socket.AF_INET, (found[1], 6000 + int(found[2])))
    place = f"/tmp/.X11-unix/X{found[2]}"
    return _answers(socket.AF_UNIX, place) or _answers(socket.AF_UNIX, f"\0{place}")


def _answers(family: socket.AddressFamily, address: str | tuple[str, int]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(address)
        except OSError:
            return False
    return True


class Notices:
    """Passes lines on, and keeps them for the summary.

    Args:
        notify: gets each.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify, self._lines = notify, list[str]()

    def __call__(self, line: str) -> None:
        """Keep a line and pass it on."""
        self._lines.append(line)
        self._notify(line)

    def summary(self) -> dict[str, list[str]]:
        """``trouble``: the lines; nothing where there is none."""
        return {"trouble": self._lines} if self._lines else {}


class Beside:
    """A sink whose errors, of any kind, end it and nothing else.

    Args:
        sink: gets everything until it fails.
        what: names it in the line that says so.
        notify: gets that line, once.
    """

    def __init__(self, sink: Sink, what: str, notify: Callable[[str], None]) -> None:
        self._sink = sink
        self._what = what
        self._notify = notify
        self._failed = False

    @property
    def needs_picture(self) -> bool:
        """See ``Sink.needs_picture``."""
        return not self._failed and self._sink.needs_picture

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``; raises nothing."""
        if self._failed:
            return
        try:
            self._sink.write(record, picture)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        self._notify(f"{self._what} has ended, and the run goes on without it: {in_words(error)}")

    def __enter__(self) -> Self:
        self._sink.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._failed:
            with suppress(Exception):
                self._sink.__exit__(kind, error, trace)
            return
        try:
            self._sink.__exit__(kind, error, trace)
        except Exception as failure:
            self._fail(failure)


class Output:
    """What the frame loop does with an answer.

    Args:
        sinks: each gets every record, and the drawing where there is one; logs get it last, when
            all is timed.
        run: the account.
        look: how to draw at the moment.
        alone: a frame that cannot be drawn fails alone.
    """

    def __init__(
        self, sinks: Sequence[Sink], run: Run, look: Callable[[], Look], alone: bool = False
    ) -> None:
        self._sinks = sinks
        self._run = run
        self._look = look
        self._alone = alone
        self._annotator = Annotator()

    def draw_and_write(self, record: FrameRecord, heat_map_every: int) -> None:
        """Give a shown frame's picture to the sinks that want one, and time it.

        Raises:
            OutputError: as a sink raises.
        """
        if record.outcome != "shown":
            return
        wanting = [sink for sink in self._sinks if sink.needs_picture]
        try:
            picture = self._drawn(record, heat_map_every) if wanting else None
        except Exception as error:
            if not self._alone:
                raise
            record.fail(error)
            return
        mark_ns = record.began_ns["write"] = time.monotonic_ns()
        for sink in wanting:
            sink.write(record, picture)
        done_ns = time.monotonic_ns()
        record.stages_ms["write"] = (done_ns - mark_ns) / 1e6
        self._run.work_ms["sink"] += record.stages_ms["write"]
        record.total_ms = record.frame.read_ms + (done_ns - record.frame.captured_ns) / 1e6

    def enter(self, record: FrameRecord) -> None:
        """Log and count a finished frame, whatever became of it."""
        begin_ns = time.monotonic_ns()
        for sink in self._sinks:
            if not sink.needs_picture:
                sink.write(record, None)
        self._run.work_ms["sink"] += (time.monotonic_ns() - begin_ns) / 1e6
        self._run.add(record)

    def _drawn(self, record: FrameRecord, heat_map_every: int) -> ImageBgr:
        start_ns = record.began_ns["draw"] = time.monotonic_ns()
        assert record.found is not None  # a shown frame has its answer
        status = f"{record.frame.source} {record.frame.index}   {record.stages_ms['engine']:.1f} ms"
        if (track := record.track) is not None:
            numbers = [one.track.track_id for one in record.objects or ()] or [track.track_id]
            status += f"   {track.state} " + ", ".join(str(number or "") for number in numbers)
        if (
            record.frame.pts is not None
        ):  # whole files, whose pictures must not depend on the machine
            status = f"{record.frame.source}   {clock(record.frame.pts_s)}"
        objects = record.objects or ()
        picture = self._annotator.paint(
            record.frame, record.found, status, self._look(), heat_map_every, objects
        )
        record.stages_ms["draw"] = (time.monotonic_ns() - start_ns) / 1e6
        self._run.work_ms["drawing"] += record.stages_ms["draw"]
        return picture
