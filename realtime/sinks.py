"""Where results go: an annotated video, a line-wise log, a window. Files appear under their name only when complete."""

import json
import math
import os
import re
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

import av
import av.error
import cv2
import numpy as np

from engines.base import OutputError
from engines.files import make_folder, new_file, put_in_place
from engines.localizer import ImageBgr
from realtime.frames import FrameRecord
from realtime.limits import written_size
from realtime.video import reason_of

FRAGMENT_S = 0.5
LOGS_KEPT = 5
LOG_BEGIN = b'{"source": "'


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


class _WholeFile:
    """A file written beside its place and moved there on success or Ctrl-C; on any other error it is removed.

    A ``live`` one is written in its place from the start, and stays whatever happens: its format takes being cut off, and what
    a camera recorded before its cable came loose is worth keeping. It is a new file, unless it ``goes_on``.

    Attributes:
        path: where it is, or will be; of a live one that is new, perhaps with a number behind the name that was asked for.
    """

    goes_on = False

    def __init__(self, path: Path, live: bool = False) -> None:
        self.path, self.part, self._live = path, path if live else path.with_name(f".{path.name}.part"), live
        try:
            if live and not self.goes_on:
                self.path = self.part = new_file(path)
            make_folder(path.parent)
            self.part.touch()
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error

    def _finish(self) -> None:
        """Close what is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        keep = self._live or kind is None or issubclass(kind, KeyboardInterrupt)
        try:
            self._finish()
            if keep and not self._live:
                put_in_place(self.part, self.path)
        except (OSError, av.error.FFmpegError) as failure:
            if keep:
                raise OutputError(f"cannot finish {self.path}: {reason_of(failure)}") from failure
        finally:
            if not self._live:
                self.part.unlink(missing_ok=True)


class VideoSink(_WholeFile):
    """H.264 MP4 with the source's timestamps.

    While it grows it is fragmented, so that a killed run leaves a playable file; once closed it is an ordinary MP4.

    Args:
        path: ends in ``.mp4``.
        time_base: unit of the timestamps, in seconds.
        rate_fps: nominal rate (for the encoder's rate control only).
        live: written in its place, and to the disk every ``FRAGMENT_S``, whatever it costs in size: a kill loses no more.
    """

    needs_picture = True

    def __init__(self, path: Path, time_base: Fraction, rate_fps: float, live: bool = False) -> None:
        super().__init__(path, live)
        self._time_base, self._rate = time_base, Fraction(rate_fps).limit_denominator(1001)
        muxing = {"movflags": "hybrid_fragmented+frag_keyframe"}
        if live:
            muxing |= {"frag_duration": str(round(FRAGMENT_S * 1e6)), "flush_packets": "1"}
        self._container = av.open(str(self.part), "w", format="mp4", options=muxing)
        self._stream: av.VideoStream | None = None
        self._last_pts = -1

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``; large pictures are scaled down, later ones of another size fitted into the first one's."""
        if picture is None:
            return
        try:
            if self._stream is None:
                self._stream = self._open_stream(picture)
            stream = self._stream
            whole = np.ascontiguousarray(fitted(picture, stream.width, stream.height))
            frame = self._converted(av.VideoFrame.from_numpy_buffer(whole, format="bgr24"))
            pts = max(self._pts_of(record), self._last_pts + 1)
            frame.pts, frame.time_base, self._last_pts = pts, self._time_base, pts
            self._container.mux(stream.encode(frame))
        except (OSError, av.error.FFmpegError) as error:
            raise OutputError(f"cannot write {self.path}: {reason_of(error)}") from error

    def _pts_of(self, record: FrameRecord) -> int:
        return round(Fraction(record.frame.pts_s) / self._time_base)

    def _converted(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The picture as the encoder takes it; it converts what it does not know."""
        return frame

    def _open_stream(self, picture: ImageBgr) -> av.VideoStream:
        height, width = picture.shape[:2]
        stream: av.VideoStream = self._container.add_stream("libx264", rate=self._rate)
        stream.width, stream.height = written_size(width, height)
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = self._time_base
        stream.codec_context.gop_size = max(1, round(self._rate))  # a key frame, so a fragment, per second
        stream.options = {"preset": "veryfast", "crf": "21", "bf": "0"}
        if self._live:
            stream.options |= {"tune": "zerolatency"}  # nothing stays in the encoder
        return stream

    def _finish(self) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()


def fitted(picture: ImageBgr, width: int, height: int) -> ImageBgr:
    """The picture inside ``width`` x ``height``: as it is, with a repeated last row or column, or scaled with black bars."""
    rows, columns = picture.shape[:2]
    if (rows, columns) == (height, width):
        return picture
    if 0 <= height - rows <= 1 and 0 <= width - columns <= 1:
        edge = cv2.BORDER_REPLICATE
        return np.asarray(cv2.copyMakeBorder(picture, 0, height - rows, 0, width - columns, edge), np.uint8)
    scale = min(width / columns, height / rows)
    small = cv2.resize(picture, (max(1, round(columns * scale)), max(1, round(rows * scale))), interpolation=cv2.INTER_AREA)
    canvas = np.zeros((height, width, 3), np.uint8)
    y, x = (height - small.shape[0]) // 2, (width - small.shape[1]) // 2
    canvas[y : y + small.shape[0], x : x + small.shape[1]] = small
    return canvas


class JsonlSink(_WholeFile):
    """One JSON object a line for every captured frame, dropped ones included.

    Args:
        path: where to.
        live: written in its place, line by line, behind what an earlier run wrote there.
        max_mb: when it has grown so large, it is renamed to ``NAME.1.jsonl``, what had that name to ``NAME.2.jsonl`` and so on,
            of which ``LOGS_KEPT`` stay, and a new one begins.

    Raises:
        OutputError: it cannot be written; or, of a live one, there is a file of that name that is no log.
    """

    needs_picture = False
    goes_on = True

    def __init__(self, path: Path, live: bool = False, max_mb: float | None = None) -> None:
        if live:
            check_log(path, max_mb is not None)
        super().__init__(path, live)
        self._most_bytes = max_mb * 1e6 if max_mb else math.inf
        self._open()

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        line = json.dumps(record.row()) + "\n"
        try:
            if self._bytes and self._bytes + len(line) > self._most_bytes:
                self._rotate()
            self._file.write(line)
            self._bytes += len(line)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error

    def _open(self) -> None:
        self._file: IO[str] = self.part.open("a" if self._live else "w", encoding="utf-8", buffering=1)
        self._bytes = self.part.stat().st_size if self._live else 0
        if self._bytes and self.part.is_file() and not _ends_a_line(self.part):
            self._file.write("\n")  # the last row was cut off: the next begins a line of its own

    def _rotate(self) -> None:
        self._file.close()
        for number in range(LOGS_KEPT - 1, 0, -1):
            if self._older(number).exists():
                os.replace(self._older(number), self._older(number + 1))
        os.replace(self.part, self._older(1))
        self._open()

    def _older(self, number: int) -> Path:
        return older_log(self.path, number)

    def _finish(self) -> None:
        self._file.close()


def older_log(path: Path, number: int) -> Path:
    """What the log before, the one before that and so on is called."""
    return path.with_suffix(f".{number}{path.suffix}")


def check_log(path: Path, renamed: bool) -> None:
    """Refuse to go on in a file that is no log of ours.

    Args:
        path: of the log.
        renamed: older ones are renamed and thrown away, see ``JsonlSink``; so they must be ours, too.

    Raises:
        OutputError: there is another file of that name.
    """
    for file in (path, *(older_log(path, number) for number in range(1, LOGS_KEPT + 1) if renamed)):
        if file.is_file() and not _is_log(file):
            raise OutputError(f"{file} is no log of Sightline's, so nothing is written to it: give another name to --log")


def _is_log(path: Path) -> bool:
    """Whether a file is empty or begins with a row, see ``FrameRecord.row``; it need not be whole."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(LOG_BEGIN))
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}") from error
    return LOG_BEGIN.startswith(begin)


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


class WindowSink:
    """A window on the screen for each source; q or Escape calls ``stop``. When the display goes away, the run goes on."""

    def __init__(self, title: str, stop: Callable[[], None]) -> None:
        self.needs_picture = True
        self._title, self._stop = title, stop
        self._open: set[str] = set()

    def __enter__(self) -> Self:
        os.environ.setdefault("QT_LOGGING_RULES", "*.warning=false")  # Qt misses fonts that OpenCV does not ship
        return self

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        if picture is None or not self.needs_picture:
            return
        title = f"{self._title} - {record.frame.source}"
        try:
            if title not in self._open:
                cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
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
    """Whether a window can be opened here: there is a display, and it answers (Qt ends the program where it does not)."""
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
