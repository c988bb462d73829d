"""The sinks that write files: video, log, recording and timeline. A file gets its name only when
it is complete.
"""

import errno
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import av
import av.error
import cv2
import numpy as np
from av.container import OutputContainer

from engines.errors import OutputError
from engines.files import make_folder, new_file, put_in_place
from engines.localizer import ImageBgr
from realtime.capture import Connection
from realtime.frames import STAGES, FrameRecord
from realtime.sources.video import reason_of

X264 = {
    "preset": "veryfast",
    "crf": "21",
    "bf": "0",
    "x264-params": "partitions=i4x4,i8x8:me=dia",
}
"""Settings of the encoder. Veryfast itself also tries to move the parts of a macroblock apart. That
is 25 to 35 % of its processor time, and makes files at most 4 % smaller at equal PSNR (measured:
six clips of 480 x 270 to 854 x 480).
"""
WRITTEN_SIDE_PX, WRITTEN_PIXELS = 16384, 139_264 * 256
"""Of a video that is written: x264 takes no longer side, and H.264's level 6.2, its highest, no
larger frame.
"""
FRAGMENT_S = 0.5
LOGS_KEPT = 5
LOG_BEGIN = b'{"source": "'


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
        self.path = path
        self.part = path if live else path.with_name(f".{path.name}.part")
        self._live = live
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
            frame.pts = pts
            frame.time_base = self._time_base
            self._last_pts = pts
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
        return open_h264(self._container, (width, height), self._rate, self._time_base, self._live)

    def _finish(self) -> None:
        with interrupts_held():
            if self._stream is not None:
                self._container.mux(self._stream.encode(None))
            self._container.close()


def open_h264(
    container: OutputContainer,
    size_px: tuple[int, int],
    rate: Fraction,
    time_base: Fraction,
    live: bool,
) -> av.VideoStream:
    """A stream of H.264 in a container, with a key frame, so a fragment, per second.

    Args:
        container: gets it.
        size_px: width and height of the pictures, see ``written_size``.
        rate: nominal, in pictures a second.
        time_base: unit of the timestamps, in seconds.
        live: nothing stays in the encoder.
    """
    stream: av.VideoStream = container.add_stream("libx264", rate=rate)
    stream.width, stream.height = written_size(*size_px)
    stream.pix_fmt = "yuv420p"
    stream.time_base = stream.codec_context.time_base = time_base
    stream.codec_context.gop_size = max(1, round(rate))
    stream.options = dict(X264)
    if live:
        stream.options |= {"tune": "zerolatency"}
    return stream


def written_size(width_px: int, height_px: int) -> tuple[int, int]:
    """(width, height) of a video that shows pictures of this size: even, and smaller where players
    and encoders end.
    """
    scale = min(
        1.0,
        WRITTEN_SIDE_PX / max(width_px, height_px),
        (WRITTEN_PIXELS / (width_px * height_px)) ** 0.5,
    )
    if scale < 1:
        width_px, height_px = int(width_px * scale) // 2 * 2, int(height_px * scale) // 2 * 2
    return max(2, width_px + width_px % 2), max(2, height_px + height_px % 2)


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
        self.write_row(record.row())

    def write_row(self, row: Mapping[str, Any]) -> None:
        """Write a row that is there already.

        Raises:
            OutputError: it cannot be written.
        """
        line = json.dumps(row) + "\n"
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
    """The name of an older log: number 1 is the last one before this."""
    return path.with_suffix(f".{number}{path.suffix}")


