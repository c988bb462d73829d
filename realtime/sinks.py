"""Where results go: an annotated video, a line-wise log, a window. Files appear under their name only when complete."""

import json
import os
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

import av
import av.error
import cv2
import numpy as np

from engines.base import OutputError
from engines.localizer import ImageBgr
from realtime.frames import FrameRecord


class Sink(AbstractContextManager["Sink"], Protocol):
    """Takes finished frames in order. ``needs_picture``: it wants the drawing, not only the record."""

    needs_picture: bool

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """Take one frame.

        Raises:
            OutputError: it cannot be written.
        """


class _WholeFile:
    """A file written beside its place and moved there on success or Ctrl-C; on any other error it is removed.

    With ``keep_partial`` it is moved there on errors too: what a camera recorded before its cable came loose is worth keeping.
    """

    def __init__(self, path: Path, keep_partial: bool = False) -> None:
        self.path, self.part, self._keep_partial = path, path.with_name(f".{path.name}.part"), keep_partial
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.part.touch()
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error

    def _finish(self) -> None:
        """Close what is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        keep = self._keep_partial or kind is None or issubclass(kind, KeyboardInterrupt)
        try:
            self._finish()
            if keep:
                os.replace(self.part, self.path)
        except (OSError, av.error.FFmpegError) as failure:
            if keep:
                raise OutputError(f"cannot finish {self.path}: {failure}") from failure
        finally:
            self.part.unlink(missing_ok=True)


class VideoSink(_WholeFile):
    """H.264 MP4 with the source's timestamps.

    While it grows it is fragmented, so that a killed run leaves a playable ``.part``; once closed it is an ordinary MP4.

    Args:
        path: ends in ``.mp4``.
        time_base: unit of the timestamps, in seconds.
        rate_fps: nominal rate (for the encoder's rate control only).
        keep_partial: keep what was written when the run fails.
    """

    needs_picture = True

    def __init__(self, path: Path, time_base: Fraction, rate_fps: float, keep_partial: bool = False) -> None:
        super().__init__(path, keep_partial)
        self._time_base, self._rate = time_base, Fraction(rate_fps).limit_denominator(1001)
        self._container = av.open(str(self.part), "w", format="mp4", options={"movflags": "hybrid_fragmented+frag_keyframe"})
        self._stream: av.VideoStream | None = None
        self._last_pts = -1

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``; later pictures of another size are fitted into the first one's."""
        if picture is None:
            return
        try:
            if self._stream is None:
                self._stream = self._open_stream(picture)
            stream = self._stream
            frame = av.VideoFrame.from_ndarray(fitted(picture, stream.width, stream.height), format="bgr24")
            pts = max(round(Fraction(record.frame.pts_s) / self._time_base), self._last_pts + 1)
            frame.pts, frame.time_base, self._last_pts = pts, self._time_base, pts
            self._container.mux(stream.encode(frame))
        except (OSError, av.error.FFmpegError) as error:
            raise OutputError(f"cannot write {self.path}: {error}") from error

    def _open_stream(self, picture: ImageBgr) -> av.VideoStream:
        height, width = picture.shape[:2]
        stream: av.VideoStream = self._container.add_stream("libx264", rate=self._rate)
        stream.width, stream.height = max(2, width + width % 2), max(2, height + height % 2)
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = self._time_base
        stream.codec_context.gop_size = max(1, round(self._rate))  # a key frame, so a fragment, per second
        stream.options = {"preset": "veryfast", "crf": "21", "bf": "0"}
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
    """One JSON object a line for every captured frame, dropped ones included."""

    needs_picture = False

    def __init__(self, path: Path, keep_partial: bool = False) -> None:
        super().__init__(path, keep_partial)
        self._file: IO[str] = self.part.open("w", encoding="utf-8", buffering=1)

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        try:
            self._file.write(json.dumps(record.row()) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error

    def _finish(self) -> None:
        self._file.close()


class WindowSink:
    """A window on the screen; q or Escape ends the run as Ctrl-C does."""

    needs_picture = True

    def __init__(self, title: str) -> None:
        self._title, self._sized = title, False

    def __enter__(self) -> Self:
        os.environ.setdefault("QT_LOGGING_RULES", "*.warning=false")  # Qt misses fonts that OpenCV does not ship
        cv2.namedWindow(self._title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
        return self

    def write(self, record: FrameRecord, picture: ImageBgr | None) -> None:
        """See ``Sink.write``."""
        if picture is not None:
            if not self._sized:
                cv2.resizeWindow(self._title, picture.shape[1], picture.shape[0])
                self._sized = True
            cv2.imshow(self._title, picture)
        if cv2.waitKey(1) & 0xFF in (ord("q"), 27):
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        cv2.destroyWindow(self._title)


def has_display() -> bool:
    """Whether a window can be opened here."""
    return os.name == "nt" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
