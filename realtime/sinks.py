"""The sinks: annotated video, log, window and recorder. A file gets its name only when it is
complete.
"""

import errno
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

import av
import av.error
import cv2
import numpy as np

from engines.errors import OutputError
from engines.files import make_folder, new_file, put_in_place
from engines.localizer import ImageBgr
from engines.text import in_words
from realtime.annotate import Annotator, Look, clock
from realtime.frames import FrameRecord
from realtime.sources.limits import written_size
from realtime.sources.video import reason_of
from realtime.statistics import Run

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


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: between an encoder and its file it would lose a packet
    that later ones need.
    """
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # signals reach the main thread only
        yield
        return
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed.is_set() and callable(before):
        before(signal.SIGINT, None)


class _WholeFile:
    """A file written beside its place and moved there on success or Ctrl-C; on any other error it
    is removed.

    A ``live`` one is written in its place from the start, and stays whatever happens: its format
    takes being cut off, and what a camera recorded before its cable came loose is worth keeping. It
    is a new file, unless it ``goes_on``.

    Attributes:
        path: where it is, or will be; of a live one that is new, perhaps with a number behind the
            name that was asked for.
    """

    goes_on = False

    def __init__(self, path: Path, live: bool = False) -> None:
        self.path, self.part, self._live = (
            path,
            path if live else path.with_name(f".{path.name}.part"),
            live,
        )
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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

    While it grows it is fragmented, so that a killed run leaves a playable file; once closed it is
    an ordinary MP4.

    Args:
        path: ends in ``.mp4``.
        time_base: unit of the timestamps, in seconds.
        rate_fps: nominal rate (for the encoder's rate control only).
        live: written in its place, and to the disk every ``FRAGMENT_S``, whatever it costs in size:
            a kill loses no more.
    """

    needs_picture = True

    def __init__(
        self, path: Path, time_base: Fraction, rate_fps: float, live: bool = False
    ) -> None:
        super().__init__(path, live)
        self._time_base, self._rate = time_base, Fraction(rate_fps).limit_denominator(1001)
        muxing = {"movflags": "hybrid_fragmented+frag_keyframe"}
        if live:
            muxing |= {"frag_duration": str(round(FRAGMENT_S * 1e6)), "flush_packets": "1"}
        self._container = av.open(str(self.part), "w", format="mp4", options=muxing)
        self._stream: av.VideoStream | None = None
        self._last_pts = -1

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``; large pictures are scaled down, later ones of another size fitted
        into the first one's.
        """
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
            with interrupts_held():
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
        stream.codec_context.gop_size = max(
            1, round(self._rate)
        )  # a key frame, so a fragment, per second
        stream.options = {"preset": "veryfast", "crf": "21", "bf": "0"}
        if self._live:
            stream.options |= {"tune": "zerolatency"}  # nothing stays in the encoder
        return stream

    def _finish(self) -> None:
        with interrupts_held():
            if self._stream is not None:
                self._container.mux(self._stream.encode(None))
            self._container.close()


def fitted(picture: ImageBgr, width: int, height: int) -> ImageBgr:
    """The picture inside ``width`` x ``height``: as it is, with a repeated last row or column, or
    scaled with black bars.
    """
    rows, columns = picture.shape[:2]
    if (rows, columns) == (height, width):
        return picture
    if 0 <= height - rows <= 1 and 0 <= width - columns <= 1:
        edge = cv2.BORDER_REPLICATE
        return np.asarray(
            cv2.copyMakeBorder(picture, 0, height - rows, 0, width - columns, edge), np.uint8
        )
    scale = min(width / columns, height / rows)
    small = cv2.resize(
        picture,
        (max(1, round(columns * scale)), max(1, round(rows * scale))),
        interpolation=cv2.INTER_AREA,
    )
    canvas = np.zeros((height, width, 3), np.uint8)
    y, x = (height - small.shape[0]) // 2, (width - small.shape[1]) // 2
    canvas[y : y + small.shape[0], x : x + small.shape[1]] = small
    return canvas


class JsonlSink(_WholeFile):
    """One JSON object a line for every captured frame, dropped ones included.

    Args:
        path: where to.
        live: written in its place, line by line, behind what an earlier run wrote there.
        max_mb: when it has grown so large, it is renamed to ``NAME.1.jsonl``, what had that name to
            ``NAME.2.jsonl`` and so on, of which ``LOGS_KEPT`` stay, and a new one begins.

    Raises:
        OutputError: it cannot be written; or, of a live one, there is a file of that name that is
            no log.
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
        self._file: IO[str] = self.part.open(
            "a" if self._live else "w", encoding="utf-8", buffering=1
        )
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
        renamed: older ones are renamed and thrown away, see ``JsonlSink``; so they must be ours,
            too.

    Raises:
        OutputError: there is another file of that name.
    """
    for file in (path, *(older_log(path, number) for number in range(1, LOGS_KEPT + 1) if renamed)):
        if file.is_file() and not _is_log(file):
            raise OutputError(
                f"{file} is no log of Sightline's, so nothing is written to it: name another",
                option="log",
            )


def _is_log(path: Path) -> bool:
    """Whether a file is empty or begins with a row, see ``FrameRecord.row``; it need not be
    whole.
    """
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
    """Says lines, and keeps them for the summary.

    Args:
        notify: gets each.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify, self._lines = notify, list[str]()

    def __call__(self, line: str) -> None:
        """Say one."""
        self._lines.append(line)
        self._notify(line)

    def summary(self) -> dict[str, list[str]]:
        """``trouble``, where there was any."""
        return {"trouble": self._lines} if self._lines else {}