def check_log(path: Path, renamed: bool) -> None:
    """Refuse to write on in a file that is no log of Sightline's.

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


TIME_BASE = Fraction(1, 90000)
RATE_FPS = 25.0  # for the encoder's rate control only: live frames come as they come


@dataclass(frozen=True)
class Recording:
    """What a recorder is to write.

    Attributes:
        path: the MP4; of several sources, each gets a file with its name behind the stem.
        source: the only one that is recorded; None for all.
    """

    path: Path
    source: str | None = None


class Recorder:
    """A sink that writes pictures to where ``wanted`` says at that moment, or nowhere.

    An error, such as a full disk, ends that recording and nothing else; what was written until then
    stays.

    Args:
        wanted: what to write; a change ends a recording and begins the next.
        sources: the names of all.
        failed: gets a recording that has ended by an error, and the error.
        renamed: gets the wanted path and the one that a recording has, because there is a file of
            the wanted name.
        begun: gets a recording, a source, and the file that is written of it from now on.
    """

    def __init__(
        self,
        wanted: Callable[[], Recording | None],
        sources: list[str],
        failed: Callable[[Recording, Exception], None],
        renamed: Callable[[Path, Path], None] = lambda *_: None,
        begun: Callable[[Recording, str, Path], None] = lambda *_: None,
    ) -> None:
        self._wanted = wanted
        self._several = len(sources) > 1
        self._failed = failed
        self._renamed = renamed
        self._begun = begun
        self._now: Recording | None = None
        self._given_up: Recording | None = None
        self._files: dict[str, VideoSink] = {}

    @property
    def needs_picture(self) -> bool:
        return self._wanted() not in (None, self._given_up) or self._now is not None

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``; raises nothing."""
        wanted = self._wanted()
        if wanted != self._given_up:
            self._given_up = None
        if wanted != self._now and self._given_up is None:
            self._finish()
            self._now = wanted
        if picture is not None and self._now is not None:
            try:
                self._write(self._now, record, picture)
            except Exception as error:
                self._give_up(self._now, error)

    def _write(self, now: Recording, record: FrameRecord, picture: ImageBgr) -> None:
        source = record.frame.source
        if now.source not in (None, source):
            return
        if source not in self._files:
            path = now.path.with_stem(f"{now.path.stem}_{source}") if self._several else now.path
            self._files[source] = file = VideoSink(path, TIME_BASE, RATE_FPS, live=True)
            if file.path != path:
                self._renamed(path, file.path)
            self._begun(now, source, file.path)
        self._files[source].write(record, picture)

    def _finish(self) -> None:
        now, self._now = self._now, None
        for file in self._taken():
            try:
                with file:
                    pass  # leaving closes it
            except Exception as error:
                self._failed(now or Recording(file.path), error)

    def _give_up(self, now: Recording, error: Exception) -> None:
        self._now, self._given_up = None, now
        for file in self._taken():
            with suppress(Exception), file:
                pass
        self._failed(now, error)

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


class TraceSink:
    """Writes the timeline of a run in the trace-event format of Perfetto and Chrome: a process for
    each source, a track for each stage; dropped and failed frames and reconnections are marks.

    The array form needs no closing bracket, so a file that was cut off opens too.
    Format: "Trace Event Format",
    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU

    Args:
        path: ends in ``.json``; open it in https://ui.perfetto.dev.
        connections: of the sources.

    Attributes:
        path: of the file, which is a new one: perhaps with a number behind its name.

    Raises:
        OutputError: it cannot be written.
    """

    needs_picture = False

    def __init__(self, path: Path, connections: Sequence[Connection]) -> None:
        self._processes = {each.name: number for number, each in enumerate(connections, 1)}
        self._connections = {each.name: each for each in connections}
        self._reconnects = dict.fromkeys(self._processes, 0)
        try:
            self.path = new_file(path)
            self._file: IO[str] = self.path.open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        self._write_line("[")
        for name, process in self._processes.items():
            self._event("M", process, 0, name="process_name", args={"name": name})
            for track, stage in enumerate(STAGES, 1):
                self._event("M", process, track, name="thread_name", args={"name": stage})
                self._event(
                    "M", process, track, name="thread_sort_index", args={"sort_index": track}
                )

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        source, index = record.frame.source, record.frame.index
        process, args = self._processes[source], {"frame": index}
        for track, stage in enumerate(STAGES, 1):
            if stage in record.stages_ms and stage in record.began_ns:
                begin_us, took_us = record.began_ns[stage] / 1e3, 1e3 * record.stages_ms[stage]
                self._event(
                    "X",
                    process,
                    track,
                    name=f"{stage} {index}",
                    cat=stage,
                    ts=begin_us,
                    dur=took_us,
                    args=args,
                )
        captured_us = record.frame.captured_ns / 1e3
        if record.outcome != "shown":
            self._event(
                "i",
                process,
                1,
                name=f"{record.outcome}: {record.cause}",
                ts=captured_us,
                s="p",
                args=args,
            )
        if self._connections[source].reconnects != self._reconnects[source]:
            self._reconnects[source] = self._connections[source].reconnects
            self._event("i", process, 1, name="reconnected", ts=captured_us, s="p", args=args)

    def _event(self, phase: str, process: int, track: int, **fields: Any) -> None:
        rounded = {
            key: round(value, 3) if isinstance(value, float) else value
            for key, value in fields.items()
        }
        self._write_line(json.dumps({"ph": phase, "pid": process, "tid": track, **rounded}) + ",")

    def _write_line(self, line: str) -> None:
        try:
            self._file.write(line + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