class Beside:
    """A sink whose errors, of any kind, end it and nothing else.

    Args:
        sink: gets everything until it fails.
        what: names it in the line that says so.
        notify: gets that line, once.
    """

    def __init__(self, sink: Sink, what: str, notify: Callable[[str], None]) -> None:
        self._sink, self._what, self._notify, self._failed = sink, what, notify, False

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


TIME_BASE = Fraction(1, 90000)
RATE_FPS = 25.0  # for the encoder's rate control only: live frames come as they come


class Recorder:
    """A sink that writes pictures to where ``wanted`` says at that moment, or nowhere.

    An error, such as a full disk, ends that recording and nothing else; what was written until then
    stays.

    Args:
        wanted: the MP4 to write; a change ends a recording and begins the next.
        sources: their names; of several, each gets a file with its name behind the stem.
        failed: gets the path and the error of a recording that has ended by one.
        renamed: gets the wanted path and the one that a recording has, because there is a file of
            the wanted name.
    """

    def __init__(
        self,
        wanted: Callable[[], Path | None],
        sources: list[str],
        failed: Callable[[Path, Exception], None],
        renamed: Callable[[Path, Path], None] = lambda *_: None,
    ) -> None:
        self._wanted, self._several, self._failed, self._renamed = (
            wanted,
            len(sources) > 1,
            failed,
            renamed,
        )
        self._path: Path | None = None
        self._given_up: Path | None = None
        self._files: dict[str, VideoSink] = {}

    @property
    def needs_picture(self) -> bool:
        return self._wanted() not in (None, self._given_up) or self._path is not None

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``; raises nothing."""
        wanted = self._wanted()
        if wanted != self._given_up:
            self._given_up = None
        if wanted != self._path and self._given_up is None:
            self._finish()
            self._path = wanted
        if picture is not None and self._path is not None:
            try:
                self._write(self._path, record, picture)
            except Exception as error:
                self._give_up(self._path, error)

    def _write(self, whole: Path, record: FrameRecord, picture: ImageBgr) -> None:
        source = record.frame.source
        if source not in self._files:
            path = whole.with_stem(f"{whole.stem}_{source}") if self._several else whole
            self._files[source] = file = VideoSink(path, TIME_BASE, RATE_FPS, live=True)
            if file.path != path:
                self._renamed(path, file.path)
        self._files[source].write(record, picture)

    def _finish(self) -> None:
        path, self._path = self._path, None
        for file in self._taken():
            try:
                with file:
                    pass  # leaving closes it
            except Exception as error:
                self._failed(path or file.path, error)

    def _give_up(self, path: Path, error: Exception) -> None:
        self._path, self._given_up = None, path
        for file in self._taken():
            with suppress(Exception), file:
                pass
        self._failed(path, error)

    def _taken(self) -> list[VideoSink]:
        files = list(self._files.values())
        self._files.clear()
        return files

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finish()


def make_writable(path: Path) -> None:
    """Make the folder of a recording, before anything depends on it.

    Raises:
        OutputError: it cannot be made or written, or a folder has the recording's name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


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
        self._sinks, self._run, self._look, self._alone = sinks, run, look, alone
        self._annotator = Annotator()

    def draw_and_write(self, record: FrameRecord, heat_map_every: int) -> None:
        """Give a shown frame's picture to the sinks that want one; timed.

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
